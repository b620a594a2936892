"""The kinds of quantizer in one image tokenizer, each trained alike."""

import math
from pathlib import Path
from typing import NamedTuple

from vqt2i.checkpoint import read_card
from vqt2i.training.vqgan import VQGANRunConfig, train_vqgan
from vqt2i.vq.quantizer import FSQConfig, GumbelConfig, LFQConfig, QuantizerConfig, ResidualVQConfig, VQConfig

# of 1,024 ids each, FSQ as near as the paper's levels come
QUANTIZERS: dict[str, QuantizerConfig] = {
    "vq-gradient": VQConfig(codebook_size=1024, l2_normalised=False, update="gradient", codebook_weight=1.0),
    "vq-ema": VQConfig(codebook_size=1024, l2_normalised=False),
    "vq-ema-l2": VQConfig(codebook_size=1024),
    "fsq": FSQConfig(levels=(8, 5, 5, 5)),
    "lfq": LFQConfig(codebook_size=1024),
    "residual": ResidualVQConfig(codebook_size=512, depth=2),
    "gumbel": GumbelConfig(codebook_size=1024),
}


class QuantizerScore(NamedTuple):
    """Of one kind on the validation pictures. bits_per_cell: that the ids of a cell can say."""

    name: str
    n_ids: int
    ids_per_cell: int
    bits_per_cell: float
    psnr: float
    ssim: float
    usage: float
    perplexity: float


def compare_quantizers(
    config: VQGANRunConfig, runs: Path, quantizers: dict[str, QuantizerConfig] = QUANTIZERS
) -> list[QuantizerScore]:
    """Train `config` with each quantizer, from one seed, into `runs/NAME-QUANTIZER`."""
    scores = []
    for name, quantizer in quantizers.items():
        model = config.model.model_copy(update={"quantizer": quantizer})
        run = train_vqgan(
            config.model_copy(update={"name": f"{config.name}-{name}", "model": model}), runs, resume="never"
        )
        metrics = read_card(run / "model")["metrics"]
        found = (metrics[f"val/{measure}"] for measure in ("psnr", "ssim", "usage", "perplexity"))
        per_cell = quantizer.ids_per_cell
        bits = per_cell * math.log2(quantizer.vocab_size / per_cell)  # a level names codes of its own only
        scores.append(QuantizerScore(name, quantizer.vocab_size, per_cell, bits, *found))
    return scores


def as_markdown(scores: list[QuantizerScore]) -> str:
    """The scores as a table."""
    lines = ["| quantizer | ids | ids a cell | bits a cell | PSNR, dB | SSIM | ids seen | perplexity |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for s in scores:
        lines.append(
            f"| {s.name} | {s.n_ids:,} | {s.ids_per_cell} | {s.bits_per_cell:.2f} | {s.psnr:.2f} | {s.ssim:.3f} | "
            f"{s.usage:.1%} | {s.perplexity:,.0f} |"
        )
    return "\n".join(lines)
