"""What the importers of VQGANs share: our architecture "taming" under the names of others."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from vqt2i.peers.family import differing
from vqt2i.peers.table import Table, prefixed, with_weights
from vqt2i.vq import ImageTokenizerConfig

RES_BLOCK = with_weights({"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"})
SKIP = with_weights({"skip": "nin_shortcut"})
ATTENTION = with_weights({"norm": "norm", "qkv": ("q", "k", "v"), "out": "proj_out"})
RESAMPLE = with_weights({"conv": "conv"})
ENDS = with_weights({"conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out"})

# where a layer lies there: (kind, level, index in it); levels from the finest, "mid" has -1
Place = Callable[[str, int, int], str]


def encoder_layers(config: ImageTokenizerConfig) -> Iterator[tuple[str, int, int, bool]]:
    """Kind, level, index and whether the width changes, of each of `encoder.layers`."""
    width = config.stem_width
    for level, level_width in enumerate(config.channels):
        for index in range(config.n_res_blocks):
            yield "res", level, index, width != level_width
            width = level_width
            if config.level_sizes_px[level] in config.attention_sizes_px:
                yield "attention", level, index, False
        if level + 1 < len(config.channels):
            yield "down", level, 0, False
    yield from _MIDDLE


def decoder_layers(config: ImageTokenizerConfig) -> Iterator[tuple[str, int, int, bool]]:
    """As `encoder_layers`, of `decoder.layers`."""
    yield from _MIDDLE
    width = config.channels[-1]
    for level in reversed(range(len(config.channels))):
        for index in range(config.n_res_blocks + 1):
            yield "res", level, index, width != config.channels[level]
            width = config.channels[level]
            if config.level_sizes_px[level] in config.attention_sizes_px:
                yield "attention", level, index, False
        if level > 0:
            yield "up", level, 0, False


_MIDDLE = (("res", -1, 0, False), ("attention", -1, 1, False), ("res", -1, 2, False))


def network_table(config: ImageTokenizerConfig, encoder: Place, decoder: Place) -> Table:
    """Rows of `encoder.` and `decoder.`, whose names there start so too."""
    table: Table = {}
    parts = (("encoder.", encoder_layers(config), encoder), ("decoder.", decoder_layers(config), decoder))
    for part, layers, place in parts:
        table |= prefixed(part, part, ENDS)
        for n, (kind, level, index, widens) in enumerate(layers):
            rows = {"res": RES_BLOCK | (SKIP if widens else {}), "attention": ATTENTION}.get(kind, RESAMPLE)
            table |= prefixed(f"{part}layers.{n}.", f"{part}{place(kind, level, index)}.", rows)
    return table


def count(theirs: Mapping[str, Tensor], pattern: str, *, step: int = 1) -> int:
    """How many there are, from 0, of names that `pattern` makes with each `step`th number in place of {}."""
    n = 0
    while pattern.format(n * step) in theirs:
        n += 1
    return n


def network_misfits(config: ImageTokenizerConfig) -> list[str]:
    """What no VQGAN has a place for; see `Family.misfits`."""
    if config.architecture != "taming":
        return [f"architecture {config.architecture}"]
    multiples = [width for width in config.channels if width % config.stem_width]
    same = differing(config, {"output": "pixels", "norm_eps": 1e-6})
    return same + [f"a width of {w} beside {config.stem_width}" for w in multiples]


def attention_sizes(levels: Sequence[int], image_size_px: int) -> tuple[int, ...]:
    """Sides of the feature maps of some levels."""
    return tuple(image_size_px >> level for level in levels)
