import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.cli import main


@pytest.fixture
def draw(model_folders: Path, in_empty_folder: Path):
    """draw(*arguments) runs `generate` with the small pipeline in an empty folder; returns the exit code."""
    return lambda *arguments: main(["generate", "--model", str(model_folders), *map(str, arguments)])


def test_the_folder_is_printed_last_and_holds_the_pictures(draw, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("a red square", "蓝色正方形", "--rerank", 3, "--n", 2) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "4 pictures in outputs/0001, all of them in outputs/0001/grid.png"
    names = {path.name for path in Path("outputs/0001").iterdir()}
    assert names == {"grid.png", "scores.json", "000-00.png", "000-01.png", "001-00.png", "001-01.png"}


def test_equal_commands_draw_equal_pictures_and_other_seeds_others(draw) -> None:
    for seed, out in ((5, "a"), (5, "b"), (6, "c")):
        assert draw("a red square", "--seed", seed, "--n", 1, "--out", out) == 0
    a, b, c = (np.asarray(Image.open(Path(out) / "000-00.png")) for out in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_every_setting_reaches_the_pictures_metadata(draw) -> None:
    options = ["--guidance", 3, "--temperature", 0.9, "--top-k", 5, "--top-p", 0.8, "--seed", 7, "--rerank", 2]
    options += ["--guidance-interval", 0.25, 1]
    assert draw("x", *options, "--scorer", "caption", "--out", "o") == 0
    facts = json.loads(Image.open("o/000-00.png").text["vqt2i"])
    assert facts["settings"] == {
        "guidance": 3.0, "temperature": 0.9, "top_k": 5, "top_p": 0.8, "seed": 7, "rerank": 2, "scorer": "caption",
        "guidance_interval": [0.25, 1.0],
    }  # fmt: skip
    assert set(facts["scores"]) == {"caption"}


def test_the_scorer_that_was_used_is_recorded_when_none_was_chosen(draw) -> None:
    assert draw("x", "--rerank", 2, "--out", "o") == 0
    assert json.loads(Path("o/scores.json").read_text())["settings"]["scorer"] == "both"


def test_without_a_prompt_the_pipelines_examples_are_drawn(draw) -> None:
    assert draw("--rerank", 2, "--out", "o") == 0
    assert [p["prompt"] for p in json.loads(Path("o/scores.json").read_text())["prompts"]] == ["a red square"]


def test_as_many_are_kept_as_are_asked_for_up_to_four_by_default(draw) -> None:
    cases = [([], 4), (["--rerank", 3], 3), (["--rerank", 6], 4), (["--n", 5], 5), (["--rerank", 6, "--n", 6], 6)]
    for i, (options, n) in enumerate(cases):
        assert draw("x", *options, "--out", f"o{i}") == 0
        assert len(list(Path(f"o{i}").glob("000-*.png"))) == n


@pytest.mark.parametrize(
    "prompt", ["", "红" * 10_000, "🟥👩‍👩‍👧‍👦", "a\0b", "\udcff bytes that were no text", "two\nlines", "-- dashes"]
)
def test_hostile_prompts_are_drawn(draw, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("--rerank", 2, "--out", "o", "--", prompt) == 0
    report = json.loads(Path("o/scores.json").read_text(encoding="utf-8"))["prompts"][0]
    told = capsys.readouterr().err
    assert ("did not fit" in told) == (report["n_truncated_ids"] > 0)
    if len(prompt) > 1000:
        assert report["n_truncated_ids"] > 9000 and "9" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rerank", 0], "--rerank: found 0"),
        (["--n", 0], "--n: found 0"),
        (["--n", -3], "--n: found -3"),
        (["--n", 5, "--rerank", 4], "--n 5: only 4 candidates"),
        (["--temperature", 0], "temperature: Input should be greater than 0"),
        (["--temperature", -1], "temperature"),
        (["--top-p", 2], "top_p: Input should be less than or equal to 1"),
        (["--top-k", 0], "top_k"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "-1"], "guidance"),
        (["--guidance-interval", "0.5", "0.2"], "guidance_interval: found 0.5 to 0.2"),
        (["--guidance", "much"], "--guidance: invalid float value: 'much'"),
        (["--scorer", "beauty", "--rerank", 2], "--scorer: invalid choice: 'beauty'"),
        (["--scorer", "clip"], "--scorer clip: nothing is ranked without --rerank"),
    ],
)
def test_numbers_out_of_range_are_told_in_a_line(
    fails, model_folders: Path, in_empty_folder: Path, options: list, told: str
) -> None:
    assert told in fails("generate", "x", "--model", model_folders, *options)
    assert list(in_empty_folder.iterdir()) == []


def test_a_model_that_is_not_there_or_is_none_is_told(fails, in_empty_folder: Path, model_folders: Path) -> None:
    (in_empty_folder / "empty").mkdir()
    assert "none: no such folder" in fails("generate", "x", "--model", "none")
    assert "empty/card.json" in fails("generate", "x", "--model", "empty")
    told = fails("generate", "x", "--model", model_folders / "vq")
    assert "vq: a model of kind 'vqgan'; expected a pipeline folder or a GPT run" in told


def test_an_out_that_is_a_file_is_told_before_drawing(fails, in_empty_folder: Path, model_folders: Path) -> None:
    (in_empty_folder / "file").touch()
    assert "--out file" in fails("generate", "x", "--model", model_folders, "--out", "file")
