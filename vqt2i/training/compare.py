"""Our models beside other projects' of the same size, timed in turns on the machine at hand."""

import statistics
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from vqt2i.errors import ConfigError
from vqt2i.gpt import GPT, GPTConfig, LossWeights, gpt_loss
from vqt2i.runtime import Precision, matmul_rate
from vqt2i.text import TextBatch
from vqt2i.training.compiled import compile_for_training
from vqt2i.training.optim import OptimizerConfig, build_optimizer
from vqt2i.training.plan import training_flops
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

Key = TypeVar("Key", bound=Hashable)


class Timing(NamedTuple):
    """Seconds of each round, in the order of the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times_as_fast_as(self, other: "Timing") -> tuple[float, float, float]:
        """Seconds of `other` over ours: median, lowest and highest of the rounds."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def time_in_turns(jobs: dict[Key, Callable[[], Any]], n_rounds: int, device: torch.device) -> dict[Key, Timing]:
    """Run each job once unmeasured, and then in turns, `n_rounds` times each.

    What else happens on the machine then touches all jobs alike, and the ratio of their times little.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in jobs}
    for round_ in range(n_rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


class TrainingComparison(NamedTuple):
    """Of one precision. flops, n_tokens: of a step of our GPT. matmul_rate: FLOP/s of this machine."""

    precision: Precision
    matmul_rate: float
    flops: float
    n_tokens: int
    timings: dict[str, Timing]


def compare_training(
    config: GPTConfig, precision: Precision, *, batch_size: int, n_reversed: int, loss: LossWeights, n_rounds: int,
    compiled: bool, device: torch.device,
) -> TrainingComparison:  # fmt: skip
    """Time forward pass, backward pass and fused AdamW of our GPT and of the Llama in `transformers`.

    Llama has the width, depth, heads, MLP, number of ids and sequence length of ours. It scores every id at every
    position, as a model of one vocabulary does; ours scores text and image apart, and norms queries and keys. No text
    is padded.

    Args:
        compiled: time both with torch.compile too.

    Raises:
        ConfigError: `transformers` is not installed.
    """
    contestants = {
        "vqt2i": _gpt_step(config, batch_size, n_reversed, loss, device),
        "transformers": _llama_step(config, batch_size, device),
    }
    jobs = {}
    for name, (model, loss_of) in contestants.items():
        optimizer = build_optimizer(model, OptimizerConfig())
        jobs[name] = _training_step(loss_of, optimizer, autocast(device, precision))
        if compiled:
            jobs[f"{name}, compiled"] = _training_step(
                compile_for_training(loss_of), optimizer, autocast(device, precision)
            )
    layout = contestants["vqt2i"][0].layout
    return TrainingComparison(
        precision,
        matmul_rate(device.type, precision),
        batch_size * training_flops(config),
        batch_size * layout.length,
        time_in_turns(jobs, n_rounds, device),
    )


class TokenizerComparison(NamedTuple):
    """Timings of `batch_size` images: encoding to ids, decoding of ids, a training step."""

    encode: dict[str, Timing]
    decode: dict[str, Timing]
    train: dict[str, Timing]


def compare_tokenizers(
    config: ImageTokenizerConfig, *, batch_size: int, n_rounds: int, device: torch.device
) -> TokenizerComparison:
    """Time our image tokenizer of architecture "taming" and the same network as the VQModel of `diffusers`, in fp32.

    The training step is a reconstruction's L1 loss and the quantizer's, backward pass and fused AdamW, without critic.

    Raises:
        ConfigError: another architecture, or `diffusers` is not installed.
    """
    size = config.image_size_px
    with device:
        ours, theirs = ImageTokenizer(config), vq_model(config)
        images = torch.rand(batch_size, 3, size, size) * 2 - 1
        ids = torch.randint(config.vocab_size, (batch_size, config.grid_height, config.grid_width))
    shape = (*ids.shape, theirs.config.vq_embed_dim)

    @torch.no_grad()
    def their_ids() -> torch.Tensor:
        return theirs.quantize(theirs.encode(images).latents)[2][2]

    @torch.no_grad()
    def their_pictures() -> torch.Tensor:
        codes = theirs.quantize.get_codebook_entry(ids.flatten(), shape)
        return theirs.decode(codes, force_not_quantize=True).sample.clamp(-1, 1)

    def our_loss() -> torch.Tensor:
        out = ours(images)
        return (out.reconstruction_B3HW - images).abs().mean() + out.quantizer_loss

    def their_loss() -> torch.Tensor:
        out = theirs(images)
        return (out.sample - images).abs().mean() + out.commit_loss

    def step(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return _training_step(loss_of, build_optimizer(model, OptimizerConfig()), autocast(device, "fp32"))

    ours.eval(), theirs.eval()
    encode = time_in_turns({"vqt2i": lambda: ours.encode(images), "diffusers": their_ids}, n_rounds, device)
    decode = time_in_turns({"vqt2i": lambda: ours.decode(ids), "diffusers": their_pictures}, n_rounds, device)
    ours.train(), theirs.train()
    train = {"vqt2i": step(ours, our_loss), "diffusers": step(theirs, their_loss)}
    return TokenizerComparison(encode, decode, time_in_turns(train, n_rounds, device))


def vq_model(config: ImageTokenizerConfig) -> nn.Module:
    """The network of an image tokenizer as a VQModel of `diffusers`, with weights of its own.

    Raises:
        ConfigError: it has another architecture than "taming" or another quantizer than "vq", or `diffusers` is not
            installed.
    """
    if config.architecture != "taming" or config.attention_sizes_px or config.quantizer.kind != "vq":
        raise ConfigError("a VQModel has architecture 'taming', no attention_sizes_px and a quantizer of kind 'vq'; "
                          f"found {config.architecture!r}, {list(config.attention_sizes_px)} and "
                          f"{config.quantizer.kind!r}")  # fmt: skip
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise ConfigError("benchmark vqgan compares with `diffusers`, which is not installed; "
                          "pip install 'vqt2i[benchmark]'") from error  # fmt: skip
    n_levels = len(config.channels)
    return VQModel(
        block_out_channels=config.channels, layers_per_block=config.n_res_blocks, latent_channels=config.latent_width,
        down_block_types=("DownEncoderBlock2D",) * n_levels, up_block_types=("UpDecoderBlock2D",) * n_levels,
        num_vq_embeddings=config.quantizer.codebook_size, vq_embed_dim=config.quantizer.code_dim,
    )  # fmt: skip


def autocast(device: torch.device, precision: Precision) -> Callable[[], AbstractContextManager]:
    """Makes the context that Lightning computes a loss in."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype, enabled=precision != "fp32")


def _training_step(
    loss_of: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, context: Callable[[], AbstractContextManager]
) -> Callable[[], None]:
    def step() -> None:
        with context():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gpt_step(
    config: GPTConfig, batch_size: int, n_reversed: int, weights: LossWeights, device: torch.device
) -> tuple[GPT, Callable[[], torch.Tensor]]:
    with device:
        gpt = GPT(config)
        layout = config.layout
        text = TextBatch(
            torch.randint(layout.n_text_ids, (batch_size, layout.text_length)),
            torch.full((batch_size,), layout.text_length),
        )
        image_BI = torch.randint(layout.n_image_ids, (batch_size, gpt.layout.image_length))
    return gpt, lambda: gpt_loss(gpt, text, image_BI, n_reversed, weights).total


def _llama_step(
    config: GPTConfig, batch_size: int, device: torch.device
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    with device:
        other = llama(config, use_cache=False)
        ids_BL = torch.randint(other.config.vocab_size, (batch_size, other.config.max_position_embeddings - 1))
    return other.train(), lambda: other(input_ids=ids_BL, labels=ids_BL).loss


def llama(config: GPTConfig, *, use_cache: bool) -> nn.Module:
    """The Llama in `transformers` with the width, depth, heads, MLP, number of ids and sequence length of a GPT.

    Raises:
        ConfigError: `transformers` is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ConfigError("this benchmark compares with `transformers`, which is not installed; "
                          "pip install 'vqt2i[benchmark]'") from error  # fmt: skip
    layout, size = config.sequence_layout, config.transformer
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=layout.n_ids, max_position_embeddings=layout.length, hidden_size=size.width,
            intermediate_size=size.mlp_width, num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads,
            tie_word_embeddings=False, use_cache=use_cache, attn_implementation="sdpa",
        )
    )  # fmt: skip
