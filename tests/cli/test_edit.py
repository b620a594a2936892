import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.cli import main


@pytest.fixture
def edit(model_folders: Path, in_empty_folder: Path):
    """edit(*arguments) changes a picture of 16 px with the small pipeline, in an empty folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("in.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[8:, 8:] = 255
    Image.fromarray(mask).save("mask.png")
    return lambda *arguments: main(["edit", "in.png", "--model", str(model_folders), *map(str, arguments)])


CHANGES = [
    (["--mask", "mask.png"], 2),
    (["--box", 0, 0, 8, 8], 2),
    (["--keep-top", 0.5], 2),
    (["--extend", 8, 8, 8, 8], 2),
    (["--vary", 0.5], 1),
]


@pytest.mark.parametrize(("change", "n_before"), CHANGES, ids=lambda value: str(value))
def test_pictures_and_the_given_one_beside_them_are_written(
    edit, change: list, n_before: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("--prompt", "a red square", *change, "--rerank", 3, "--n", 2) == 0
    assert capsys.readouterr().out == (
        "2 pictures in outputs/0001, beside the given one in outputs/0001/before-after.png\n"
    )
    out = Path("outputs/0001")
    names = {path.name for path in out.iterdir()}
    assert names == {"request.json", "grid.png", "scores.jsonl", "000-00.png", "000-01.png", "before-after.png"}
    assert Image.open(out / "before-after.png").width == (n_before + 2) * 136 + 8
    facts = json.loads(Image.open(out / "000-00.png").text["vqt2i"])
    assert facts["prompt"] == "a red square" and set(facts["scores"]) == {"likelihood"}
    assert facts["settings"]["scorer"] == "likelihood" and len(facts["settings"]["change"]) == 1


def test_equal_commands_give_equal_pictures_and_pasted_ones_keep_their_pixels(edit) -> None:
    for out in "ab":
        assert edit("--keep-top", 0.5, "--paste", "--n", 1, "--out", out) == 0
    a, b, given = (np.asarray(Image.open(path)) for path in ("a/000-00.png", "b/000-00.png", "in.png"))
    assert np.array_equal(a, b) and np.array_equal(a[:8], given[:8]) and not np.array_equal(a, given)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.png", "--keep-top", 0.5], "none.png: missing file"),
        (["text.png", "--keep-top", 0.5], "text.png: not an image"),
        (["in.png", "--mask", "small.png"], "mask: 3 x 2 pixels, the picture has 16 x 16"),
        (["in.png", "--mask", "text.png"], "text.png: not an image"),
        (["in.png", "--box", 10, 10, 10, 2], "box 10 10 10 2 (x, y, width, height): expected one inside"),
        (["in.png", "--keep-top", 2], "share kept from the top: found 2"),
        (["in.png", "--extend", 0, 0, 0, 0], "extend by 0 0 0 0"),
        (["in.png", "--vary", 0], "share to vary: found 0"),
        (["in.png"], "one of the arguments --mask --box --keep-top --extend --vary is required"),
        (["in.png", "--vary", 0.5, "--keep-top", 0.5], "not allowed with argument"),
        (["in.png", "--extend", 0, 0, 16, 0], "32 x 16 pixels: expected the shape of the model's grid"),
        (["in.png", "--keep-top", 0.5, "--scorer", "all"], "--scorer all: nothing is ranked without --rerank"),
        (["in.png", "--keep-top", 0.5, "--n", 0], "found 0"),
        (["in.png", "--keep-top", 0.5, "--paste", -1], "feather of -1"),
        (["in.png", "--keep-top", 0.5, "--grid", 0, 4], "expected 1 or more rows and columns"),
        (["in.png", "--keep-top", 0.5, "--out", "in.png"], "in.png: exists already"),
    ],
)
def test_what_cannot_be_edited_is_told_in_a_line(edit, fails, model_folders: Path, arguments: list, told: str) -> None:
    Path("text.png").write_text("no picture")
    Image.new("L", (3, 2)).save("small.png")
    assert told in fails("edit", *arguments, "--model", model_folders)
    assert not Path("outputs").exists()
