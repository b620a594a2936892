"""vqt2i: autoregressive text-to-image, from captioned images to reranked pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqt2i.generation import (
        Box,
        Extend,
        KeepTop,
        Mask,
        Mix,
        Paste,
        Picture,
        Sample,
        SamplingConfig,
        TextToImage,
        Vary,
    )

__version__ = "0.1.0"
__all__ = [
    "Box",
    "Extend",
    "KeepTop",
    "Mask",
    "Mix",
    "Paste",
    "Picture",
    "Sample",
    "SamplingConfig",
    "TextToImage",
    "Vary",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first asked for: `import vqt2i` and `--help` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vqt2i import generation

    return getattr(generation, name)
