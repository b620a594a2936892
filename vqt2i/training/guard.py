"""What every step is watched for: a signal to stop, and a loss that is not finite. All ranks see it at the same step.

Neither costs a wait for the GPU: two flags on the device are reduced over the ranks before the backward pass, the
optimizer's own kernel skips the update where the first is set, and the host reads them when the step after has been
queued.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.utils import get_total_norm

from vqt2i.errors import UserError
from vqt2i.files import write_atomic
from vqt2i.runtime import is_first_process, say
from vqt2i.training.optim import GUARDED

MAX_SAVED_BATCHES = 10


class TrainingError(UserError):
    """A training that cannot go on with the settings that it was given."""


class _Watched(NamedTuple):
    """A step whose flags (not finite, stop) are on their way to the host."""

    step: int
    flags: Tensor
    copied: Any
    batch: Any


class StepGuard(L.Callback):
    """Skips updates from a loss or gradient that is not finite, counts them, saves their batches; notices signals.

    A skipped step leaves weights, optimizer and buffers (codebooks) as they were; the step counter, the schedule, the
    data and a moving average of the weights move on. DeepSpeed skips by its own check of the gradients. SIGTERM and the
    first SIGINT set `stopping` once every rank knows; a second SIGINT kills the process at once.
    """

    def __init__(self, folder: Path, max_nonfinite_steps: int) -> None:
        self.folder, self.max_nonfinite_steps = folder, max_nonfinite_steps
        self.stopping = False
        self.n_skipped = self.n_in_a_row = 0
        self._signal: int | None = None
        self._pending: deque[_Watched] = deque()

    def state_dict(self) -> dict[str, Any]:
        return {"n_skipped": self.n_skipped, "n_in_a_row": self.n_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.n_skipped, self.n_in_a_row = state_dict["n_skipped"], state_dict["n_in_a_row"]

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # as in Outputs

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._flags = torch.zeros(2, device=module.device)
        self._not_finite, self._stop = self._flags.unbind()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, GUARDED):
                optimizer.found_inf = self._not_finite  # read by its kernel, on the device
        parameters = {id(p) for p in module.parameters()}
        self._buffers = [b for b in module.state_dict(keep_vars=True).values() if id(b) not in parameters]
        self._saved_buffers = [b.clone() for b in self._buffers]
        self._lag = 0 if module.device.type == "cpu" else 1
        self._step = trainer.global_step
        # Lightning restores the handlers that it found, when it ends. Its own would save a checkpoint or talk to the
        # other ranks in the middle of whatever they do; and it asks them before every step, waiting for the GPU.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, i: int) -> None:
        if trainer.global_step != self._step or not self._pending:  # not between the batches of one step
            self._step = trainer.global_step
            self._read_flags(self._lag)
            self._flags.zero_()
        _copy(self._saved_buffers, self._buffers)

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        self._not_finite.logical_or_(~loss.detach().isfinite().all())
        if self._signal is not None:
            self._stop.fill_(1.0)
        if trainer.world_size > 1:
            dist.all_reduce(self._flags, dist.ReduceOp.MAX)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if isinstance(optimizer, GUARDED):  # else DeepSpeed's, which looks at the gradients itself
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._not_finite.logical_or_(~get_total_norm(gradients).isfinite())  # of all ranks: they are reduced

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        skipped = self._not_finite.bool()
        _copy(self._buffers, [torch.where(skipped, old, new) for old, new in
                              zip(self._saved_buffers, self._buffers, strict=True)])  # fmt: skip
        self._pending.append(_Watched(trainer.global_step, *_to_host(self._flags), batch))
        if self.n_skipped:
            module.log("train/skipped_steps", torch.tensor(float(self.n_skipped)))  # a float would be copied to the GPU

    def settle(self) -> None:
        """Wait for what is on its way; before a checkpoint, which says how many steps were skipped."""
        self._read_flags(0)

    def _read_flags(self, n_left: int) -> None:
        while len(self._pending) > n_left:
            watched = self._pending.popleft()
            if watched.copied is not None:
                watched.copied.synchronize()
            not_finite, stop = watched.flags.tolist()
            self.stopping |= bool(stop)
            if not_finite:
                self._skipped(watched)
            else:
                self.n_in_a_row = 0

    def _skipped(self, watched: _Watched) -> None:
        self.n_skipped += 1
        self.n_in_a_row += 1
        folder = self.folder / "nonfinite"
        if self.n_skipped <= MAX_SAVED_BATCHES:
            rank = dist.get_rank() if dist.is_initialized() else 0
            save_batch(folder / f"step-{watched.step:08d}-rank-{rank}.safetensors", watched.batch)
        say(f"step {watched.step:,}: loss or gradient not finite, update skipped ({self.n_skipped:,} so far); "
            f"its batch is in {folder}")  # fmt: skip
        if self.n_in_a_row >= self.max_nonfinite_steps:
            raise TrainingError(
                f"{self.folder}: loss or gradient not finite in {self.n_in_a_row} steps in a row, the last was "
                f"{watched.step:,}; their batches are in {folder}. Weights are those before. Try a lower learning "
                "rate, a longer warm-up or precision fp32, or raise trainer.max_nonfinite_steps"
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._signal = number
        if is_first_process():  # straight to the file: a signal may come in the middle of another message
            name = signal.Signals(number).name
            os.write(2, f"{name}: finishing the step, then a checkpoint; Ctrl-C (again) kills at once\n".encode())


def save_batch(path: Path, batch: Any) -> None:
    """Write the tensors of a batch by their names ("image", "text.ids_BS")."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(batch, "")}
    write_atomic(path, save_tensors(tensors))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for field, part in value._asdict().items():
            yield from _tensors(part, f"{name}.{field}" if name else field)


def _to_host(flags: Tensor) -> tuple[Tensor, Any]:
    """A copy, and an event to wait for (None if it is there already)."""
    if flags.device.type != "cuda":
        return flags.to("cpu", copy=True), None
    host = torch.empty(flags.shape, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
