"""The contrastive scorer: how well does a picture fit a caption?"""

from vqt2i.clip.embed import ModalityGap, embed_images, embed_texts, modality_gap, perturbed, shifted_texts
from vqt2i.clip.loss import contrastive_loss
from vqt2i.clip.model import CLIP, CLIPConfig
from vqt2i.clip.prior import Prior, PriorConfig

__all__ = [
    "CLIP",
    "CLIPConfig",
    "ModalityGap",
    "Prior",
    "PriorConfig",
    "contrastive_loss",
    "embed_images",
    "embed_texts",
    "modality_gap",
    "perturbed",
    "shifted_texts",
]
