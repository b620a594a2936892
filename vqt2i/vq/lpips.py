"""Perceptual distance LPIPS (Zhang et al. 2018, arXiv 1801.03924) on VGG16, from torch-fidelity's parts and weights.

torch-fidelity's own class downloads both weight files when it is built; this one reads them from paths. Its values are
equal (a test); its gradient is finite also where all features of a position are zero, where the other's is NaN.
"""

import pickle
from pathlib import Path

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, NetLinLayer, SampleSimilarityLPIPS
from torchvision.models import VGG16_Weights, vgg16

from vqt2i.config import Config
from vqt2i.errors import CheckpointError

WIDTHS = (64, 128, 256, 512, 512)
SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))  # layers of VGG16 up to relu1_2, relu2_2, ..., relu5_3


class PerceptualConfig(Config):
    """weight: of the LPIPS distance in the loss.

    vgg16_weights: torchvision's VGG16 ImageNet weights. lpips_weights: torch-fidelity's weights-vgg16-lpips.pth.
        Local files; nothing is downloaded.
    """

    weight: PositiveFloat = 1.0
    vgg16_weights: Path
    lpips_weights: Path


class LPIPS(nn.Module):
    """Distance of two image batches; frozen, and always in evaluation mode.

    Raises:
        CheckpointError: a weight file is missing, is no PyTorch file or holds other tensors.
    """

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        vgg = vgg16(weights=None)
        _load(vgg, config.vgg16_weights, f"torchvision's VGG16 weights ({VGG16_Weights.IMAGENET1K_V1.url})")
        self.slices = nn.ModuleList(vgg.features[start:end] for start, end in SLICES)
        lins = nn.ModuleDict({f"lin{i}": NetLinLayer(width, use_dropout=True) for i, width in enumerate(WIDTHS)})
        _load(lins, config.lpips_weights, f"torch-fidelity's LPIPS weights ({URL_VGG16_LPIPS})")
        self.lins = nn.ModuleList(lin.model for lin in lins.values())
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)  # dropout would make the distance random

    def forward(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1], zero for equal ones."""
        x, y = (SampleSimilarityLPIPS.normalize((image + 1) * 127.5) for image in (x_B3HW, y_B3HW))
        distance = 0
        for layers, lin in zip(self.slices, self.lins, strict=True):
            x, y = layers(x), layers(y)
            distance = distance + lin((_unit(x) - _unit(y)).square()).mean((1, 2, 3))
        return distance


def _unit(x_BCHW: Tensor) -> Tensor:
    # vector_norm has gradient 0 at 0, where sqrt(sum(x ** 2)) has NaN
    return x_BCHW / (torch.linalg.vector_norm(x_BCHW, dim=1, keepdim=True) + 1e-10)


def _load(module: nn.Module, path: Path, what: str) -> None:
    hint = f"expected {what} as a local file; nothing is downloaded"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({str(error).splitlines()[0]}); {hint}") from None
