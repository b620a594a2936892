"""A prior: from the embedding of a text to that of an image of it, in the space of one scorer.

Source: unCLIP (Ramesh et al. 2022, arXiv 2204.06125), section 2.2, which models the distribution of image embeddings
given a caption, autoregressively or by diffusion, and draws from it. Differs: it reads the text's embedding alone and
gives one answer, the direction of the mean of the embeddings of images that such a text describes.

B batch, E embedding width
"""

from itertools import pairwise

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from vqt2i.config import Config


class PriorConfig(Config):
    """A model folder's configuration. width: of the scorer's embeddings. scorer: its fingerprint."""

    width: PositiveInt
    hidden_width: PositiveInt
    n_layers: PositiveInt
    scorer: str


class Prior(nn.Module):
    """What is to be added to a text's embedding, by an MLP with `n_layers` hidden layers; untrained, nothing."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width] + [config.hidden_width] * config.n_layers
        hidden = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(widths)]
        self.mlp = nn.Sequential(*hidden, nn.Linear(widths[-1], config.width))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, text_BE: Tensor) -> Tensor:
        """Unit vectors of texts to unit vectors that stand for images of them."""
        return F.normalize(text_BE + self.mlp(text_BE), dim=-1)
