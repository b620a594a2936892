"""A training run: its folder, its Trainer, its data. The same for every stage."""

import logging
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from vqt2i.checkpoint import read_card, save_model
from vqt2i.config import Config
from vqt2i.data.build import ensure_default_dataset
from vqt2i.data.images import Variants
from vqt2i.data.shards import DataSet
from vqt2i.data.stream import StreamConfig
from vqt2i.errors import ConfigError
from vqt2i.files import write_json
from vqt2i.processes import from_first
from vqt2i.runtime import Precision, is_first_process, pick_device, say, step_bar
from vqt2i.training.batches import MixedSamples, SampleSource, training_loader, validation_loader
from vqt2i.training.callbacks import Outputs
from vqt2i.training.checkpoints import CheckpointFile, RandomStates
from vqt2i.training.compiled import EagerValidation
from vqt2i.training.guard import StepGuard
from vqt2i.training.launch import World, cluster_environment, find_world
from vqt2i.training.metrics import MetricsLogger
from vqt2i.training.start import Resume, Start, begin_run
from vqt2i.training.strategy import build_strategy
from vqt2i.training.throughput import StepReport
from vqt2i.training.views import ViewName, open_views, require_views

DEFAULT_DATASET = Path("data/shapes")
LIGHTNING_PRECISION: dict[Precision, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class AlsoConfig(Config):
    """A second data set to train on. share: of each batch, that comes from its `train_split`."""

    path: Path
    train_split: str = "train"
    share: float = Field(0.5, gt=0, lt=1)


class DataConfig(Config):
    """Where the pairs are.

    variants: pictures made of each for training, of which every visit draws one; "flip" and "ten-crop" mirror, so not
        for captions that tell left from right; "quarters" shows parts that no caption describes, for image tokenizers
        of two sizes. Validation sees the first, the centred square.
    also: a second data set, of which every batch has a share: in fine-tuning, what the model is not to forget.
    stream: to train on webdataset tars in passing, and on the data set in `path` only validate.
    """

    path: Path = DEFAULT_DATASET
    train_split: str = "train"
    validation_split: str = "val"
    variants: Variants = "centre"
    also: AlsoConfig | None = None
    stream: StreamConfig | None = None

    @model_validator(mode="after")
    def _validation_is_of_the_same_kind(self) -> "DataConfig":
        if self.stream and self.path == DEFAULT_DATASET:
            raise ValueError("a stream is for training; set path to a data set of the same kind to validate on")
        if self.stream and self.also:
            raise ValueError("also has its share of batches of a data set, not of a stream; leave one of them out")
        return self


class TrainerConfig(Config):
    """batch_size: samples per step over all devices. devices: over all nodes, a process each; null is as many as the
    launcher started (torchrun, deepspeed, srun), without one 1. precision "auto" is fp32 or bf16, whichever is faster
    here; fp16 (loss scaled) is for GPUs without bf16.

    accumulate: parts that a step's batch is read in, one after the other, where it does not fit the memory at once.
    validate_every_steps: also how often a picture is drawn. checkpoint_every_steps: how often a checkpoint and after it
        an export are written; null is with each validation. keep_last: checkpoints that stay, besides the best.
    log_every_steps: how often a row is added to metrics.csv. log_to: where else it goes, with throughput and pictures;
        "wandb" is configured by its environment variables (WANDB_MODE=offline, WANDB_PROJECT).
    max_nonfinite_steps: so many in a row whose loss or gradient is not finite end the run; each is skipped.
    rank_timeout_s: a rank that has waited so long for the others ends; longer than the first one takes for an export.
    """

    max_steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    accumulate: PositiveInt = 1
    seed: NonNegativeInt = 0
    devices: PositiveInt | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_clip: float | None = Field(1.0, gt=0)
    validate_every_steps: PositiveInt = 500
    n_validation_samples: PositiveInt = 512
    n_workers: NonNegativeInt = 0
    checkpoint_every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2
    log_every_steps: PositiveInt = 20
    log_to: tuple[ViewName, ...] = ("tensorboard",)
    max_nonfinite_steps: PositiveInt = 20
    rank_timeout_s: PositiveInt = 1800

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TrainerConfig":
        if self.validate_every_steps < self.max_steps and self.max_steps % self.validate_every_steps:
            raise ValueError(f"validate_every_steps ({self.validate_every_steps}) must divide max_steps "
                             f"({self.max_steps}), so that the last step is validated and exported")  # fmt: skip
        try:
            self.micro_batch_size(self.devices or 1)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def micro_batch_size(self, n_devices: int) -> int:
        """Samples that one device of so many reads at once.

        Raises:
            ConfigError: the batch cannot be dealt out evenly.
        """
        size, rest = divmod(self.batch_size, n_devices * self.accumulate)
        if rest:
            raise ConfigError(f"batch_size ({self.batch_size}) must be a multiple of devices ({n_devices}) times "
                              f"accumulate ({self.accumulate})")  # fmt: skip
        return size


def open_dataset(config: DataConfig) -> DataSet:
    """The data set of a run; the embedded default is made when it is asked for and not there yet."""
    return ensure_default_dataset(config.path) if config.path == DEFAULT_DATASET else DataSet.open(config.path)


def open_also(config: DataConfig) -> DataSet | None:
    """The second data set of a run, where there is one."""
    if config.also is None:
        return None
    return open_dataset(DataConfig(path=config.also.path))


class StageData(L.LightningDataModule):
    """Loaders that know their rank, and the step to go on from after a resume."""

    def __init__(
        self, train: SampleSource, validation: SampleSource, config: TrainerConfig, text_length: int | None
    ) -> None:
        super().__init__()
        if isinstance(train, MixedSamples):
            train.n_second(config.batch_size // config.accumulate)  # told here, before there is a run folder
        self.train, self.validation, self.config, self.text_length = train, validation, config, text_length

    def _ranks(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "n_ranks": self.trainer.world_size}

    def train_dataloader(self) -> Any:
        parts = self.config.accumulate  # a part is a step of the loader
        return training_loader(
            self.train, batch_size=self.config.batch_size // parts, n_steps=self.config.max_steps * parts,
            first_step=self.trainer.global_step * parts, seed=self.config.seed, text_length=self.text_length,
            n_workers=self.config.n_workers, **self._ranks(),
        )  # fmt: skip

    def val_dataloader(self) -> Any:
        return validation_loader(
            self.validation, batch_size=self.config.micro_batch_size(self.trainer.world_size),
            n_samples=self.config.n_validation_samples, text_length=self.text_length, **self._ranks(),
        )  # fmt: skip


def require_possible(module: L.LightningModule, config: TrainerConfig) -> None:
    """Check that the settings suit the stage and the processes that were started.

    Raises:
        ConfigError: they do not.
    """
    config.micro_batch_size(find_world(config.devices).size)
    if not module.automatic_optimization and (config.precision == "fp16" or config.accumulate > 1):
        raise ConfigError(f"trainer: {type(module).__name__} has two optimizers and trains with precision fp32 or bf16 "
                          f"and accumulate 1; found {config.precision} and {config.accumulate}")  # fmt: skip


def fit(
    module: L.LightningModule,
    data: StageData,
    *,
    run_config: Config,
    model_config: Config,
    card: dict[str, Any],
    runs: Path,
    name: str,
    resume: Resume,
    deepspeed: dict[str, Any] | None = None,
    find_unused_parameters: bool = False,
) -> Path:
    """Train to `max_steps` and return the run's folder, whose `model/` holds the export.

    Raises:
        ConfigError: what is to be resumed is another run. CheckpointError: it cannot be read, or there is no room.
        TrainingError: too many steps in a row that are not finite.
        Stopped: after a signal, with a checkpoint written.
    """
    config = data.config
    device = pick_device()
    require_possible(module, config)
    require_views(config.log_to)
    world, timeout = find_world(config.devices), timedelta(seconds=config.rank_timeout_s)
    start, precision = from_first(
        lambda: begin_run(runs, name, resume, run_config, card, device.type, n_devices=world.size, deepspeed=deepspeed),
        timeout,
    )
    if deepspeed is not None and is_first_process():
        write_json(start.folder / "deepspeed.json", deepspeed)  # before Lightning completes it
    begun_seconds = time.monotonic()
    _quiet_lightning()
    from_step = f" from step {start.step:,}" if start.checkpoint else ""
    say(f"training {name} into {start.folder}{from_step}: {config.max_steps:,} steps of {config.batch_size}, "
        f"{precision} on {world.size} x {device.type}, {sum(p.numel() for p in _trained(module)):,} "
        "parameters")  # fmt: skip
    views = open_views(config.log_to, start, run_config.model_dump(mode="json"))
    guard = StepGuard(start.folder, config.max_nonfinite_steps)
    outputs = Outputs(
        start, exporter(module, start, run_config, model_config, card), guard,
        every_steps=config.checkpoint_every_steps, keep_last=config.keep_last, best_by=module.best_by, views=views,
    )  # fmt: skip
    with step_bar(name, config.max_steps) as show:
        report = StepReport(config.batch_size // config.accumulate, precision, views, show)
        trainer = build_trainer(
            config, device, precision, world,
            strategy=build_strategy(
                device, world.size, deepspeed,
                checkpoint=start.checkpoint, find_unused_parameters=find_unused_parameters, timeout=timeout,
            ),
            plugins=trainer_plugins(world, deepspeed),
            logger=[MetricsLogger(start.folder), *views],
            callbacks=[report, RandomStates(), guard, outputs, EagerValidation()],
            gradient_clip_val=config.gradient_clip if module.automatic_optimization else None,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
    say(f"done in {time.monotonic() - begun_seconds:.0f} s: {outputs.folder / 'model'}")
    return outputs.folder


def exporter(
    module: L.LightningModule, start: Start, run_config: Config, model_config: Config, card: dict[str, Any]
) -> Callable[[Path, dict[str, Any]], None]:
    """A function that writes the model to a folder, with more facts for its card."""
    begun_seconds = time.monotonic()
    model = start.folder / "model"
    # a resumed run's card keeps how it came so far
    earlier = _card_parts(read_card(model)) if start.checkpoint and model.is_dir() else []

    def export(path: Path, facts: dict[str, Any]) -> None:
        command = " ".join(["python", *sys.argv])
        facts = {**card, "command": command, **facts, "seconds": round(time.monotonic() - begun_seconds, 1)}
        facts["config"] = run_config.model_dump(mode="json")  # the command may name a file that changes later
        facts |= {"resumed_from": earlier} if earlier else {}
        save_model(path, module.export_model(), model_config, facts)
        if beside := getattr(module, "export_beside", None):
            beside(start.folder, facts)

    return export


def build_trainer(
    config: TrainerConfig, device: torch.device, precision: Precision, world: World, **parts: Any
) -> L.Trainer:
    """A Trainer as the settings say. `parts`: those of its arguments that depend on the run."""
    return L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=world.devices_per_node,
        num_nodes=world.n_nodes,
        precision=LIGHTNING_PRECISION[precision],
        accumulate_grad_batches=config.accumulate,
        max_steps=config.max_steps,
        max_epochs=1,
        val_check_interval=min(config.validate_every_steps, config.max_steps) * config.accumulate,
        log_every_n_steps=config.log_every_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **parts,
    )


def _quiet_lightning() -> None:
    """Hide Lightning's advertisements and advice that does not apply to us; its real warnings stay."""
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*`srun` command is available.*",
        ".*LeafSpec.*",
        "You're resuming from a checkpoint that ended before the epoch.*",  # our batches follow from the step alone
    ):
        warnings.filterwarnings("ignore", message=message)


def trainer_plugins(world: World, deepspeed: dict[str, Any] | None) -> list[Any]:
    """How the ranks are known, and checkpoints written (DeepSpeed writes its own)."""
    return [cluster_environment(world), *([] if deepspeed is not None else [CheckpointFile()])]


def _card_parts(card: dict[str, Any]) -> list[dict[str, Any]]:
    return [*card.get("resumed_from", []), {key: card[key] for key in ("command", "steps", "seconds")}]


def _trained(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def stage_card(kind: str, dataset: DataSet, config: DataConfig, **facts: Any) -> dict[str, Any]:
    """The start of a model card: what the model is and what it was trained on, which `open_dataset` gave."""
    also = open_also(config)
    sets = {"data": dataset} | ({"also": also} if also else {})
    named = {name: {"path": str(found.folder), "fingerprint": found.fingerprint} for name, found in sets.items()}
    return {"kind": kind, **named, **facts}
