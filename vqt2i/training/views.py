"""Where a run can be looked at while it goes: TensorBoard, and Weights & Biases if it is asked for.

Both show the rows of metrics.csv, throughput and sample pictures; a step counts from 0, as there. The run itself needs
neither.
"""

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from vqt2i.errors import ConfigError
from vqt2i.runtime import is_first_process
from vqt2i.training.checkpoints import disk_errors
from vqt2i.training.record import read_record
from vqt2i.training.start import Start

ViewName = Literal["tensorboard", "wandb"]


class TensorBoardView(TensorBoardLogger):
    """Event files in `RUN/tensorboard`. What an earlier start wrote of `first_step` and later steps is not shown."""

    def __init__(self, run: Path, first_step: int) -> None:
        purged = {"purge_step": first_step} if first_step else {}
        super().__init__(run, name="", version="tensorboard", default_hp_metric=False, **purged)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with disk_errors(Path(self.log_dir)):
            for name, value in metrics.items():
                self.experiment.add_scalar(name, value, step)

    def log_picture(self, picture: Image.Image, step: int) -> None:
        with disk_errors(Path(self.log_dir)):
            self.experiment.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def save(self) -> None:
        """Write what waits. (Lightning would add an empty file of hyperparameters.)"""
        with disk_errors(Path(self.log_dir)):
            self.experiment.flush()

    def finalize(self, status: str) -> None:
        with contextlib.suppress(OSError):  # told by `save`, before; here it would hide what ended the run
            self.experiment.close()


class WandbView(WandbLogger):
    """A run of Weights & Biases, called as its folder. The environment (WANDB_MODE, WANDB_PROJECT, ...) says where.

    Its id follows from the run's first start, so that a resumed run goes on there. Steps after the checkpoint that a
    run goes on from stay there twice.
    """

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", "vqt2i")
        super().__init__(name=run.name, project=project, save_dir=run, id=_wandb_id(run), config=config)

    def log_picture(self, picture: Image.Image, step: int) -> None:
        self.log_image("samples", [picture], step)


View = TensorBoardView | WandbView


def require_views(names: Sequence[ViewName]) -> None:
    """Raises ConfigError where what a view needs is not installed."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ConfigError("trainer.log_to: wandb is not installed; pip install 'vqt2i[wandb]', or leave it out")


def open_views(names: Sequence[ViewName], start: Start, config: dict[str, Any]) -> list[View]:
    """The views of a run, on the first process; the others have none.

    Raises:
        ConfigError: Weights & Biases does not let us in.
    """
    if not is_first_process():
        return []
    views: list[View] = []
    if "tensorboard" in names:
        views.append(TensorBoardView(start.folder, start.step))
    if "wandb" in names:
        view = WandbView(start.folder, config)
        from wandb.errors import Error

        try:
            _ = view.experiment  # which is when it asks the server
        except Error as error:
            raise ConfigError(f"trainer.log_to: wandb: {error}; "
                              "try `wandb login`, WANDB_MODE=offline, or leave it out") from None  # fmt: skip
        views.append(view)
    return views


def _wandb_id(run: Path) -> str:
    first = read_record(run).starts[0].model_dump_json()
    return hashlib.blake2b(f"{run.name} {first}".encode(), digest_size=6).hexdigest()
