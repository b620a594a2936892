"""The contrastive scorer: how well does a picture fit a caption?"""

from vqt2i.clip.loss import contrastive_loss
from vqt2i.clip.model import CLIP, CLIPConfig

__all__ = ["CLIP", "CLIPConfig", "contrastive_loss"]
