"""Our decoding beside that of `transformers`, timed in turns on the machine at hand."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.int8 import to_int8
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.runtime import matmul_rate, memory_bandwidth
from vqt2i.training.compare import Timing, llama, time_in_turns

GUIDANCE = 2.0  # any scale but 1 costs the same
DecodingPrecision = Literal["fp32", "bf16", "int8"]


class DecodingComparison(NamedTuple):
    """Of `n_images` candidates of one text. least_s: the least time that the machine's own rates allow for them; None
    for int8, whose rate of products is not measured."""

    n_images: int
    guided: bool
    least_s: float | None
    timings: dict[str, Timing]


def compare_decoding(
    config: GPTConfig, precision: DecodingPrecision, *, counts: Sequence[int], n_rounds: int, device: torch.device
) -> Iterator[DecodingComparison]:
    """Time the drawing of images after a text of full length, for each number of candidates, plain and guided.

    Weights are random and have the precision; for int8, ours has 8-bit matrices and the other side fp32. The other side
    is the Llama in `transformers` of our width, depth, heads, MLP and number of ids: its `generate()` with a dynamic
    cache, all candidates as rows of one batch, guidance by a batch of twice as many rows. There the two rows of an
    image draw a token each, which costs what drawing once and copying would.

    Raises:
        ConfigError: `transformers` is not installed.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with device:
        gpt = GPT(config).to(dtype).eval()
        other = llama(config, use_cache=True).to(dtype).eval()
    ours = to_int8(gpt) if precision == "int8" else gpt
    for n_images in counts:
        for guided in (False, True):
            jobs = {
                "vqt2i": _our_decoding(ours, n_images, guided),
                "transformers": _their_decoding(other, gpt, n_images, guided),
            }
            least_s = None
            if precision != "int8":
                least_s = _least_seconds(gpt, n_images, guided, matmul_rate(device.type, precision), dtype.itemsize)
            yield DecodingComparison(n_images, guided, least_s, time_in_turns(jobs, n_rounds, device))


def _our_decoding(gpt: GPT, n_images: int, guided: bool) -> Callable[[], Tensor]:
    sampling = SamplingConfig(guidance=GUIDANCE if guided else 1.0)
    text = (0,) * gpt.layout.config.text_length
    jobs = [Job(text, 0, i) for i in range(n_images)]
    return lambda: decode_image_ids(gpt, jobs, sampling, seed=0)


def _their_decoding(other: torch.nn.Module, gpt: GPT, n_images: int, guided: bool) -> Callable[[], Tensor]:
    n_rows, n_tokens = n_images * (1 + guided), gpt.layout.image_length
    prefix_BP = torch.zeros(n_rows, gpt.layout.prefix_length, dtype=torch.long, device=gpt.device)

    def guide_rows(ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
        conditional, null = logits_BV.chunk(2)
        return torch.lerp(null, conditional, GUIDANCE).repeat(2, 1)

    def decode() -> Tensor:
        ids_BL = other.generate(
            input_ids=prefix_BP, attention_mask=torch.ones_like(prefix_BP), do_sample=True, top_k=0, use_cache=True,
            max_new_tokens=n_tokens, min_new_tokens=n_tokens, pad_token_id=0, eos_token_id=None,
            logits_processor=[guide_rows] if guided else [],
        )  # fmt: skip
        return ids_BL[:n_images, prefix_BP.shape[1] :]

    return decode


def _least_seconds(gpt: GPT, n_images: int, guided: bool, flop_rate: float, weight_bytes: int) -> float:
    """What reading the weights once a step, or multiplying all rows with them, takes at least; attention left out."""
    blocks = sum(p.numel() for p in gpt.transformer.parameters())
    step = blocks + gpt.config.transformer.width * gpt.layout.config.n_image_ids
    bandwidth, n_rows = memory_bandwidth(gpt.device.type), n_images * (1 + guided)
    per_step = max(step * weight_bytes / bandwidth, 2 * step * n_rows / flop_rate)
    return 2 * blocks * gpt.layout.prefix_length / flop_rate + per_step * (gpt.layout.image_length - 1)
