"""What an image tokenizer keeps of pictures: PSNR, SSIM, LPIPS, the distance of both sets, and how its codes are used.

N pictures, B of them at once
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from vqt2i.data.images import fit_square, to_tensor, to_uint8
from vqt2i.data.shards import Split
from vqt2i.evaluation.features import Extractor, Features, estimate_distances
from vqt2i.evaluation.result import Row
from vqt2i.evaluation.statistics import bootstrap_mean
from vqt2i.vq import AnyImageTokenizer
from vqt2i.vq.lpips import LPIPS
from vqt2i.vq.metrics import CodebookCounter, psnr, ssim

AT_ONCE = 32


class Reconstructions(NamedTuple):
    """Rows, and the first few pictures above what is made of them, uint8 (B, H, W, 3) each."""

    rows: list[Row]
    images: np.ndarray
    reconstructions: np.ndarray


def batches_of(split: Split, n: int, size_px: int) -> Iterator[np.ndarray]:
    """The first `n` pictures of a split, cropped and resampled as for training, uint8 (B, H, W, 3)."""
    n = min(n, len(split))
    for start in range(0, n, AT_ONCE):
        pairs = (split[index] for index in range(start, min(start + AT_ONCE, n)))
        yield np.stack([fit_square(pair.image_HW3, size_px) for pair in pairs])


@torch.inference_mode()
def measure_reconstruction(
    vq: AnyImageTokenizer,
    batches: Iterator[np.ndarray],
    extractor: Extractor | None,
    lpips: LPIPS | None,
    on_images: Callable[[int], None] | None = None,
) -> Reconstructions:
    """Measure what is left of pictures after encoding and decoding, rounded to uint8 as in a file.

    Raises:
        DataError: the pictures are too small for SSIM, or too few for the distances.
    """
    device = vq.device
    codes, values = CodebookCounter(vq.config.vocab_size), {"psnr": [], "ssim": [], **({"lpips": []} if lpips else {})}
    measures = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
    kept, features = [], []
    for image_BHW3 in batches:
        x = to_tensor(image_BHW3).to(device)
        ids_BHW = vq.encode(x)
        made_BHW3 = to_uint8(vq.decode(ids_BHW))
        y = to_tensor(made_BHW3).to(device)
        codes.update(ids_BHW)
        for name, found in values.items():
            found += measures[name](x, y).tolist()
        if extractor is not None:
            features.append([extractor(image_BHW3), extractor(made_BHW3)])
        if not kept:
            kept = [image_BHW3, made_BHW3]
        if on_images:
            on_images(len(image_BHW3))
    rows = [Row(name, *bootstrap_mean(np.array(found)), {}) for name, found in values.items()]
    n, used = len(values["psnr"]), codes.compute()
    if features:
        real, made = (Features.joined(parts) for parts in zip(*features, strict=True))
        found = estimate_distances(made, real, extractor.prefix, paired=True)
        rows += [Row(name, *estimate, {}) for name, estimate in found.items()]
    for name, value in (("code_usage", used.usage), ("code_perplexity", used.perplexity)):
        rows.append(Row(name, value, None, None, n, {}))
    return Reconstructions(rows, *kept)
