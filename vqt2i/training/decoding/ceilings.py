"""The least time that the machine's own rates allow for drawing."""

import warnings
from typing import Literal, NamedTuple

import torch

from vqt2i.config import Config
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.runtime import best_rate, matmul_rate, memory_bandwidth
from vqt2i.training.decoding.contestants import DecodingPrecision

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
KV_BYTES = {"fp32": 4, "bf16": 2, "int8": 2}
INT8_SIZE = 1024  # of the square matrices whose products are timed


class Rates(Config):
    """bandwidth: bytes a second read from memory. products: FLOP/s of matrix products, by precision."""

    bandwidth: float
    products: dict[DecodingPrecision, float]


class RateMeter:
    """The best rates found so far; measured over and over between what they are compared with."""

    def __init__(self, device: torch.device, precisions: tuple[DecodingPrecision, ...]) -> None:
        self.device, self.precisions = device, precisions
        self.best = Rates(bandwidth=0.0, products=dict.fromkeys(precisions, 0.0))

    def measure(self) -> None:
        kind, best = self.device.type, self.best
        self.best = Rates(
            bandwidth=max(best.bandwidth, memory_bandwidth(kind)),
            products={p: max(best.products[p], product_rate(self.device, p)) for p in self.precisions},
        )


def product_rate(device: torch.device, precision: DecodingPrecision) -> float:
    """FLOP/s of matrix products; in int8 those of PyTorch's on CPUs, and on GPUs, where weights alone are 8 bits, those
    of bf16."""
    if precision != "int8":
        return matmul_rate(device.type, precision)
    if device.type != "cpu":
        return matmul_rate(device.type, "bf16")
    x, w = torch.randn(2, INT8_SIZE, INT8_SIZE, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        # PyTorch 2.15 says that such tensors will go; `torch._int_mm` of plain ones is five times as slow here
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
        packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(w, 0.03, 0, torch.qint8), None)
    return best_rate(lambda: torch.ops.quantized.linear_dynamic(x, packed), 2 * INT8_SIZE**3, "cpu")


class Least(NamedTuple):
    """The least time, and which rate says so."""

    seconds: float
    bound: Literal["memory", "products"]


def least_seconds(config: GPTConfig, precision: DecodingPrecision, n_images: int, guided: bool, rates: Rates) -> Least:
    """The least time for candidates of one text, drawn together.

    The text is read once, at the rate of products (the empty text of guidance is left out). Each further step reads
    the weights once, the text's keys and values once, and those of each row's own tokens; or it multiplies every row
    with all of these, whichever takes longer. Keys and values have two bytes, in fp32 four.
    """
    with torch.device("meta"):
        gpt = GPT(config)
    blocks = sum(p.numel() for p in gpt.transformer.parameters())
    size, layout = config.transformer, gpt.layout
    weights = blocks + size.width * layout.config.n_image_ids
    n_rows, n_steps = n_images * (1 + guided), layout.image_length - 1
    own = n_rows * n_steps * (n_steps + 1) // 2  # positions that rows have added, summed over steps
    prefix = n_steps * layout.prefix_length
    kv = 2 * size.n_layers * size.width  # numbers of a position
    n_bytes = n_steps * weights * WEIGHT_BYTES[precision] + kv * (prefix + own) * KV_BYTES[precision]
    flops = 2 * n_steps * weights * n_rows + 2 * kv * (n_images * prefix + own)
    reading, multiplying = n_bytes / rates.bandwidth, flops / rates.products[precision]
    prefill = 2 * blocks * layout.prefix_length / rates.products[precision]
    return Least(prefill + max(reading, multiplying), "memory" if reading > multiplying else "products")
