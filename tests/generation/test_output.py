import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vqt2i.errors import UserError
from vqt2i.generation import Preview, Sample, TextToImage, output
from vqt2i.generation.output import OutputFolder, PreviewFile, Request, next_folder
from vqt2i.text import clean_text

PROMPTS = [clean_text(text) for text in ("a red square", "红色 \ud800 正方形\n" + "long " * 200, "")]
SETTINGS = {"guidance": 2.0, "seed": 3, "interval": (0.0, 0.5)}


@pytest.fixture
def groups(model_folders: Path) -> list[list[Sample]]:
    return TextToImage.load(model_folders, "cpu").candidates(PROMPTS, 3, seed=3)


@pytest.fixture
def folder(groups: list[list[Sample]], tmp_path: Path) -> OutputFolder:
    with OutputFolder(tmp_path / "out", Request(PROMPTS, 2, SETTINGS, {"gpt": "abc"})) as folder:
        for group in groups:
            folder.write(group)
    return folder


def again(folder: OutputFolder) -> OutputFolder:
    return OutputFolder(folder.path, folder.request)


def test_the_best_n_of_each_prompt_are_written(folder: OutputFolder, groups: list[list[Sample]]) -> None:
    pictures = {f"{p:03d}-{r:02d}.png": groups[p][r] for p in range(3) for r in range(2)}
    assert {path.name for path in folder.path.iterdir()} == {*pictures, "grid.png", "scores.jsonl", "request.json"}
    assert folder.grids == [folder.path / "grid.png"] and folder.n_done == 3
    for name, sample in pictures.items():
        assert np.array_equal(np.asarray(Image.open(folder.path / name)), sample.image_HW3)


def test_a_picture_says_how_to_draw_it_again(folder: OutputFolder, groups: list[list[Sample]]) -> None:
    facts = json.loads(Image.open(folder.path / "001-00.png").text["vqt2i"])
    best = groups[1][0]
    assert facts == {
        "prompt": best.prompt, "prompt_index": 1, "image_index": best.image_index, "seed": 3,
        "settings": SETTINGS | {"interval": [0.0, 0.5]}, "models": {"gpt": "abc"}, "scores": best.scores,
    }  # fmt: skip
    assert facts["prompt"].startswith("红色")


def test_the_request_and_every_candidates_scores_are_kept(folder: OutputFolder, groups: list[list[Sample]]) -> None:
    request = json.loads((folder.path / "request.json").read_text(encoding="utf-8"))
    settings = SETTINGS | {"interval": [0.0, 0.5]}
    assert request == {"prompts": PROMPTS, "n": 2, "settings": settings, "models": {"gpt": "abc"}}
    lines = (folder.path / "scores.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    for p, (line, group) in enumerate(zip(lines, groups, strict=True)):
        row = json.loads(line)
        assert row["prompt"] == group[0].prompt and row["n_truncated_ids"] == group[0].n_truncated
        assert [c["scores"] for c in row["candidates"]] == [sample.scores for sample in group]
        assert [c["file"] for c in row["candidates"]] == [f"{p:03d}-00.png", f"{p:03d}-01.png", None]
        assert sorted(c["index"] for c in row["candidates"]) == [0, 1, 2]


def test_the_grid_has_a_row_for_each_prompt(folder: OutputFolder, groups: list[list[Sample]]) -> None:
    grid = np.asarray(Image.open(folder.path / "grid.png").convert("RGB"))
    enlarged = np.asarray(Image.fromarray(groups[2][1].image_HW3).resize((128, 128), Image.Resampling.NEAREST))
    found = [
        (y, x)
        for y in range(grid.shape[0] - 127)
        for x in range(0, grid.shape[1] - 127, 8)
        if np.array_equal(grid[y, x : x + 128], enlarged[0])
        and np.array_equal(grid[y : y + 128, x : x + 128], enlarged)
    ]
    assert len(found) == 1 and found[0][0] > 2 * 128 and found[0][1] > 128


def test_single_pictures_stand_side_by_side_above_their_prompts(groups: list[list[Sample]], tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "o", Request(["x"] * 9, 1, {}, {})) as folder:
        for i in range(9):
            folder.write([dataclasses.replace(groups[i % 3][0], prompt_index=i)])
    gallery = np.asarray(Image.open(folder.path / "grid.png").convert("RGB"))
    assert gallery.shape == (2 * (136 + 32) + 8, 7 * 136 + 8, 3)
    for i in range(9):
        y, x = 8 + i // 7 * 168, 8 + i % 7 * 136
        enlarged = Image.fromarray(groups[i % 3][0].image_HW3).resize((128, 128), Image.Resampling.NEAREST)
        assert np.array_equal(gallery[y : y + 128, x : x + 128], np.asarray(enlarged))
        assert gallery[y + 128 : y + 160, x : x + 128].min() < 128  # letters


def test_prompts_break_between_words_where_they_have_any() -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), output._font(12)
    width = draw.textlength("above a star", font)
    wrapped = partial(output._wrapped, draw, font=font, width_px=width)
    assert wrapped("a red circle", n_lines=2) == ["a red circle"]
    assert wrapped("a red circle above a star", n_lines=3) == ["a red circle", "above a star"]
    first, rest = wrapped("a red circle above a yellow star", n_lines=2)
    assert first == "a red circle" and rest.startswith("above a") and rest.endswith("…")
    assert "".join(wrapped("i" * 90, n_lines=9)) == "i" * 90
    assert wrapped(" ", n_lines=2, width_px=2 * width) == ["(no prompt)"]  # wide enough in whatever font is installed


def test_many_pictures_of_a_prompt_wrap_and_the_grid_stays_bounded(groups: list[list[Sample]], tmp_path: Path) -> None:
    for n, size in ((17, (16 * 136 + 8, 16 + 2 * 144 + 16)), (300, (16 * 136 + 8, 16 + 8 * 144 + 16))):
        with OutputFolder(tmp_path / f"{n}", Request(["x"], n, {}, {})) as folder:
            folder.write((groups[0] * n)[:n])
        assert Image.open(folder.path / "grid.png").size == size


def test_unscored_pictures_are_written_too(groups: list[list[Sample]], tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "o", Request(["x"], 1, {}, {})) as folder:
        folder.write([dataclasses.replace(groups[0][0], scores={})])
    assert (tmp_path / "o" / "000-00.png").is_file() and folder.grids[0].is_file()


def test_names_sort_as_numbers_do(groups: list[list[Sample]], tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "o", Request(["x"] * 12_345, 1, {}, {})) as folder:
        folder.write(groups[0])
    assert (tmp_path / "o" / "00000-00.png").is_file()
    assert len(folder.grids) == 386 and folder.grids[-1].name == "grid-385.png"


def test_nothing_is_there_before_it_is_entered(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "o", Request(["x"], 1, {}, {}))
    assert not (tmp_path / "o").exists()


def test_a_line_that_was_cut_off_is_drawn_again(folder: OutputFolder, groups: list[list[Sample]]) -> None:
    scores = folder.path / "scores.jsonl"
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-10])
    reopened = again(folder)
    assert reopened.n_done == 2
    with reopened:
        reopened.write(groups[2])
    assert scores.read_bytes() == whole and again(folder).n_done == 3


def test_damage_is_told_by_name(folder: OutputFolder) -> None:
    (folder.path / "001-01.png").rename(folder.path / "away.png")
    with pytest.raises(UserError, match=r"001-01\.png: gone"):
        again(folder)
    (folder.path / "away.png").rename(folder.path / "001-01.png")
    scores = folder.path / "scores.jsonl"
    scores.write_bytes(scores.read_bytes().replace(b'{"prompt"', b"prompt", 1))
    with pytest.raises(UserError, match=r"scores\.jsonl: line 1 is damaged"):
        again(folder)
    for content in ("{", "[]", '{"prompts": 3}', '{"prompts": 3, "n": 1, "settings": {}, "models": {}}'):
        (folder.path / "request.json").write_text(content)
        with pytest.raises(UserError, match=r"request\.json: damaged"):
            again(folder)


def test_a_preview_file_is_a_whole_picture_written_when_it_is_time_and_gone_at_the_end(tmp_path: Path) -> None:
    path, asked = tmp_path / "preview.png", []

    def images() -> np.ndarray:
        asked.append(len(asked))
        return np.full((9, 16, 16, 3), len(asked), np.uint8)

    with PreviewFile(path, seconds=3600) as show:
        for _ in range(3):
            show(Preview([], images))
        assert asked == [0]
        picture = np.asarray(Image.open(path))
        assert picture.shape == (2 * 136 + 8, 8 * 136 + 8, 3)
        assert (picture[8:136, 8:136] == 1).all() and (picture[144:272, 8:136] == 1).all()
        assert (picture[144:272, 144:] == 255).all()
    assert list(tmp_path.iterdir()) == []


def test_folders_are_numbered_on(tmp_path: Path) -> None:
    assert next_folder(tmp_path / "outputs") == tmp_path / "outputs" / "0001"
    for name in ("0001", "0041", "7x", "notes"):
        (tmp_path / name).mkdir()
    assert next_folder(tmp_path).name == "0042"
