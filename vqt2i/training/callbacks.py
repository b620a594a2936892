"""What a run writes while it trains: pictures, checkpoints, exports."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from vqt2i.data.images import to_uint8
from vqt2i.errors import CheckpointError
from vqt2i.files import write_json
from vqt2i.processes import Stopped
from vqt2i.runtime import say
from vqt2i.training.checkpoints import (
    checkpoint_path,
    disk_errors,
    remove_old_checkpoints,
    remove_partial_files,
    save_checkpoint,
)
from vqt2i.training.guard import StepGuard
from vqt2i.training.start import Start, is_exported
from vqt2i.training.strategy import is_sharded, whole_parameters
from vqt2i.training.views import View


class Outputs(L.Callback):
    """Checkpoints, each followed by the newest export under `model/`, and a picture at each validation.

    Checkpoints are written every `every_steps` steps and at the end (None: with each validation), and where the guard
    says that the run is to stop. The newest `keep_last` stay, and the one whose validation gave the least `best_by`:
    `checkpoints/best.json` names it.
    """

    def __init__(
        self, start: Start, export: Callable[[Path, dict[str, Any]], None], guard: StepGuard, *,
        every_steps: int | None, keep_last: int, best_by: str, views: Sequence[View],
    ) -> None:  # fmt: skip
        self.start, self.export, self.guard = start, export, guard
        self.every_steps, self.keep_last, self.best_by = every_steps, keep_last, best_by
        self.views = views
        self.best: tuple[int, float] | None = None  # step and value
        self._between_steps = False

    @property
    def folder(self) -> Path:
        return self.start.folder

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # each process looked for a free name by itself; the first one's counts
        first = trainer.strategy.broadcast(self.start)
        if first.checkpoint != self.start.checkpoint:
            raise CheckpointError(f"rank {trainer.global_rank} would go on from {self.start.checkpoint}, rank 0 from "
                                  f"{first.checkpoint}: start again")  # fmt: skip
        self.start = first
        if trainer.is_global_zero:
            remove_partial_files(self.folder)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._between_steps:  # Lightning has begun to count the next batch
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # a run that had come to its end goes on if it is given more steps
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = checkpoint["global_step"] >= trainer.max_steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._written = self._begun = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, i: int) -> None:
        step = trainer.global_step
        if step == self._begun:  # between the batches of one step, or at the very start
            return
        self._begun = step
        due = self.every_steps is not None and step % self.every_steps == 0
        if (due or self.guard.stopping) and step != self._written:
            self._between_steps = True
            self._write(trainer, module, {})
            self._between_steps = False
        if self.guard.stopping:
            trainer.strategy.barrier()  # the first rank has written the export
            say(f"stopped at step {step:,}; --resume goes on with {self.folder}")
            raise Stopped

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if self.every_steps is None or step % self.every_steps == 0 or step == trainer.max_steps:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self._write(trainer, module, metrics)
        with isolate_rng(), disk_errors(self.folder):
            picture = draw_picture(module, trainer)
            if picture is not None:
                path = self.folder / "samples" / f"step-{step:08d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                for view in self.views:
                    view.log_picture(picture, step - 1)  # beside the metrics of this update, counted from 0

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # the run was killed between its last checkpoint and the export after it
        if not trainer.strategy.broadcast(is_exported(self.folder, trainer.global_step)):
            self._export(trainer, module, {})

    def _write(self, trainer: L.Trainer, module: L.LightningModule, metrics: dict[str, float]) -> None:
        """A checkpoint, then the export. `metrics`: of a validation at this step."""
        step = trainer.global_step
        self.guard.settle()
        with disk_errors(self.folder):
            for logger in trainer.loggers:
                logger.save()  # a resumed run keeps the rows before its checkpoint
        if metrics.get(self.best_by, math.inf) < (math.inf if self.best is None else self.best[1]):
            self.best = (step, metrics[self.best_by])
        save_checkpoint(trainer, checkpoint_path(self.folder, step))
        self._written = step
        if trainer.is_global_zero:
            with disk_errors(self.folder):
                if self.best is not None:
                    best = {"checkpoint": checkpoint_path(self.folder, self.best[0]).name, self.best_by: self.best[1]}
                    write_json(self.folder / "checkpoints" / "best.json", best)
                remove_old_checkpoints(self.folder, self.keep_last, None if self.best is None else self.best[0])
        self._export(trainer, module, metrics)

    def _export(self, trainer: L.Trainer, module: L.LightningModule, metrics: dict[str, float]) -> None:
        rounded = {name: round(value, 6) for name, value in metrics.items()}
        with whole_parameters(module), disk_errors(self.folder):
            if trainer.is_global_zero:
                self.export(self.folder / "model", {"steps": trainer.global_step, "metrics": rounded})


@torch.no_grad()
def draw_picture(module: L.LightningModule, trainer: L.Trainer) -> Image.Image | None:
    """What the module makes of the first validation batch: on the first rank, for stages that make pictures."""
    make = getattr(module, "sample_images", None)
    if make is None or not (trainer.is_global_zero or is_sharded(module)):
        return None
    batch = next(iter(trainer.datamodule.val_dataloader()))
    if is_sharded(module):
        batch = trainer.strategy.broadcast(batch)  # all ranks draw the same picture, for each holds a part of the model
    picture = make(module.transfer_batch_to_device(batch, module.device, 0))
    return Image.fromarray(to_uint8(picture)) if trainer.is_global_zero else None
