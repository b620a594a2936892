"""Fitting a colour palette, the image tokenizer of pixels: in seconds, in one go, with a run folder as other stages."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt, model_validator

from vqt2i.checkpoint import save_model
from vqt2i.config import Config, apply_overrides, load_config, read_yaml_mapping, save_config
from vqt2i.data.images import fit_square, png_bytes, to_tensor, to_uint8
from vqt2i.data.shards import Split
from vqt2i.errors import ConfigError
from vqt2i.files import write_atomic
from vqt2i.runtime import is_first_process, progress, say
from vqt2i.training.record import RunRecord, describe_start, write_record
from vqt2i.training.run import DataConfig, open_dataset, stage_card
from vqt2i.training.start import Resume, new_run_folder
from vqt2i.training.vqgan import VQGANRunConfig
from vqt2i.vq.metrics import CodebookCounter, psnr
from vqt2i.vq.palette import PaletteConfig, PaletteTokenizer, fit_colours

SHOWN = 16  # validation images in the picture
_AT_ONCE = 256


class PaletteFitConfig(Config):
    """n_images: of the training split, drawn evenly, whose pixels are clustered (fewer where it has fewer).

    most_rounds: of k-means, which ends before where no colour moves any more.
    """

    n_images: PositiveInt = 4096
    most_rounds: PositiveInt = 50
    n_validation_samples: PositiveInt = 512
    seed: NonNegativeInt = 0


class PaletteRunConfig(Config):
    """`configs/vqgan/NAME.yaml` whose `model` is of kind palette."""

    name: str = "palette"
    data: DataConfig = DataConfig()
    model: PaletteConfig = PaletteConfig()
    fit: PaletteFitConfig = PaletteFitConfig()

    @model_validator(mode="after")
    def _images_are_plain_and_at_hand(self) -> "PaletteRunConfig":
        if self.data.stream or self.data.also or self.data.variants != "centre":
            raise ValueError("a palette is fitted to the plain images of a data set; leave out data.stream, data.also "
                             "and data.variants")  # fmt: skip
        return self


def load_tokenizer_run(path: Path | None, overrides: list[str] = ()) -> VQGANRunConfig | PaletteRunConfig:
    """The configuration of an image tokenizer's run, of the kind that its `model` says.

    Raises:
        ConfigError: as `load_config`.
    """
    values = apply_overrides(read_yaml_mapping(path) if path else {}, list(overrides))
    model = values.get("model")
    is_palette = isinstance(model, dict) and model.get("kind") == "palette"
    return load_config(PaletteRunConfig if is_palette else VQGANRunConfig, path, overrides)


def train_palette(config: PaletteRunConfig, runs: Path, *, resume: Resume) -> Path:
    """Fit as configured and return the run's folder. It takes one process: others return at once.

    Raises:
        ConfigError: a run or checkpoint to resume. DataError: a split that is not there, or too few different colours.
    """
    if isinstance(resume, Path):
        raise ConfigError(f"--resume {resume}: a palette is fitted in one go and has no checkpoints; leave it out")
    folder = new_run_folder(runs, config.name)
    if not is_first_process():
        return folder
    begun_seconds = time.monotonic()
    dataset = open_dataset(config.data)
    train, validation = dataset.split(config.data.train_split), dataset.split(config.data.validation_split)
    size_px, fit = config.model.image_size_px, config.fit
    chosen = np.random.default_rng(fit.seed).permutation(len(train))[: fit.n_images]
    pixel_N3 = _read(train, np.sort(chosen), size_px, "reading").reshape(-1, 3)
    palette = PaletteTokenizer(config.model).eval()
    palette.colours_K3.copy_(fit_colours(pixel_N3, config.model.n_colours, fit.seed, fit.most_rounds))
    image_B3HW = to_tensor(_read(validation, np.arange(min(fit.n_validation_samples, len(validation))), size_px))
    metrics = measure(palette, image_B3HW)

    save_config(config, folder / "config.yaml")
    card = stage_card("palette", dataset, config.data)
    fingerprints = {"data": dataset.fingerprint}
    record = RunRecord(kind="palette", fingerprints=fingerprints, precision="fp32", starts=(describe_start(0, 1),))
    write_record(folder, record)
    shown = image_B3HW[:SHOWN]
    rows = rearrange([shown, palette.decode(palette.encode(shown))], "row b c h w -> c (row h) (b w)")
    write_atomic(folder / "samples" / "reconstructions.png", png_bytes(Image.fromarray(to_uint8(rows))))
    facts: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "metrics": metrics,
        "seconds": round(time.monotonic() - begun_seconds, 1), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    save_model(folder / "model", palette, config.model, card | facts)
    say(f"{folder / 'model'}: {config.model.n_colours:,} colours from {len(chosen):,} images of {size_px} px, "
        f"{facts['seconds']:.0f} s; on {len(image_B3HW):,} others {metrics['val/psnr']:.1f} dB, "
        f"{metrics['val/usage']:.0%} of the colours in use")  # fmt: skip
    return folder


@torch.no_grad()
def measure(palette: PaletteTokenizer, image_B3HW: torch.Tensor) -> dict[str, float]:
    """What the run of a trained image tokenizer says of validation images, as far as a palette has it."""
    codes, decibels = CodebookCounter(palette.config.vocab_size), []
    for part in image_B3HW.split(_AT_ONCE):
        ids = palette.encode(part)
        codes.update(ids)
        decibels.append(psnr(palette.decode(ids), part))
    seen = codes.compute()
    values = {"psnr": float(torch.cat(decibels).mean()), "usage": seen.usage, "perplexity": seen.perplexity}
    return {f"val/{name}": round(value, 6) for name, value in values.items()}


def _read(split: Split, index: np.ndarray, size_px: int, label: str = "validating") -> np.ndarray:
    """uint8 (samples, size_px, size_px, 3)."""
    watched = progress(index.tolist(), label, unit="images")
    return np.stack([fit_square(split[i].image_HW3, size_px) for i in watched])
