"""Checkpoints of a run: written whole or not at all, checked before a run goes on from one, old ones removed.

`RUN/checkpoints/step-00000500.ckpt` is the state after step 500: a file, or with DeepSpeed a folder with files of each
rank. `aside-step-...` are those that no run goes on from: damaged, or later than the one that was gone on from.
"""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.serialization import get_unsafe_globals_in_checkpoint

from vqt2i.errors import CheckpointError
from vqt2i.files import PARTIAL_PREFIX, write_json
from vqt2i.runtime import say
from vqt2i.training.deepspeed_checkpoint import GLOBALS

FILES = "files.json"  # in a folder: what belongs to it, by name and size


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.ckpt"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it and executes nothing.

    torch.save writes zip files with checksums, which torch.load does not compare.
    """
    parts = [checkpoint]
    if checkpoint.is_dir():
        try:
            sizes = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{FILES}: {error}"
        for name, size in sizes.items():
            if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != size:
                return f"{name} is missing or cut short"
        parts = [checkpoint / name for name in sizes if name.endswith(".pt")]
    for part in parts:
        try:
            with zipfile.ZipFile(part) as archive:
                bad = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            return f"{part.name}: {error}"
        if bad is not None:
            return f"{part.name}: {bad} does not have its checksum"
        foreign = set(get_unsafe_globals_in_checkpoint(part)) - set(GLOBALS)
        if foreign:
            return f"{part.name}: loading it would execute {', '.join(sorted(foreign))}"
    return None


def set_aside(checkpoint: Path, why: str) -> None:
    """Rename a checkpoint so that no run goes on from it, and say so. A user may remove it."""
    aside = checkpoint.with_name(f"aside-{checkpoint.name}")
    _remove(aside)
    os.replace(checkpoint, aside)
    say(f"{checkpoint}: {why}; set aside as {aside.name}")


def remove_old_checkpoints(run: Path, keep_last: int, best_step: int | None) -> None:
    """Keep the newest ones and the best."""
    for path in checkpoints_in(run)[:-keep_last]:
        if step_of(path) != best_step:
            _remove(path)


def remove_partial_files(run: Path) -> None:
    """What a process that was killed while it wrote has left."""
    for folder in (run, run / "checkpoints"):
        for path in folder.glob(f"{PARTIAL_PREFIX}*"):
            _remove(path)


@contextmanager
def disk_errors(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an OSError, and errors of `kinds`, into a CheckpointError that says how much room is left."""
    try:
        yield
    except (OSError, *kinds) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise CheckpointError(
            f"{path}: cannot be written: {error} ({free:,.0f} MiB free); the checkpoints before it are whole: "
            "make room and go on with --resume"
        ) from error


class CheckpointFile(TorchCheckpointIO):
    """Streams to disk where Lightning's own holds a second copy in memory and passes it through the system's /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


def save_checkpoint(trainer: L.Trainer, path: Path) -> None:
    """Write the trainer's state to `path`, atomically; every rank calls it, and all know how it ended.

    Raises:
        CheckpointError: it cannot be written; nothing of it is left, and the older checkpoints are.
    """
    partial = path.with_name(PARTIAL_PREFIX + path.name)
    failure = None
    try:
        with disk_errors(path, RuntimeError):  # which is how PyTorch tells of a full disk
            path.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(partial)  # every rank takes part, and waits for the others
            if trainer.is_global_zero:
                _sync(partial)
                os.replace(partial, path)
                _sync_folder(path.parent)
    except CheckpointError as error:
        failure = error
        if trainer.is_global_zero:
            _remove(partial)
        if isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.world_size > 1:
            raise  # the others wait for this rank inside DeepSpeed, and end when it does
        trainer.strategy.barrier()  # where the others wait
    told = trainer.strategy.broadcast(None if failure is None else str(failure))
    if told is not None:
        raise failure or CheckpointError(told)


def _sync(partial: Path) -> None:
    """Bring all of a checkpoint to the disk, before the name says that it is whole."""
    if partial.is_dir():
        files = [path for path in partial.rglob("*") if path.is_file()]
        write_json(partial / FILES, {str(path.relative_to(partial)): path.stat().st_size for path in files})
        for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            _sync_folder(folder)
    else:
        files = [partial]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RandomStates(L.Callback):
    """Puts the random states of every rank into the checkpoint: dropout goes on as if nothing had happened.

    A run resumed by another number of ranks draws anew.
    """

    def __init__(self) -> None:
        self.restored: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = [random_state(module.device)]
        if trainer.world_size > 1:
            states *= trainer.world_size
            dist.all_gather_object(states, random_state(module.device))
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint["random_states"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # not when it is loaded: setting up the data draws numbers too
        if self.restored is None:
            return
        if len(self.restored) == trainer.world_size:
            set_random_state(self.restored[trainer.global_rank], module.device)
        else:
            say(f"{len(self.restored)} ranks before, {trainer.world_size} now: random streams (dropout) start anew")


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and `device`, in types that torch.load reads without executing anything."""
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (keys.tolist(), position, has_gauss, cached_gaussian),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])
