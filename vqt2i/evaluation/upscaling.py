"""How near a picture drawn in twice its size comes to the real one of that size, and how near simpler ways come.

B pictures, H, W pixels of the real ones
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.data.images import fit_square, halved, require_side, to_tensor, to_uint8
from vqt2i.data.shapes import check, parse_caption
from vqt2i.data.shards import Split
from vqt2i.generation import Sample, SamplingConfig, TextToImage
from vqt2i.vq.metrics import psnr, ssim

_AT_ONCE = 32


@dataclass(frozen=True)
class UpscalingProtocol:
    """The first `n_samples` of a split, with a caption each or with none."""

    n_samples: int
    seed: int
    sampling: SamplingConfig
    captioned: bool = True


@dataclass(frozen=True)
class Nearness:
    """Of pictures to the real ones, means over them.

    psnr: dB. sharpness: the mean square of differences between neighbouring pixels, as a share of the real ones'.
    same_ids: share of ids that are those of the real ones; None where there are only pixels. right: share in which the
    oracle reads what the caption says; None where the captions are not those of the shapes.
    """

    psnr: float
    ssim: float
    sharpness: float
    same_ids: float | None = None
    right: float | None = None


def measure_upscaling(
    pipeline: TextToImage, split: Split, protocol: UpscalingProtocol,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Nearness]:  # fmt: skip
    """Nearness by the way in which pictures of twice the size were made of halved real ones.

    "bicubic": of the halved pixels. "bicubic, decoded": of what the image tokenizer makes of these, which is all that
    there is of a drawn picture. "ids repeated": each id of these four times, decoded. "drawn": by the GPT. "real ids":
    those of the real picture, decoded; no drawn picture can be expected to come nearer.

    Raises:
        DataError: a picture that is smaller than twice the image tokenizer's size.
    """
    side = 2 * pipeline.vq.config.image_size_px
    pairs = [split[index] for index in range(min(protocol.n_samples, len(split)))]
    for pair in pairs:
        require_side(pair.image_HW3, side, pair.key)
    real = to_tensor(np.stack([fit_square(pair.image_HW3, side) for pair in pairs]))
    captions = [_caption(pair.captions, index) for index, pair in enumerate(pairs)]
    small = halved(real)
    small_ids, real_ids = _encode(pipeline, small), _encode(pipeline, real)
    decoded = _decode(pipeline, small_ids)
    texts = captions if protocol.captioned else [""] * len(pairs)
    given = [
        Sample(text, index, 0, protocol.seed, to_uint8(decoded[index]), small_ids[index].numpy())
        for index, text in enumerate(texts)
    ]
    drawn = pipeline.upscale(given, sampling=protocol.sampling, seed=protocol.seed, on_progress=on_progress)
    drawn_ids = torch.from_numpy(np.stack([sample.image_ids_HW for sample in drawn]))
    per_cell = pipeline.vq.config.quantizer.ids_per_cell
    cells = small_ids.unflatten(2, (-1, per_cell))
    repeated_ids = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(2)
    ways = {
        "bicubic": (_bicubic(small), None),
        "bicubic, decoded": (_bicubic(decoded), None),
        "ids repeated": (_decode(pipeline, repeated_ids), repeated_ids),
        "drawn": (_decode(pipeline, drawn_ids), drawn_ids),
        "real ids": (_decode(pipeline, real_ids), real_ids),
    }
    return {
        name: _compare(made, real, None if ids is None else float((ids == real_ids).float().mean()), captions)
        for name, (made, ids) in ways.items()
    }


def _caption(captions: dict[str, tuple[str, ...]], index: int) -> str:
    """One of a picture's captions, a language each in turn."""
    said = list(captions.values())
    return said[index % len(said)][0] if said else ""


def _compare(made_B3HW: Tensor, real_B3HW: Tensor, same_ids: float | None, captions: Sequence[str]) -> Nearness:
    facts = [parse_caption(caption) for caption in captions]
    right = None
    if None not in facts:
        right = float(np.mean([check(image, f).right for image, f in zip(to_uint8(made_B3HW), facts, strict=True)]))
    return Nearness(
        psnr=float(psnr(made_B3HW, real_B3HW).mean()), ssim=float(ssim(made_B3HW, real_B3HW).mean()),
        sharpness=_contrast(made_B3HW) / _contrast(real_B3HW), same_ids=same_ids, right=right,
    )  # fmt: skip


def _contrast(x_B3HW: Tensor) -> float:
    """The mean square of differences between neighbouring pixels."""
    return float(sum(x_B3HW.diff(dim=axis).square().mean() for axis in (-2, -1)))


def _bicubic(x_B3HW: Tensor) -> Tensor:
    return F.interpolate(x_B3HW, scale_factor=2, mode="bicubic").clamp(-1, 1)


def _encode(pipeline: TextToImage, x_B3HW: Tensor) -> Tensor:
    return torch.cat([pipeline.vq.encode(part.to(pipeline.gpt.device)).cpu() for part in x_B3HW.split(_AT_ONCE)])


def _decode(pipeline: TextToImage, ids_BHW: Tensor) -> Tensor:
    parts = [pipeline.vq.decode(part.to(pipeline.gpt.device)).float().cpu() for part in ids_BHW.split(_AT_ONCE)]
    return torch.cat(parts)
