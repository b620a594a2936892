"""Who draws: our engines, and the ways in which the Llama in `transformers` generates."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vqt2i.errors import ConfigError
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.engine import Engine
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig, SequenceLayout
from vqt2i.runtime import say
from vqt2i.training.compare import llama

T = TypeVar("T")
GUIDANCE = 2.0  # any scale but 1 costs the same
DecodingPrecision = Literal["fp32", "bf16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}  # of what reads texts

Draw = Callable[[], Tensor]
Drawer = Callable[[int, bool], Draw]  # (number of images, guided)


ENGINES = ("native", "plain", "compiled")  # as `Engine` calls them


class Mode(NamedTuple):
    """Of `generate()`. static: a cache of full length, which is kept for the next call. compiled: the forward pass of a
    token. frozen: compiled with the weights as constants, which inductor packs for the CPU."""

    static: bool
    compiled: bool
    frozen: bool


MODES = {
    "dynamic": Mode(False, False, False),
    "static": Mode(True, False, False),
    "compiled": Mode(True, True, False),
    "frozen": Mode(True, True, True),
}


def made_or_said(label: str, make: Callable[[], T]) -> T | None:
    """What `make` returns; None where it raises ConfigError, which is said."""
    try:
        return make()
    except ConfigError as error:
        say(f"{label} is left out: {error}")
        return None


def our_drawer(engine: str, config: GPTConfig, precision: DecodingPrecision, device: torch.device) -> Drawer:
    """Draws with one of `ENGINES`, of random weights, after a text of full length.

    Raises:
        ConfigError: not here, or not in this precision.
    """
    made, gpt = Engine(engine, precision, device), random_gpt(config, device)
    made.gpt(gpt)
    return lambda n_images, guided: our_drawing(made, gpt, n_images, guided)


def their_drawer(mode: str, config: GPTConfig, precision: DecodingPrecision, device: torch.device) -> Drawer:
    """Draws with one of `MODES`, of random weights, after as many positions.

    Raises:
        ConfigError: `transformers` is not installed.
    """
    torch.manual_seed(0)
    with device:
        other = llama(config, use_cache=True).to(DTYPES[precision]).eval()
    return lambda n_images, guided: their_drawing(other, config, MODES[mode], n_images, guided)


def random_gpt(config: GPTConfig, device: torch.device) -> GPT:
    """A GPT of fp32 weights, the same at each call."""
    torch.manual_seed(0)
    with device:
        return GPT(config).eval()


def our_drawing(engine: Engine, gpt: GPT, n_images: int, guided: bool) -> Draw:
    """A job that draws candidates of one text."""
    sampling = SamplingConfig(guidance=GUIDANCE if guided else 1.0)
    text = (0,) * gpt.layout.config.text_length
    jobs = [Job(text, 0, i) for i in range(n_images)]
    return lambda: decode_image_ids(gpt, jobs, sampling, seed=0, start=engine.start(gpt, n_images))


def their_drawing(other: nn.Module, config: GPTConfig, mode: Mode, n_images: int, guided: bool) -> Draw:
    """A job that draws all candidates as rows of one batch, guidance by a batch of twice as many rows.

    The two rows of an image draw a token each, which costs what drawing once and copying would.
    """
    layout = SequenceLayout(config.layout)
    n_tokens, device = layout.image_length, other.device
    prefix_BP = torch.zeros(n_images * (1 + guided), layout.prefix_length, dtype=torch.long, device=device)
    options = _mode_options(other, mode, layout.prefix_length + n_tokens)
    cache = options.get("past_key_values")

    def guide_rows(ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
        conditional, null = logits_BV.chunk(2)
        return torch.lerp(null, conditional, GUIDANCE).repeat(2, 1)

    def draw() -> Tensor:
        if cache is not None:
            cache.reset()
        # Dynamo asks the configuration, and not a graph's own options, whether weights are constants
        with torch._inductor.config.patch(freezing=mode.frozen):
            ids_BL = other.generate(
                input_ids=prefix_BP, attention_mask=torch.ones_like(prefix_BP), do_sample=True, top_k=0, use_cache=True,
                max_new_tokens=n_tokens, min_new_tokens=n_tokens, pad_token_id=0, eos_token_id=None,
                logits_processor=[guide_rows] if guided else [], **options,
            )  # fmt: skip
        return ids_BL[:n_images, prefix_BP.shape[1] :]

    return draw


def _mode_options(other: nn.Module, mode: Mode, length: int) -> dict[str, Any]:
    """What `generate()` is given for a mode."""
    from transformers import CompileConfig, StaticCache

    if not mode.static:
        return {}
    # one cache for all calls: frozen code, which takes it for constant, reads outside of the next one that is made
    options: dict[str, Any] = {"past_key_values": StaticCache(config=other.config, max_cache_len=length)}
    if mode.compiled:
        # else code compiled for another model of equal shapes would serve a frozen one: `options` tell them apart
        frozen = {"mode": None, "options": {"freezing": True}} if mode.frozen else {}
        options["compile_config"] = CompileConfig(dynamic=False, **frozen)
        options["compile_config"]._compile_all_devices = True  # by itself it compiles on GPUs only
    else:
        options["disable_compile"] = True
    return options
