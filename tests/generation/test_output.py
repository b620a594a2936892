import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.generation import TextToImage
from vqt2i.generation.output import next_folder, write_outputs

PROMPTS = ["a red square", "红色 \ud800 正方形\n" + "long " * 200, ""]
SETTINGS = {"guidance": 2.0, "seed": 3}


@pytest.fixture
def written(model_folders: Path, tmp_path: Path) -> tuple[Path, list, list[Path], TextToImage]:
    pipeline = TextToImage.load(model_folders, "cpu")
    groups = pipeline.candidates(PROMPTS, 3, seed=3)
    folder = tmp_path / "out"
    return folder, groups, write_outputs(folder, groups, 2, SETTINGS, pipeline.fingerprints), pipeline


def test_the_best_n_of_each_prompt_are_written_and_the_grid_is_named_first(written) -> None:
    folder, groups, paths, _ = written
    assert [path.name for path in paths] == ["grid.png"] + [f"{p:03d}-{r:02d}.png" for p in range(3) for r in range(2)]
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} | {"scores.json"}
    for p, group in enumerate(groups):
        for r in range(2):
            assert np.array_equal(np.asarray(Image.open(folder / f"{p:03d}-{r:02d}.png")), group[r].image_HW3)


def test_a_picture_says_how_to_draw_it_again(written) -> None:
    folder, groups, _, pipeline = written
    facts = json.loads(Image.open(folder / "001-00.png").text["vqt2i"])
    best = groups[1][0]
    assert facts == {
        "prompt": best.prompt, "prompt_index": 1, "image_index": best.image_index, "seed": 3, "settings": SETTINGS,
        "models": pipeline.fingerprints, "scores": best.scores,
    }  # fmt: skip
    assert facts["prompt"].startswith("红色")


def test_scores_json_has_every_candidate_of_every_prompt(written) -> None:
    folder, groups, _, pipeline = written
    report = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert report["settings"] == SETTINGS and report["models"] == pipeline.fingerprints
    for p, (row, group) in enumerate(zip(report["prompts"], groups, strict=True)):
        assert row["prompt"] == group[0].prompt and row["n_truncated_ids"] == group[0].n_truncated
        assert [c["scores"] for c in row["candidates"]] == [sample.scores for sample in group]
        assert [c["file"] for c in row["candidates"]] == [f"{p:03d}-00.png", f"{p:03d}-01.png", None]
        assert sorted(c["index"] for c in row["candidates"]) == [0, 1, 2]


def test_the_grid_has_a_row_for_each_prompt(written) -> None:
    folder, groups, _, _ = written
    grid = np.asarray(Image.open(folder / "grid.png").convert("RGB"))
    enlarged = np.asarray(Image.fromarray(groups[2][1].image_HW3).resize((128, 128), Image.Resampling.NEAREST))
    found = [
        (y, x)
        for y in range(grid.shape[0] - 127)
        for x in range(0, grid.shape[1] - 127, 8)
        if np.array_equal(grid[y, x : x + 128], enlarged[0])
        and np.array_equal(grid[y : y + 128, x : x + 128], enlarged)
    ]
    assert len(found) == 1 and found[0][0] > 2 * 128 and found[0][1] > 128


def test_unscored_pictures_are_written_too(model_folders: Path, tmp_path: Path) -> None:
    pipeline = TextToImage.load(model_folders, "cpu")
    groups = pipeline.candidates(["x"], 1, scored=False)
    assert len(write_outputs(tmp_path, groups, 1, {}, pipeline.fingerprints)) == 2


def test_folders_are_numbered_on(tmp_path: Path) -> None:
    assert next_folder(tmp_path / "outputs") == tmp_path / "outputs" / "0001"
    for name in ("0001", "0041", "7x", "notes"):
        (tmp_path / name).mkdir()
    assert next_folder(tmp_path).name == "0042"
