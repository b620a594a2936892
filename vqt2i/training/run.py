"""A training run: its folder, its Trainer, its data. The same for every stage."""

import logging
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from vqt2i.checkpoint import CONFIG, read_card, save_model
from vqt2i.config import Config, load_config, save_config
from vqt2i.data.build import ensure_default_dataset
from vqt2i.data.images import Variants
from vqt2i.data.shards import DataSet
from vqt2i.data.stream import StreamConfig
from vqt2i.errors import ConfigError
from vqt2i.runtime import fastest_precision, is_first_process, pick_device, say
from vqt2i.training.batches import SampleSource, training_loader, validation_loader
from vqt2i.training.callbacks import Outputs, StepReport, checkpoints_in
from vqt2i.training.compiled import EagerValidation
from vqt2i.training.strategy import build_strategy

DEFAULT_DATASET = Path("data/shapes")


class DataConfig(Config):
    """Where the pairs are.

    variants: pictures made of each for training, of which every visit draws one; "flip" and "ten-crop" mirror, so not
        for captions that tell left from right. Validation sees the first, the centred square.
    stream: to train on webdataset tars in passing, and on the data set in `path` only validate.
    """

    path: Path = DEFAULT_DATASET
    train_split: str = "train"
    validation_split: str = "val"
    variants: Variants = "centre"
    stream: StreamConfig | None = None

    @model_validator(mode="after")
    def _validation_is_of_the_same_kind(self) -> "DataConfig":
        if self.stream and self.path == DEFAULT_DATASET:
            raise ValueError("a stream is for training; set path to a data set of the same kind to validate on")
        return self


class TrainerConfig(Config):
    """batch_size: samples per step over all devices. precision "auto" is whichever is faster here.

    validate_every_steps: also how often a checkpoint, an export and a picture are written.
    """

    max_steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    devices: PositiveInt = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_clip: float | None = Field(1.0, gt=0)
    validate_every_steps: PositiveInt = 500
    n_validation_samples: PositiveInt = 512
    n_workers: NonNegativeInt = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TrainerConfig":
        if self.validate_every_steps < self.max_steps and self.max_steps % self.validate_every_steps:
            raise ValueError(f"validate_every_steps ({self.validate_every_steps}) must divide max_steps "
                             f"({self.max_steps}), so that the last step is validated and exported")  # fmt: skip
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of devices ({self.devices})")
        return self


def open_dataset(config: DataConfig) -> DataSet:
    """The data set of a run; the embedded default is made when it is asked for and not there yet."""
    return ensure_default_dataset(config.path) if config.path == DEFAULT_DATASET else DataSet.open(config.path)


class StageData(L.LightningDataModule):
    """Loaders that know their rank, and the step to go on from after a resume."""

    def __init__(
        self, train: SampleSource, validation: SampleSource, config: TrainerConfig, text_length: int | None
    ) -> None:
        super().__init__()
        self.train, self.validation, self.config, self.text_length = train, validation, config, text_length

    def _ranks(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "n_ranks": self.trainer.world_size}

    def train_dataloader(self) -> Any:
        return training_loader(
            self.train, batch_size=self.config.batch_size, n_steps=self.config.max_steps, seed=self.config.seed,
            first_step=self.trainer.global_step, text_length=self.text_length, n_workers=self.config.n_workers,
            **self._ranks(),
        )  # fmt: skip

    def val_dataloader(self) -> Any:
        per_rank = self.config.batch_size // self.trainer.world_size
        return validation_loader(
            self.validation, batch_size=per_rank, n_samples=self.config.n_validation_samples,
            text_length=self.text_length, **self._ranks(),
        )  # fmt: skip


def new_run_folder(runs: Path, name: str) -> Path:
    """`runs/NAME`, or `runs/NAME-2`, ... if that is taken: no run overwrites another."""
    folder, count = runs / name, 1
    while folder.exists():
        count += 1
        folder = runs / f"{name}-{count}"
    return folder


def newest_run_folder(runs: Path, name: str) -> Path:
    """The newest run called NAME that has a checkpoint.

    Raises:
        ConfigError: there is none.
    """
    called = re.compile(rf"{re.escape(name)}(-\d+)?")  # as `new_run_folder` names them
    folders = [f for f in runs.glob("*") if called.fullmatch(f.name) and checkpoints_in(f / "checkpoints")]
    if not folders:
        raise ConfigError(f"{runs / name}: no run with a checkpoint to resume; start one without --resume")
    return max(folders, key=lambda f: checkpoints_in(f / "checkpoints")[-1].stat().st_mtime)


def require_same_model(run_folder: Path, config: Config) -> None:
    """Check that a run is resumed as the model that it trains, on ids of the same tokenizers.

    Raises:
        ConfigError: it is another one; the first difference is named.
    """
    path = run_folder / "model" / CONFIG
    if not path.is_file():  # interrupted before the first export
        return
    trained, given = (c.model_dump(mode="json") for c in (load_config(type(config), path), config))
    for key in given:
        if trained[key] != given[key]:
            other = f"its model has {key} {trained[key]}, this one {given[key]}"
            start = f"--config {run_folder / 'config.yaml'} and the tokenizers it was started with"
            raise ConfigError(f"{run_folder}: {other}; resume with {start}")


def fit(
    module: L.LightningModule,
    data: StageData,
    *,
    run_config: Config,
    model_config: Config,
    card: dict[str, Any],
    runs: Path,
    name: str,
    resume: bool,
    deepspeed: dict[str, Any] | None = None,
    find_unused_parameters: bool = False,
) -> Path:
    """Train to `max_steps` and return the run's folder, whose `model/` holds the export.

    Raises:
        ConfigError: nothing to resume, or a run of another model.
    """
    config = data.config
    folder = newest_run_folder(runs, name) if resume else new_run_folder(runs, name)
    if resume:
        require_same_model(folder, model_config)
    if is_first_process():
        save_config(run_config, folder / "config.yaml")
    device = pick_device()
    precision = fastest_precision(device.type) if config.precision == "auto" else config.precision
    start = time.monotonic()

    # a resumed run's card keeps how it came so far
    earlier = _card_parts(read_card(folder / "model")) if resume and (folder / "model").is_dir() else []

    def export(path: Path, facts: dict[str, Any]) -> None:
        command = " ".join(["python", *sys.argv])
        facts = {**card, "command": command, **facts, "seconds": round(time.monotonic() - start, 1)}
        facts["config"] = run_config.model_dump(mode="json")  # the command may name a file that changes later
        save_model(path, module.export_model(), model_config, facts | ({"resumed_from": earlier} if earlier else {}))

    # Lightning's advertisements and advice that does not apply to us; its real warnings stay
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        "You're resuming from a checkpoint that ended before the epoch.*",  # our batches follow from the step alone
    ):
        warnings.filterwarnings("ignore", message=message)
    say(f"training {name} into {folder}: {config.max_steps:,} steps of {config.batch_size}, {precision} on "
        f"{config.devices} x {device.type}, {sum(p.numel() for p in _trained(module)):,} parameters")  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=config.devices,
        strategy=build_strategy(device, config.devices, deepspeed, find_unused_parameters=find_unused_parameters),
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=config.max_steps,
        max_epochs=1,
        val_check_interval=min(config.validate_every_steps, config.max_steps),
        gradient_clip_val=config.gradient_clip if module.automatic_optimization else None,
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        callbacks=[StepReport(config.batch_size), Outputs(folder, export), EagerValidation()],
        log_every_n_steps=20,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    checkpoint = checkpoints_in(folder / "checkpoints")[-1] if resume else None
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    say(f"done in {time.monotonic() - start:.0f} s: {folder / 'model'}")
    return folder


def _card_parts(card: dict[str, Any]) -> list[dict[str, Any]]:
    return [*card.get("resumed_from", []), {key: card[key] for key in ("command", "steps", "seconds")}]


def _trained(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def stage_card(kind: str, dataset: DataSet, **facts: Any) -> dict[str, Any]:
    """The start of a model card: what the model is and what it was trained on."""
    return {"kind": kind, "data": {"path": str(dataset.folder), "fingerprint": dataset.fingerprint}, **facts}
