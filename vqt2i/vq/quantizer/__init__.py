"""Quantizers, one module for each kind, behind one interface (`base.Quantizer`); docs/quantizers.md compares them."""

from typing import Annotated

from pydantic import Field

from vqt2i.vq.quantizer.base import Quantized, Quantizer
from vqt2i.vq.quantizer.codebook import VectorQuantizer, VQConfig, nearest_codes
from vqt2i.vq.quantizer.fsq import FiniteScalarQuantizer, FSQConfig
from vqt2i.vq.quantizer.gumbel import GumbelConfig, GumbelQuantizer
from vqt2i.vq.quantizer.lfq import LFQConfig, LookupFreeQuantizer
from vqt2i.vq.quantizer.residual import ResidualQuantizer, ResidualVQConfig

QuantizerConfig = Annotated[
    VQConfig | ResidualVQConfig | FSQConfig | LFQConfig | GumbelConfig, Field(discriminator="kind")
]
_CLASSES = {
    VQConfig: VectorQuantizer,
    ResidualVQConfig: ResidualQuantizer,
    FSQConfig: FiniteScalarQuantizer,
    LFQConfig: LookupFreeQuantizer,
    GumbelConfig: GumbelQuantizer,
}

__all__ = [
    "FSQConfig",
    "GumbelConfig",
    "LFQConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualVQConfig",
    "VQConfig",
    "VectorQuantizer",
    "build_quantizer",
    "nearest_codes",
]


def build_quantizer(config: QuantizerConfig, channels: int, channels_out: int | None = None) -> Quantizer:
    """The quantizer of a configuration, from feature maps of `channels` to such of `channels_out` (null: the same)."""
    return _CLASSES[type(config)](config, channels, channels_out)
