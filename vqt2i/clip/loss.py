"""Symmetric InfoNCE with duplicate captions masked, and retrieval.

B batch (of all ranks, once gathered), E embedding width
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ContrastiveLoss(NamedTuple):
    """loss: nats. accuracy: share of images that pick their own caption in the batch."""

    loss: Tensor
    accuracy: Tensor


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, same_BB: Tensor) -> ContrastiveLoss:
    """Cross-entropy of images over texts and of texts over images, averaged (Radford et al. 2021, figure 3).

    Args:
        image_BE, text_BE: unit vectors; row i of both belong together.
        same_BB: bool, true where two rows have the same caption. Such a pair is no negative: it is left out.
    """
    itself = torch.eye(len(image_BE), dtype=torch.bool, device=image_BE.device)
    logits = (logit_scale * image_BE @ text_BE.T).masked_fill(same_BB & ~itself, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return ContrastiveLoss(loss, (logits.argmax(1) == target).float().mean())


def same_captions(ids_BS: Tensor) -> Tensor:
    """Bool (B, B): which rows of padded ids are equal."""
    return (ids_BS[:, None] == ids_BS[None]).all(-1)


def recall_at(similarity_IT: Tensor, right_IT: Tensor, k: int) -> Tensor:
    """Share of rows with a right column among their k most similar ones.

    Args:
        similarity_IT: images by texts (transpose it for text → image).
        right_IT: bool, true where the text describes the image (several may, with equal captions).
    """
    best = similarity_IT.topk(min(k, similarity_IT.shape[1]), dim=1).indices
    return right_IT.gather(1, best).any(1).float().mean()
