"""Embeddings of pictures and texts of any size and length, and the gap between the two in a scorer's space.

B batch, E embedding width
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.clip.model import CLIP
from vqt2i.text.batch import pad_texts


def embed_images(clip: CLIP, image_B3HW: Tensor) -> Tensor:
    """Unit vectors (B, E) of images in [-1, 1], resampled to the size that the scorer reads."""
    size = (clip.config.image_size_px,) * 2
    if image_B3HW.shape[2:] != size:
        image_B3HW = F.interpolate(image_B3HW, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return clip.encode_image(image_B3HW)


def embed_texts(clip: CLIP, texts: Sequence[Sequence[int]]) -> Tensor:
    """Unit vectors (B, E) of texts, cut to the length that the scorer reads. Equal texts are read once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(map(tuple, texts)))}
    batch = pad_texts([list(text) for text in rows], clip.config.text_length)
    device = next(clip.parameters()).device
    return clip.encode_text(*(t.to(device) for t in batch))[[rows[tuple(text)] for text in texts]]


class ModalityGap(NamedTuple):
    """What separates embeddings of images from those of texts (Liang et al. 2022, arXiv 2203.02053, section 4.2).

    shift_E: from the mean of texts to that of images. distance: its length. cosine: of an image and its own text, on
    average. cosine_of_others: of an image and the texts of others. shifted_cosine: of an image and its own text, once
    texts are moved by the shift, which closes the gap.
    """

    shift_E: Tensor
    distance: Tensor
    cosine: Tensor
    cosine_of_others: Tensor
    shifted_cosine: Tensor


def modality_gap(image_BE: Tensor, text_BE: Tensor) -> ModalityGap:
    """The gap in unit vectors of pairs; row i of both belongs together, and there are at least two."""
    shift_E = image_BE.mean(0) - text_BE.mean(0)
    similarity_BB = image_BE @ text_BE.T
    matched = similarity_BB.diagonal().mean()
    n = len(image_BE)
    others = (similarity_BB.sum() - similarity_BB.diagonal().sum()) / (n * (n - 1))
    shifted = (image_BE * shifted_texts(text_BE, shift_E)).sum(-1).mean()
    return ModalityGap(shift_E, shift_E.norm(), matched, others, shifted)


def shifted_texts(text_BE: Tensor, shift_E: Tensor) -> Tensor:
    """Embeddings of texts moved to where those of images lie, of unit length again (ibid.)."""
    return F.normalize(text_BE + shift_E, dim=-1)


def perturbed(embedding_BE: Tensor, level: float) -> Tensor:
    """Unit vectors moved in a random direction by `level` of their length, of unit length again.

    What texts are to images is so covered where only images are trained on. These are the "fixed perturbations" of
    LAFITE (Zhou et al. 2021, arXiv 2111.13792, section 3.1): h / |h| with h = f + ξ |f| ε / |ε|, f the image's
    embedding, ε of a standard normal distribution and ξ the level. LAFITE's published code mixes instead, (1 - ξ) f +
    ξ ε / |ε|, so that its ξ of 0.75 is a level of ξ / (1 - ξ) = 3 here.
    """
    noise_BE = F.normalize(torch.randn_like(embedding_BE), dim=-1)
    return F.normalize(embedding_BE + level * embedding_BE.norm(dim=-1, keepdim=True) * noise_BE, dim=-1)
