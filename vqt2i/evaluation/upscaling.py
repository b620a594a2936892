"""How near a picture drawn in twice its size comes to the real one of that size, and how near simpler ways come.

B pictures
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.data.images import fit_square, halved, require_side, to_tensor, to_uint8
from vqt2i.data.pairs import Pair
from vqt2i.data.shapes import Facts, check, parse_caption
from vqt2i.data.shards import Split
from vqt2i.evaluation.reconstruction import AT_ONCE
from vqt2i.evaluation.result import Row
from vqt2i.evaluation.statistics import bootstrap_mean
from vqt2i.generation import Sample, SamplingConfig, TextToImage
from vqt2i.generation.upscale import require_upscaler
from vqt2i.vq.metrics import psnr, ssim


def require_large(pipeline: TextToImage, split: Split, n: int) -> list[Pair]:
    """The first `n` pictures of a split.

    Raises:
        PromptError: the GPT does not upscale. DataError: a picture is smaller than twice the image tokenizer's size.
    """
    require_upscaler(pipeline.gpt)
    pairs = [split[index] for index in range(min(n, len(split)))]
    for pair in pairs:
        require_side(pair.image_HW3, 2 * pipeline.vq.config.image_size_px, pair.key)
    return pairs


def measure_upscaling(
    pipeline: TextToImage, pairs: Sequence[Pair], sampling: SamplingConfig, seed: int,
    on_progress: Callable[[float], None] | None = None,
) -> list[Row]:  # fmt: skip
    """Nearness by the way in which pictures of twice the image tokenizer's size were made of the halved real ones.

    "bicubic": of the halved pixels. "bicubic, decoded": of what the image tokenizer makes of these, which is all that
    there is of a drawn picture. "ids repeated": each id of these four times, decoded. "drawn": by the GPT, for a
    caption each. "real ids": those of the real picture, decoded; no drawn picture can be expected to come nearer.

    The rows: psnr, ssim; sharpness, the mean square of differences between neighbouring pixels as a share of the real
    picture's; same_ids, the share of ids that are the real picture's; right, whether the oracle reads what the caption
    says, where all captions are of the shapes.
    """
    real = to_tensor(np.stack([fit_square(pair.image_HW3, 2 * pipeline.vq.config.image_size_px) for pair in pairs]))
    captions = [_caption(pair.captions, index) for index, pair in enumerate(pairs)]
    small = halved(real)
    small_ids, real_ids = _encode(pipeline, small), _encode(pipeline, real)
    decoded = _decode(pipeline, small_ids)
    given = [
        Sample(caption, index, 0, seed, to_uint8(decoded[index]), small_ids[index].numpy())
        for index, caption in enumerate(captions)
    ]
    drawn = pipeline.upscale(given, sampling=sampling, seed=seed, on_progress=on_progress)
    drawn_ids = torch.from_numpy(np.stack([sample.image_ids_HW for sample in drawn]))
    cells = small_ids.unflatten(2, (-1, pipeline.vq.config.ids_per_cell))
    repeated_ids = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(2)
    facts = [parse_caption(caption) for caption in captions]
    rows = []
    for way, pixels in {"bicubic": small, "bicubic, decoded": decoded}.items():
        enlarged = F.interpolate(pixels, scale_factor=2, mode="bicubic").clamp(-1, 1)
        rows += _rows(way, _nearness(enlarged, real, facts))
    for way, ids in {"ids repeated": repeated_ids, "drawn": drawn_ids, "real ids": real_ids}.items():
        same = {"same_ids": (ids == real_ids).float().mean((1, 2))}
        rows += _rows(way, _nearness(_decode(pipeline, ids), real, facts) | same)
    return rows


def _caption(captions: dict[str, tuple[str, ...]], index: int) -> str:
    """One of a picture's captions, a language each in turn."""
    said = list(captions.values())
    return said[index % len(said)][0] if said else ""


def _nearness(made_B3HW: Tensor, real_B3HW: Tensor, facts: Sequence[Facts | None]) -> dict[str, Tensor]:
    """Of each picture, (B,) each."""
    values = {"psnr": psnr(made_B3HW, real_B3HW), "ssim": ssim(made_B3HW, real_B3HW)}
    values["sharpness"] = _contrast(made_B3HW) / _contrast(real_B3HW).clamp_min(1e-6)
    if None not in facts:
        pictures = zip(to_uint8(made_B3HW), facts, strict=True)
        values["right"] = torch.tensor([float(check(image_HW3, stated).right) for image_HW3, stated in pictures])
    return values


def _contrast(x_B3HW: Tensor) -> Tensor:
    """The mean square of differences between neighbouring pixels, (B,)."""
    return sum(x_B3HW.diff(dim=axis).square().mean((1, 2, 3)) for axis in (-2, -1))


def _rows(way: str, values: dict[str, Tensor]) -> list[Row]:
    return [Row(name, *bootstrap_mean(value_B.double().numpy()), {"way": way}) for name, value_B in values.items()]


def _encode(pipeline: TextToImage, x_B3HW: Tensor) -> Tensor:
    return torch.cat([pipeline.vq.encode(part.to(pipeline.gpt.device)).cpu() for part in x_B3HW.split(AT_ONCE)])


def _decode(pipeline: TextToImage, ids_BHW: Tensor) -> Tensor:
    device = pipeline.gpt.device
    return torch.cat([pipeline.vq.decode(part.to(device)).float().cpu() for part in ids_BHW.split(AT_ONCE)])
