"""What ships draws as well as is recorded beside it, and would not if something was broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.cli import main
from vqt2i.data.shards import DataSet
from vqt2i.errors import DataError
from vqt2i.evaluation.gate import GATE, PICTURES, check_gate, read_gate
from vqt2i.generation import TextToImage, decode, drawing, rows
from vqt2i.generation.find import SHIPPED
from vqt2i.generation.parts import PIPELINE
from vqt2i.gpt import SequenceLayout, Sequences
from vqt2i.text import TextBatch

FOLDERS = sorted(path.parent for path in SHIPPED.glob(f"*/{PIPELINE}"))


@pytest.fixture(scope="module")
def shapes() -> TextToImage:
    return TextToImage.load(SHIPPED / "shapes32", "cpu")


def fallen(pipeline: TextToImage, folder: Path) -> set[str]:
    """The names of what is not reached."""
    return {name for name, (value, figure) in check_gate(pipeline, folder).items() if not figure.is_reached(value)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_ships_reaches_what_is_recorded_beside_it(folder: Path) -> None:
    gate, _ = read_gate(folder, TextToImage.load(folder, "cpu").vq.config.image_size_px)
    assert {"psnr", "r_precision", "r_precision_reranked"} <= gate.figures.keys()
    assert all(figure.value - figure.tolerance > 0 for name, figure in gate.figures.items() if "caption" not in name)
    assert fallen(TextToImage.load(folder, "cpu"), folder) == set()


# --- breaking something on purpose ---


def break_sampler(patch: pytest.MonkeyPatch) -> None:
    """The id after the one that was drawn."""
    draw = decode.draw
    patch.setattr(decode, "draw", lambda logits_BV, *rest: (draw(logits_BV, *rest) + 1) % logits_BV.shape[-1])


def break_mask(patch: pytest.MonkeyPatch) -> None:
    """Padding before a text is seen."""
    text_prefix = SequenceLayout.text_prefix

    def seen(layout: SequenceLayout, text: TextBatch) -> Sequences:
        sequences = text_prefix(layout, text)
        return sequences._replace(real_BL=torch.ones_like(sequences.real_BL))

    patch.setattr(SequenceLayout, "text_prefix", seen)


def break_guidance(patch: pytest.MonkeyPatch) -> None:
    """Away from the prompt."""
    guide = rows.guide
    patch.setattr(rows, "guide", lambda conditional, null, scale: guide(conditional, null, -scale))


def break_rerank(patch: pytest.MonkeyPatch) -> None:
    """The worst first."""
    combine = drawing.combine
    patch.setattr(drawing, "combine", lambda scores: -combine(scores))


@pytest.mark.parametrize(
    ("damage", "seen_in"),
    [
        (break_sampler, {"right", "r_precision"}),
        (break_mask, {"right"}),
        (break_guidance, {"right", "r_precision"}),
        (break_rerank, {"right_reranked", "clip_score_reranked"}),
    ],
)
def test_the_gate_is_not_passed_with_something_broken(
    shapes: TextToImage, monkeypatch: pytest.MonkeyPatch, damage: Callable[[pytest.MonkeyPatch], None], seen_in: set
) -> None:
    damage(monkeypatch)
    found = fallen(shapes, SHIPPED / "shapes32")
    assert seen_in <= found
    if damage is break_rerank:
        assert not found & {"right", "r_precision", "clip_score", "psnr"}  # what is drawn is as good


# --- the command ---


@pytest.fixture
def own(model_folders: Path, in_empty_folder: Path) -> Path:
    """A pipeline folder that may be written to."""
    shutil.copytree(model_folders, "own")
    return Path("own")


def test_a_gate_is_recorded_and_checked(own: Path, tiny_dataset: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--n-prompts", "5", "--candidates", "2"]
    assert main(["gate", str(own), "--record", "--data", str(tiny_dataset.folder), *sizes]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Recorded in own/gate.json"
    gate, images = read_gate(own, 16)
    split = tiny_dataset.split("val")
    assert len(gate.prompts) == 5 and gate.prompts[1] == split.captions(1)["zh"][0] and gate.candidates == 2
    assert images.shape == (7, 16, 16, 3) and np.array_equal(images[3], split[3].image_HW3)
    assert gate.command.startswith("python tools/gate.py own --record --data")
    drawn = {"r_precision", "clip_score", "caption_score"}
    assert gate.figures.keys() == drawn | {f"{name}_reranked" for name in drawn} | {"psnr"}
    assert main(["gate", str(own)]) == 0
    assert capsys.readouterr().out.count("reaches") == len(gate.figures)
    content = json.loads((own / GATE).read_text())
    content["figures"]["psnr"]["value"] += 0.2
    (own / GATE).write_text(json.dumps(content))
    assert main(["gate", str(own)]) == 1
    assert capsys.readouterr().out.count("IS BELOW") == 1


def test_a_gate_that_is_not_there_or_damaged_is_told(own: Path, tiny_dataset: DataSet, fails) -> None:
    assert "own: its gate cannot be read" in fails("gate", own)
    assert "this model draws 16 px, and shapes have 32, 64, 128; give --data" in fails("gate", own, "--record")
    (own / PICTURES).write_bytes(b"")
    (own / GATE).write_text('{"command": "x"}')
    with pytest.raises(DataError, match=r"gate\.json: damaged .*candidates"):
        read_gate(own, 16)
