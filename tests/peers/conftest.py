"""Public checkpoints in small: those of the peers' own code, where they lie beside the checkout, and of our own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vqt2i.peers import FAMILIES
from vqt2i.peers.table import exported

SHARED = Path(__file__).parents[3] / "shared" / "fixtures" / "peers"


@pytest.fixture
def published() -> Callable[[str], Path]:
    """The folder of a published checkpoint by its name; skips the test where it is not there."""

    def find(name: str) -> Path:
        if not SHARED.is_dir():
            pytest.skip("the published checkpoints are not beside this checkout")
        return SHARED / name

    return find


@pytest.fixture
def save_native() -> Callable[..., Path]:
    """Writes one of our models as a checkpoint in a family's layout, its weights under `key`, and more around them."""

    def save(path: Path, family: str, model: nn.Module, key: str = "state_dict", **around: object) -> Path:
        torch.save({key: exported(FAMILIES[family].table(model.config), model.state_dict()), **around}, path)
        return path

    return save


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Fills a model with random numbers, so that a part that is left out is noticed."""

    @torch.no_grad()
    def fill(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
        return model.eval()

    return fill
