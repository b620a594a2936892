"""What training a GPT needs, before it starts: memory per GPU, time and cost.

Nothing is allocated: the parameters are counted on PyTorch's meta device. The peak of a step is the sum of

- model states: weights, gradients, AdamW's moments. Under ZeRO by DeepSpeed's own estimators, which assume 16-bit
  weights and gradients beside fp32 master weights and moments (20 bytes per parameter in all);
- DeepSpeed's communication buffers, of their default sizes;
- activations: what the blocks and the loss keep for the backward pass (`Activations`), counted from
  vqt2i/nn/transformer.py and vqt2i/gpt/loss.py. tests/training/test_plan.py holds the counts to what is really kept.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from vqt2i.errors import ConfigError
from vqt2i.gpt import GPT, GPTConfig, SequenceLayout
from vqt2i.runtime import Precision

GB = 10**9
USABLE_SHARE = 0.9  # of a GPU's memory; the rest is for the CUDA context, NCCL and fragmentation (an assumption)
FP32, HALF = 4, 2  # bytes of a number


@dataclass(frozen=True)
class Setting:
    """How the model states and activations are spread. zero_stage 0 is one process or DDP, without DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to host memory; "parameters": the optimizer too
    activation_checkpointing: bool = False

    def __str__(self) -> str:
        parts = [f"ZeRO {self.zero_stage}" if self.zero_stage else "no ZeRO"]
        parts += {"none": [], "optimizer": ["optimizer offloaded"], "parameters": ["all offloaded"]}[self.offload]
        return ", ".join(parts + ["checkpointing"] * self.activation_checkpointing)


# from the cheapest to the dearest: sharding costs communication (little before stage 3), checkpointing a third more
# compute, offloading a transfer of the states over PCIe at every step
SETTINGS = tuple(
    Setting(stage, offload, checkpointing)
    for offload, stages in (("none", (0, 1, 2, 3)), ("optimizer", (2, 3)), ("parameters", (3,)))
    for checkpointing in (False, True)
    for stage in stages
)


@dataclass(frozen=True)
class Hardware:
    """`n_gpus` of `memory` bytes each; CPU ranks count as GPUs that share the machine's memory."""

    n_gpus: int
    memory: int
    gpus_per_node: int = 8
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        if self.n_gpus > self.gpus_per_node and self.n_gpus % self.gpus_per_node:
            raise ConfigError(f"{self.n_gpus} GPUs do not fill nodes of {self.gpus_per_node}; give a multiple")

    @property
    def n_nodes(self) -> int:
        return max(1, self.n_gpus // self.gpus_per_node)

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE_SHARE)


@dataclass(frozen=True)
class Parameters:
    """total; largest: those of the module that owns most, which ZeRO 3 gathers whole."""

    total: int
    largest: int


@dataclass(frozen=True)
class Activations:
    """Bytes that one sample adds to a step.

    block: kept by one block. block_input: the part of it that activation checkpointing keeps. block_backward: what the
    backward pass of one block needs for a moment. head: kept by the final norm and the loss. forward_peak,
    backward_peak: what the loss needs for a moment on top, in either pass.
    """

    block: int
    block_input: int
    block_backward: int
    head: int
    forward_peak: int
    backward_peak: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU at the peak of a step, and in the host memory of one node."""

    setting: Setting
    states: int
    buffers: int
    activations: int
    host: int
    largest_batch: int  # samples per GPU that fit
    fits: bool

    @property
    def total(self) -> int:
        return self.states + self.buffers + self.activations


@cache
def count_parameters(config: GPTConfig) -> Parameters:
    """Exact counts, without memory for the weights."""
    with torch.device("meta"):
        gpt = GPT(config)
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in gpt.modules()]
    return Parameters(sum(own), max(own))


def training_flops(config: GPTConfig) -> int:
    """Floating-point operations of one sample's forward and backward pass: those of its matrix products.

    The backward pass costs twice the forward pass. Attention counts whole rows, hidden or not.
    """
    t, layout = config.transformer, config.sequence_layout
    length = layout.length - 1
    mlp = (3 if t.mlp == "swiglu" else 2) * t.width * t.mlp_width
    block = 2 * length * (4 * t.width**2 + mlp) + 4 * length**2 * t.width
    return 3 * (t.n_layers * block + 2 * t.width * sum(n * size for n, size in _scored(layout)))


def _scored(layout: SequenceLayout) -> list[tuple[int, int]]:
    """(positions, vocabulary) of the image head and, where texts are predicted, of the text head."""
    at = layout.text_targets(reversed_order=False)
    text = [(at.stop - at.start, layout.first_image_id)] if layout.predicts_text else []
    return [(layout.image_length, layout.config.n_image_ids), *text]


def count_activations(
    config: GPTConfig, precision: Precision, *, autocast: bool, device: Literal["cuda", "cpu"]
) -> Activations:
    """Bytes kept per sample, without torch.compile (which keeps less), and without dropout in attention (for which CPUs
    have no kernel that keeps as little).

    Args:
        autocast: 16-bit products over fp32 weights (without DeepSpeed); else the weights have the precision too.
        device: PyTorch's kernels for CPUs keep more than those for GPUs (whose share is read from source, unmeasured).
    """
    t, layout = config.transformer, config.sequence_layout
    length, width = layout.length - 1, t.width
    c = FP32 if precision == "fp32" else HALF  # of the matrix products
    r = FP32 if autocast else c  # of the residual stream
    rms = FP32 if device == "cpu" else r  # of what RMSNorm keeps
    layer_norm, sandwich = t.norm != "rms", t.norm_placement == "sandwich"
    stream = r if layer_norm else rms  # of what norms keep of the residual stream, and of the branches' ends
    branch = (c if device == "cpu" else r) if layer_norm else rms
    n_norms = 4 if sandwich else 2  # as wide as the model, like those of q and k together
    n_rms = (0 if layer_norm else n_norms) + (2 if t.qk_norm else 0)
    statistics = {"rms": FP32, "layer": 2 * r, "scaled_layer": 3 * r}[t.norm]
    turned = t.qk_norm or config.turns
    # plain attention keeps v where it lies beside q and k, relaxed attention copies it
    qkv_kept = not t.pb_relax or (t.qk_norm and rms == c)
    per_position = (
        2 * width * stream                 # inputs of both norms: the residual stream
        + (2 * width * branch if sandwich else 0)  # inputs of the norms at the branches' ends
        + 2 * width * c                    # outputs of both norms: inputs of qkv and the MLP
        + (3 * width * c if qkv_kept else 0)  # q, k, v
        + (2 * width * rms if t.qk_norm and rms != c else 0)  # q and k in fp32
        + (2 * width * c if turned or t.pb_relax else 0)  # q and k as attention takes them
        + (2 * t.head_width * c if config.turns and c != FP32 else 0)  # cosines and sines, twice
        + width * c                        # attention's output
        + {"swiglu": 4, "gelu_quick": 3}.get(t.mlp, 2) * t.mlp_width * c  # gate, up, silu(gate), product; up, gelu(up)
        + n_norms * statistics
        + (2 * t.n_heads * FP32 if t.qk_norm else 0)  # 1 / RMS of q and k
        + (2 * width if t.dropout else 0)  # masks
    )  # fmt: skip
    if device == "cpu":
        # no fused RMSNorm: what is normalised is kept before it is scaled
        per_position += n_rms * width * rms
    if t.pb_relax:
        per_position += width * c + t.n_heads * length * c  # v, and the probabilities
    elif device == "cuda" or c == FP32:  # attention is PyTorch's and not that of nn/attention.py
        per_position += length * c + FP32 * t.n_heads  # the mask as it is added to the scores, and their log-sum-exp
        per_position += width * c if device == "cpu" and turned else 0  # a copy of the output
    scored = _scored(layout)
    n_scored = sum(n for n, _ in scored)
    head = (
        2 * length * width * r             # the final norm's input and output
        + n_scored * width * (r + (c if autocast else 0))  # the slices that are scored
        + FP32 * sum(n * size for n, size in scored)  # logits
    )  # fmt: skip
    largest = max(n * size for n, size in scored)
    return Activations(
        block=length * per_position,
        block_input=length * width * r,
        block_backward=length * (2 * t.mlp_width * c + 2 * width * r),
        head=head,
        forward_peak=FP32 * largest,
        backward_peak=4 * FP32 * largest,
    )


def estimate(
    config: GPTConfig, setting: Setting, hardware: Hardware, *, batch_per_gpu: int, precision: Precision
) -> Estimate:
    """Memory of one setting.

    A step peaks in one of several phases, each with bytes that are always there and bytes that each sample adds.
    """
    parameters = count_parameters(config)
    states, gradients, host = _model_states(parameters, setting, hardware, precision)
    buffers = _buffers(parameters, setting, hardware, precision)
    autocast = setting.zero_stage == 0 and precision != "fp32"
    kept = count_activations(config, precision, autocast=autocast, device=hardware.device)
    blocks = config.transformer.n_layers * (kept.block_input if setting.activation_checkpointing else kept.block)
    again = kept.block if setting.activation_checkpointing else 0
    phases = [
        # the loss, in either pass: Lightning lets the last step's gradients go between them
        (states, blocks + kept.head + kept.forward_peak),
        (states - gradients, blocks + kept.head + kept.backward_peak),
        # the backward pass through the last block, when no gradients are there yet, and through the first
        (states - gradients, blocks + again + kept.block_backward),
        (states - gradients // config.transformer.n_layers, kept.block + kept.block_backward),
    ]
    total = buffers + max(fixed + batch_per_gpu * per_sample for fixed, per_sample in phases)
    largest_batch = min((hardware.usable - buffers - fixed) // per_sample for fixed, per_sample in phases)
    return Estimate(
        setting, states, buffers, total - states - buffers, host, max(0, largest_batch), total <= hardware.usable
    )


def estimate_all(config: GPTConfig, hardware: Hardware, *, batch_per_gpu: int, precision: Precision) -> list[Estimate]:
    """Every setting, the cheapest first: the first that fits is the one to use."""
    known = SETTINGS if importlib.util.find_spec("deepspeed") else [s for s in SETTINGS if not s.zero_stage]
    return [estimate(config, s, hardware, batch_per_gpu=batch_per_gpu, precision=precision) for s in known]


def require_fits(
    config: GPTConfig, setting: Setting, hardware: Hardware, *, batch_per_gpu: int, precision: Precision
) -> None:
    """Check that training fits, before anything is written or allocated.

    Raises:
        ConfigError: it does not; what would is named.
    """
    own = estimate(config, setting, hardware, batch_per_gpu=batch_per_gpu, precision=precision)
    if own.fits:
        return
    needs = f"{setting} needs {own.total / GB:,.1f} GB on each of {hardware.n_gpus} devices for {batch_per_gpu} samples"
    has = f"{hardware.usable / GB:,.1f} of its {hardware.memory / GB:,.1f} GB can be used"
    others = estimate_all(config, hardware, batch_per_gpu=batch_per_gpu, precision=precision)
    ways = [f"{e.setting} ({e.total / GB:,.1f} GB)" for e in others if e.fits][:1]
    if own.largest_batch:
        ways.append(f"{own.largest_batch} samples per device")
    ways = ways or [f"{e.setting} with {e.largest_batch} samples per device" for e in others if e.largest_batch][:1]
    advice = " or ".join(ways) or "more or larger devices, or a smaller model"
    raise ConfigError(f"{count_parameters(config).total:,} parameters: {needs}, {has}; what fits: {advice} "
                      "(see tools/plan.py)")  # fmt: skip


def setting_of(deepspeed: dict[str, Any] | None, *, activation_checkpointing: bool) -> Setting:
    """The setting of a run by DeepSpeed's JSON, generated or a user's own; None is a run without DeepSpeed."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    weights, optimizer = (
        (zero.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in ("param", "optimizer")
    )
    offload = ("parameters" if weights else "optimizer") if optimizer else "none"
    return Setting(zero.get("stage", 0), offload, activation_checkpointing)


def hardware_of(device: torch.device, n_devices: int, n_nodes: int = 1) -> Hardware:
    """Devices like this machine's, on as many nodes like it.

    CUDA's own memory, or an equal share of the machine's for CPU ranks.
    """
    n_here = n_devices // n_nodes
    if device.type == "cuda":
        return Hardware(n_devices, torch.cuda.get_device_properties(device).total_memory, n_here)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(n_devices, memory // n_here, n_here, "cpu")


@contextmanager
def _importing_deepspeed() -> Iterator[None]:
    """It is imported where needed only (it takes seconds, and is for Linux), and without a warning where no GPU is."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _model_states(
    parameters: Parameters, setting: Setting, hardware: Hardware, precision: Precision
) -> tuple[int, int, int]:
    """Bytes per GPU, those of them that are let go before the backward pass, and bytes in the memory of one host."""
    n, total, per_node = hardware.n_gpus, parameters.total, min(hardware.n_gpus, hardware.gpus_per_node)
    if setting.zero_stage == 0:
        gradients = FP32 * total
        buckets = gradients if n > 1 else 0  # DDP reduces copies
        copies = 0 if precision == "fp32" else HALF * total  # autocast's
        return 3 * FP32 * total + gradients + buckets + copies, gradients, FP32 * total * per_node
    with _importing_deepspeed():
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    offloaded = setting.offload != "none"
    host, gpu, largest = estimate_zero3_model_states_mem_needs(
        total, parameters.largest, per_node, hardware.n_nodes, cpu_offload=offloaded,
        cpu_offload_params=setting.offload == "parameters", zero_init=False,  # each rank builds the whole model
    )  # fmt: skip
    wide = precision == "fp32"
    if setting.zero_stage == 3:
        return gpu + (largest if wide else 0), 0, host
    _, gpu = estimate_zero2_model_states_mem_needs(total, per_node, hardware.n_nodes, cpu_offload=offloaded)
    # The estimator is for stage 2 in 16 bits: weights whole, the rest sharded. In fp32 weights have 16 bits more and
    # there is no second copy of the gradients (20 bytes in all, as before); stage 1 has the gradients whole too.
    n_whole = (2 if wide else 1) * (2 if setting.zero_stage == 1 else 1)
    return gpu + (n_whole - 1) * (HALF * total - HALF * total // n), 0, host


def _buffers(parameters: Parameters, setting: Setting, hardware: Hardware, precision: Precision) -> int:
    if setting.zero_stage == 0:
        return 0
    with _importing_deepspeed():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    defaults = DeepSpeedZeroConfig(stage=setting.zero_stage)
    bucket = defaults.reduce_bucket_size
    if hardware.device == "cpu":
        bucket = min(bucket, parameters.total)  # a host gives no memory to what is never written
    elements = bucket * (2 if defaults.overlap_comm else 1)
    if setting.zero_stage == 3:
        elements += min(parameters.total, defaults.max_live_parameters)  # gathered weights that stay for reuse
    return elements * (FP32 if precision == "fp32" else HALF)


@dataclass(frozen=True)
class Cost:
    """tokens: all positions of the sequences (text, padding, marks, image). throughput: where the rate is from."""

    tokens: int
    flops: float
    tokens_per_second: float
    throughput: str
    seconds: float
    gpu_hours: float


def cost(
    config: GPTConfig,
    n_gpus: int,
    tokens: int,
    *,
    tokens_per_second: float | None,
    peak_tflops: float,
    mfu: float,
    activation_checkpointing: bool,
) -> Cost:
    """Time for `tokens`, from a measured rate of all GPUs together, or from a GPU's peak and the share of it in use.

    mfu is the share while computing; activation checkpointing computes the forward pass twice, hence a third more.
    """
    length = config.sequence_layout.length
    flops_per_token = training_flops(config) / length
    if tokens_per_second is None:
        computed = flops_per_token * (4 / 3 if activation_checkpointing else 1)
        tokens_per_second = n_gpus * peak_tflops * 1e12 * mfu / computed
        throughput = f"assumed: {mfu:.0%} of {peak_tflops:g} TFLOP/s per GPU"
        if activation_checkpointing:
            throughput += ", the forward pass computed twice"
    else:
        throughput = "measured, as given"
    seconds = tokens / tokens_per_second
    return Cost(tokens, flops_per_token * tokens, tokens_per_second, throughput, seconds, seconds * n_gpus / 3600)
