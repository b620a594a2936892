import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqt2i.checkpoint import load_model, save_model
from vqt2i.cli import main
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import write_dataset
from vqt2i.evaluation.result import read_result
from vqt2i.generation.output import read_prompt
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig


@pytest.fixture
def upscale(upscaler_folder: Path, in_empty_folder: Path):
    """upscale(*arguments) draws with the small model, in an empty folder that holds a picture of 16 px and one of 24 x
    8."""
    for name, shape in (("in.png", (16, 16)), ("wide.png", (8, 24))):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    return lambda *arguments: main(["upscale", "--model", str(upscaler_folder), *map(str, arguments)])


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pictures_of_twice_the_size_and_the_given_ones_beside_them_are_written(
    upscale, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upscale("in.png", "wide.png", "--prompt", "a red square", "--n", 2) == 0
    out = Path("outputs/0001")
    assert capsys.readouterr().out == f"4 pictures in {out}, beside given ones in {out / 'before-after.png'}\n"
    sizes = {path.name: Image.open(path).size for path in out.glob("0*.png")}
    assert sizes == {"000-00.png": (32, 32), "000-01.png": (32, 32), "001-00.png": (48, 16), "001-01.png": (48, 16)}
    assert Image.open(out / "before-after.png").width == 4 * 136 + 8
    facts = json.loads(Image.open(out / "001-00.png").text["vqt2i"])
    assert facts["prompt"] == "a red square" and len(facts["settings"]["upscaled"]) == 2


def test_equal_commands_give_equal_pictures_and_other_seeds_others(upscale) -> None:
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert upscale("in.png", "--seed", seed, "--out", out) == 0
    a, b, c = (pixels(f"{out}/000-00.png") for out in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_picture_that_generate_wrote_is_drawn_for_its_own_prompt(upscale, model_folders: Path) -> None:
    assert main(["generate", "a red square", "--n", "1", "--model", str(model_folders), "--out", "drawn"]) == 0
    assert read_prompt(Path("drawn/000-00.png")) == "a red square" and read_prompt(Path("in.png")) == ""
    assert upscale("drawn/000-00.png", "--out", "own") == 0
    assert upscale("drawn/000-00.png", "--prompt", "a red square", "--out", "said") == 0
    assert read_prompt(Path("own/000-00.png")) == "a red square"
    assert np.array_equal(pixels("own/000-00.png"), pixels("said/000-00.png"))


def test_generate_draws_what_it_keeps_in_twice_its_size(
    upscale, model_folders: Path, upscaler_folder: Path, fails
) -> None:
    command = ["generate", "a red square", "蓝色正方形", "--model", str(model_folders), "--rerank", "3", "--n", "1"]
    assert main([*command, "--out", "small"]) == 0
    assert main([*command, "--upscale", str(upscaler_folder), "--out", "large"]) == 0
    small, large = (
        [json.loads(line) for line in Path(folder, "scores.jsonl").read_text().splitlines()]
        for folder in ("small", "large")
    )
    assert small == large  # ranked before
    assert Image.open("small/001-00.png").size == (16, 16) and Image.open("large/001-00.png").size == (32, 32)
    models = json.loads(Path("large/request.json").read_text())["models"]
    assert set(models) == {"text", "vq", "gpt", "clip", "upscaler's text", "upscaler's vq", "upscaler's gpt"}
    assert main([*command, "--upscale", str(upscaler_folder), "--out", "large"]) == 0  # goes on: nothing is left to do
    assert "upscaler's gpt model" in fails(*command, "--out", "large")


def test_pictures_of_another_image_tokenizer_are_drawn_from_their_pixels(
    upscale, model_folders: Path, upscaler_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(upscaler_folder, other)
    vq = load_model(other / "vq", ImageTokenizerConfig, ImageTokenizer)
    with torch.no_grad():
        vq.decoder.conv_out.bias.add_(0.1)
    fingerprint = save_model(other / "vq", vq, vq.config, {"kind": "vqgan"})
    gpt = load_model(other / "gpt", GPTConfig, GPT)
    config = gpt.config.model_copy(update={"image_tokenizer": fingerprint})
    save_model(other / "gpt", gpt, config, {"kind": "upscaler"})
    command = ["generate", "a red square", "--model", str(model_folders), "--n", "1"]
    assert main([*command, "--out", "small"]) == 0
    assert main([*command, "--upscale", str(other), "--out", "large"]) == 0
    assert upscale("small/000-00.png", "--model", other, "--out", "again") == 0
    assert np.array_equal(pixels("large/000-00.png"), pixels("again/000-00.png"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.png"], "none.png: missing file"),
        (["odd.png"], "picture of 18 x 16 pixels: expected sides that 4 divides, and 8 x 8 or more"),
        (["small.png"], "picture of 4 x 16 pixels: expected sides that 4 divides, and 8 x 8 or more"),
        (["in.png", "--n", 0], "number of pictures: found 0"),
        (["in.png", "--negative", "x"], "acts on no token"),
        (["in.png", "--rerank", 4], "unrecognized arguments: --rerank 4"),
        (["in.png", "--out", "in.png"], "in.png: exists already"),
        (["in.png", "--model", "shapes32"], "this GPT reads a text and cannot upscale"),
        (["in.png", "--model", "none"], "none: no such folder"),
    ],
)
def test_what_cannot_be_drawn_larger_is_told_in_a_line(
    upscale, fails, upscaler_folder: Path, arguments: list, told: str
) -> None:
    for name, size in (("odd.png", (18, 16)), ("small.png", (4, 16))):
        Image.new("RGB", size).save(name)
    assert told in fails("upscale", "--model", upscaler_folder, *arguments)
    assert not Path("outputs").exists()


def test_without_a_run_for_it_that_is_told(upscale, fails) -> None:
    assert "runs: no run for super-resolution in it, and none is shipped; train one" in fails("upscale", "in.png")


def test_such_a_model_is_for_nothing_else(upscale, upscaler_folder: Path, fails) -> None:
    for command in (["generate", "x"], ["edit", "in.png", "--keep-top", 0.5]):
        assert "draws pictures from ones of half their size" in fails(*command, "--model", upscaler_folder)


def test_upscaling_is_evaluated_on_a_data_set_of_large_enough_pictures(
    upscale, upscaler_folder: Path, model_folders: Path, capsys: pytest.CaptureFixture[str], fails
) -> None:
    rng = np.random.default_rng(0)
    for name, side in (("large", 32), ("small", 16)):
        pairs = [Pair(f"k{i}", rng.integers(0, 256, (side, side, 3), dtype=np.uint8), {}) for i in range(9)]
        write_dataset(Path(name), {"val": pairs})
    assert main(["evaluate", str(upscaler_folder), "large", "--measure", "upscaling", "--out", "o"]) == 0
    assert "bicubic, decoded" in capsys.readouterr().out
    measured = read_result(Path("o")).measures["upscaling"]
    values = {(row.where["way"], row.name): row.value for row in measured.rows}
    assert values["real ids", "same_ids"] == 1 and measured.protocol["data"]["n"] == 9
    assert "Halved pictures in twice their size" in Path("o/report.html").read_text()
    options = ["--out", "p", "--measure"]
    told = fails("evaluate", upscaler_folder, "small", *options, "upscaling")
    assert "k0: 16 x 16 pixels; super-resolution learns from pictures of 32 x 32" in told
    assert "upscaling: needs a data set" in fails("evaluate", upscaler_folder, *options, "upscaling")
    assert "this GPT reads a text and cannot upscale" in fails(
        "evaluate", model_folders, "large", *options, "upscaling"
    )
    assert "draws pictures from ones of half their size" in fails("evaluate", upscaler_folder, *options, "alignment")
    assert not Path("p").exists()
