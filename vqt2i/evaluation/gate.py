"""The figures that a pipeline is held to: measured in a minute, recorded beside its weights, and reached ever after.

    gate.json     the prompts, and each figure with how far it may fall
    gate.png      pictures that the image tokenizer is measured on, in rows

What is measured is what users get on a CPU: the pipeline's own sampling, engine and ranking. Equal code gives equal
figures on one machine; the tolerance is for rounding elsewhere, which turns a few pictures into others as good.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt

from vqt2i.config import Config, build_config
from vqt2i.data.images import png_bytes, to_tensor
from vqt2i.data.shapes import SIZES_PX, pairs
from vqt2i.data.shards import Split
from vqt2i.errors import ConfigError, DataError
from vqt2i.evaluation.alignment import Examiner
from vqt2i.evaluation.judge import Judge
from vqt2i.evaluation.prompts import Asked, caption_prompts, drawn_prompts, listed_prompts
from vqt2i.evaluation.reconstruction import batches_of
from vqt2i.evaluation.statistics import Estimate, bootstrap_mean
from vqt2i.files import write_atomic, write_json
from vqt2i.generation import TextToImage
from vqt2i.vq.metrics import psnr

GATE, PICTURES = "gate.json", "gate.png"
N_PICTURES, PER_ROW = 32, 8
KINDS = ("single_seen", "single_unseen", "two_seen", "two_unseen")
DRAWN = ("right", "r_precision", "clip_score", "caption_score")
_PSNR_FALL = 0.1  # dB: its pictures are given, and nothing is drawn
_LEAST_FALL = {"right": 0.03, "r_precision": 0.03}  # where all is right there is no spread


class Figure(Config):
    """What was reached, and how far below it is still the same."""

    value: float
    tolerance: float

    def is_reached(self, value: float) -> bool:
        return value >= self.value - self.tolerance


class Gate(Config):
    """`candidates` of each prompt are drawn from `seed`."""

    format_version: int = 1
    command: str
    candidates: PositiveInt
    seed: NonNegativeInt
    figures: dict[str, Figure]
    prompts: tuple[str, ...]


def gate_material(pipeline: TextToImage, split: Split | None, n_prompts: int) -> tuple[list[Asked], np.ndarray]:
    """Prompts and pictures (N, H, W, 3) to hold a pipeline to: of a data set's split, or else of the shapes.

    Raises:
        DataError: there is no data set, and the pipeline's pictures are of no size that shapes have.
    """
    size_px = pipeline.vq.config.image_size_px
    if split is not None:
        return caption_prompts(split, n_prompts), np.concatenate(list(batches_of(split, N_PICTURES, size_px)))
    if size_px not in SIZES_PX:
        raise DataError(f"this model draws {size_px} px, and shapes have {', '.join(map(str, SIZES_PX))}; give --data")
    images = [pair.image_HW3 for pair in pairs("val", N_PICTURES, 0, size_px)]
    return drawn_prompts(KINDS, max(2, n_prompts // len(KINDS)), 0), np.stack(images)


@torch.inference_mode()
def measure_gate(
    pipeline: TextToImage, prompts: Sequence[str], candidates: int, seed: int, image_NHW3: np.ndarray
) -> dict[str, Estimate]:
    """By name: PSNR, and of what is drawn the values in DRAWN that there are, each of all candidates and `_reranked`:
    of the one that the pipeline ranks first."""
    asked, size_px = listed_prompts(prompts), pipeline.vq.config.image_size_px
    examiner = Examiner(asked, Judge.of(pipeline), size_px, seed)
    found: dict[str, list[float]] = {}
    for group in pipeline.stream(list(prompts), candidates, seed=seed):
        values = examiner.examine(group[0].prompt_index, np.stack([sample.image_HW3 for sample in group]))
        for name in (name for name in DRAWN if name in values):
            found.setdefault(name, []).append(float(np.mean(values[name])))
            found.setdefault(f"{name}_reranked", []).append(values[name][0])
    x_N3HW = to_tensor(image_NHW3).to(pipeline.gpt.device)
    found["psnr"] = psnr(pipeline.vq.decode(pipeline.vq.encode(x_N3HW)).clamp(-1, 1), x_N3HW).tolist()
    return {name: bootstrap_mean(np.array(values)) for name, values in found.items()}


def record_gate(
    folder: Path, pipeline: TextToImage, split: Split | None, *, n_prompts: int, candidates: int, command: str
) -> Gate:
    """Measure a pipeline and write what it reached beside its weights.

    A figure of what is drawn may fall by its standard error over prompts, or by _LEAST_FALL where that is more.
    """
    asked, image_NHW3 = gate_material(pipeline, split, n_prompts)
    prompts = tuple(prompt.text for prompt in asked)
    estimates = measure_gate(pipeline, prompts, candidates, 0, image_NHW3)
    figures = {}
    for name, found in estimates.items():
        least, error = _LEAST_FALL.get(name.removesuffix("_reranked"), 0.0), (found.high - found.low) / 4
        tolerance = _PSNR_FALL if name == "psnr" else max(least, error)
        figures[name] = Figure(value=round(found.value, 4), tolerance=round(tolerance, 4))
    gate = Gate(command=command, candidates=candidates, seed=0, figures=figures, prompts=prompts)
    rows = [np.concatenate(list(row), axis=1) for row in _in_rows(image_NHW3)]
    write_atomic(folder / PICTURES, png_bytes(Image.fromarray(np.concatenate(rows))))
    write_json(folder / GATE, gate.model_dump(mode="json"))
    return gate


def read_gate(folder: Path, size_px: int) -> tuple[Gate, np.ndarray]:
    """The gate beside a pipeline's weights and its pictures, uint8 (N, size_px, size_px, 3).

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        gate = build_config(Gate, json.loads((folder / GATE).read_text(encoding="utf-8")), str(folder / GATE))
        with Image.open(folder / PICTURES) as image:
            sheet = np.array(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{folder}: its gate cannot be read ({error}); tools/gate.py --record writes it") from None
    except (ValueError, ConfigError) as error:
        raise DataError(f"{folder / GATE}: damaged ({error}); record it again") from None
    tiles = sheet.reshape(sheet.shape[0] // size_px, size_px, -1, size_px, 3).swapaxes(1, 2)
    return gate, tiles.reshape(-1, size_px, size_px, 3)


def check_gate(pipeline: TextToImage, folder: Path) -> dict[str, tuple[float, Figure]]:
    """What the pipeline reaches now beside what is recorded in its folder, by name."""
    gate, image_NHW3 = read_gate(folder, pipeline.vq.config.image_size_px)
    found = measure_gate(pipeline, gate.prompts, gate.candidates, gate.seed, image_NHW3)
    return {name: (found[name].value, figure) for name, figure in gate.figures.items()}


def _in_rows(image_NHW3: np.ndarray) -> Iterator[np.ndarray]:
    whole = len(image_NHW3) // PER_ROW * PER_ROW or len(image_NHW3)
    return (image_NHW3[start : start + PER_ROW] for start in range(0, whole, PER_ROW))
