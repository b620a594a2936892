"""What a run writes while it trains: progress, pictures, checkpoints, exports."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image

from vqt2i.data.images import to_uint8
from vqt2i.files import PARTIAL_PREFIX
from vqt2i.runtime import say
from vqt2i.training.strategy import is_sharded, whole_parameters


class StepReport(L.Callback):
    """A line every few seconds: step, losses, samples per second, time left."""

    def __init__(self, batch_size: int, every_seconds: float = 15.0) -> None:
        self.batch_size, self.every_seconds = batch_size, every_seconds

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start_seconds = self.last_seconds = time.monotonic()
        self.first_step = self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        if now - self.last_seconds < self.every_seconds and step != trainer.max_steps:
            return
        rate = (step - self.last_step) / max(now - self.last_seconds, 1e-9)
        left = round((trainer.max_steps - step) * (now - self.start_seconds) / max(step - self.first_step, 1))
        losses = [f"{k.removeprefix('train/')} {v:.3g}" for k, v in trainer.callback_metrics.items() if "train/" in k]
        say(f"step {step:,}/{trainer.max_steps:,}  {'  '.join(losses)}  "
            f"{rate * self.batch_size:,.0f} samples/s  {left // 60}:{left % 60:02} left")  # fmt: skip
        self.last_seconds, self.last_step = now, step

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            values = [f"{k.removeprefix('val/')} {v:.4g}" for k, v in trainer.callback_metrics.items() if "val/" in k]
            say(f"validation at step {trainer.global_step:,}:  " + "  ".join(values))


class Outputs(L.Callback):
    """At each validation and at the end: a checkpoint, a picture, and the newest export under `model/`.

    The checkpoint before it is removed once the new one is whole.
    """

    def __init__(self, folder: Path, export: Callable[[Path, dict[str, Any]], None]) -> None:
        self.folder, self.export = folder, export

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # each process looked for a free name by itself; the first one's counts
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # a run that had come to its end goes on if it is given more steps
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = checkpoint["global_step"] >= trainer.max_steps

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        path = self.folder / "checkpoints" / f"step-{step:08d}.ckpt"
        partial = path.with_name(PARTIAL_PREFIX + path.name)
        trainer.save_checkpoint(partial)  # every rank takes part, and waits for the others
        if trainer.is_global_zero:
            os.replace(partial, path)
            remove_older_checkpoints(self.folder / "checkpoints")
        metrics = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        with whole_parameters(module):
            if trainer.is_global_zero:
                self.export(self.folder / "model", {"steps": step, "metrics": metrics})
        save_picture(self.folder / "samples" / f"step-{step:08d}.png", module, trainer)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first (DeepSpeed's are folders)."""
    return sorted(folder.glob("step-*.ckpt"))


def remove_older_checkpoints(folder: Path) -> None:
    import shutil

    for path in checkpoints_in(folder)[:-1]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@torch.no_grad()
def save_picture(path: Path, module: L.LightningModule, trainer: L.Trainer) -> None:
    """What the module makes of the first validation batch, for stages that make pictures."""
    make = getattr(module, "sample_images", None)
    if make is None or not (trainer.is_global_zero or is_sharded(module)):
        return
    batch = next(iter(trainer.datamodule.val_dataloader()))
    if is_sharded(module):
        batch = trainer.strategy.broadcast(batch)  # all ranks draw the same picture, for each holds a part of the model
    picture = make(module.transfer_batch_to_device(batch, module.device, 0))
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(picture)).save(path)
