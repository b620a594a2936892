"""How fast a run goes, and what it tells of itself while it goes."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vqt2i.runtime import Precision, matmul_rate, peak_memory, say
from vqt2i.training.views import View

LIVE_SECONDS, LINE_SECONDS = 2.0, 15.0  # between two readings of the losses: the host waits for the GPU at each


class SampleWork(NamedTuple):
    """What one training sample costs. unit: what samples are.

    tokens: positions of its sequence (text, padding, marks, image); None where it is no sequence. flops: of the forward
    and backward pass of what is trained, counted once even where activation checkpointing computes them again.
    """

    unit: str
    tokens: int | None
    flops: int


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `step`."""
    # attention as plain products: what kernels compute again in the backward pass is their business
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class Throughput(NamedTuple):
    """Samples and tokens a second, and the share of the machine's own rate of matrix products that they take."""

    samples_per_second: float
    tokens_per_second: float | None
    mfu: float


class Meter:
    """Measures the rate of training steps, from the end of one batch to the end of the next (reading it included).

    Of what is validated, written or drawn between two batches nothing counts: neither its time nor the batch that it
    delayed. Nor does the first batch, in which things are compiled and allocated.
    """

    def __init__(self) -> None:
        self.n_batches, self.seconds = 0, 0.0
        self._last_seconds: float | None = None

    def pause(self) -> None:
        """The batch under way does not count."""
        self._last_seconds = None

    def batch_ended(self) -> None:
        now = time.perf_counter()
        if self._last_seconds is not None:
            self.n_batches += 1
            self.seconds += now - self._last_seconds
        self._last_seconds = now


class Rate:
    """Batches a second by a meter, since the last reading."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self._read = meter, (0, 0.0)

    def read(self) -> float | None:
        """None where no batch has been counted since."""
        batches, seconds = self.meter.n_batches - self._read[0], self.meter.seconds - self._read[1]
        self._read = (self.meter.n_batches, self.meter.seconds)
        return batches / seconds if seconds > 0 else None


class StepReport(L.Callback):
    """Tells step, losses, rate, MFU, peak memory and time left: live on a terminal, else in a line every 15 seconds.

    The rate is that of steps (see `Meter`); the time left goes by all the time since the first batch, so that it has
    its share of validations and checkpoints. MFU: training FLOP/s over what the machine itself reaches in matrix
    products (`matmul_rate`) times the number of devices. Ranks on CPUs share cores, so theirs comes out too low.

    Rate, MFU and memory also go to `views` (TensorBoard, W&B) with the other metrics, but not to metrics.csv: that of a
    resumed run is equal to that of one that never stopped, bit by bit.
    """

    def __init__(
        self, batch_size: int, precision: Precision, views: Sequence[View], show: Callable[[int, str], None] | None
    ) -> None:
        """batch_size: samples of all devices that are read at once. show: a `step_bar`, on a terminal."""
        self.batch_size, self.precision, self.views, self.show = batch_size, precision, views, show
        self.every_seconds = LIVE_SECONDS if show else LINE_SECONDS

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        # now, for later the products would take memory from the steps
        self.peak_flops = trainer.world_size * matmul_rate(module.device.type, self.precision)
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(module.device)
        self.meter = Meter()
        self.told, self.logged = Rate(self.meter), Rate(self.meter)
        self.start_seconds: float | None = None  # of the second batch: in the first, things are compiled
        self.last_logged = trainer.global_step
        self.facts = ""

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self.meter.batch_ended()
        now, step = time.monotonic(), trainer.global_step
        if self.start_seconds is None:
            self.start_seconds = self.last_seconds = now
            self.first_step = step
        if step != self.last_logged and step % trainer.log_every_n_steps == 0:
            self.last_logged = step
            self._log(module, step)
        if step == trainer.max_steps or now - self.last_seconds >= self.every_seconds:
            self.last_seconds = now
            self.facts = self._facts(trainer, module)
            if self.show is None or step == trainer.max_steps:
                say(f"step {step:,}/{trainer.max_steps:,}  {self.facts}")
        if self.show is not None:
            self.show(step, self.facts)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.meter.pause()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self.meter.pause()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = [f"{k.removeprefix('val/')} {v:.4g}" for k, v in trainer.callback_metrics.items() if "val/" in k]
        say(f"validation at step {trainer.global_step:,}:  " + "  ".join(values))

    def _throughput(self, module: L.LightningModule, rate: Rate) -> Throughput | None:
        batches_per_second, work = rate.read(), module.sample_work()
        if batches_per_second is None:
            return None
        samples = batches_per_second * self.batch_size
        return Throughput(samples, work.tokens and samples * work.tokens, samples * work.flops / self.peak_flops)

    def _log(self, module: L.LightningModule, step: int) -> None:
        values = {"memory_gb": peak_memory(module.device) / 1e9}
        throughput = self._throughput(module, self.logged)
        if throughput is not None:
            values |= {name: value for name, value in throughput._asdict().items() if value is not None}
        for view in self.views:
            view.log_metrics({f"throughput/{name}": value for name, value in values.items()}, step - 1)

    def _facts(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        facts = [f"{k.removeprefix('train/')} {v:.3g}" for k, v in trainer.callback_metrics.items() if "train/" in k]
        throughput = self._throughput(module, self.told)
        if throughput is not None:
            facts.append(f"{throughput.samples_per_second:,.0f} {module.sample_work().unit}/s")
            if throughput.tokens_per_second is not None:
                facts.append(f"{throughput.tokens_per_second:,.0f} tokens/s")
            facts.append(f"MFU {throughput.mfu:.0%}")
        facts.append(f"{peak_memory(module.device) / 1e9:.2f} GB")
        step = trainer.global_step
        elapsed = time.monotonic() - self.start_seconds
        left = round((trainer.max_steps - step) * elapsed / max(step - self.first_step, 1))
        hours, minutes = divmod(left // 60, 60)
        return "  ".join([*facts, f"{hours}:{minutes:02}:{left % 60:02} left"])
