"""Weights are random, in the layout of the published files; a value of LPIPS itself is not claimed here."""

import pytest
import torch
import torch_fidelity.sample_similarity_lpips as reference
from torch import nn
from torchvision.models import vgg16

from vqt2i.errors import CheckpointError
from vqt2i.vq.lpips import LPIPS, WIDTHS, PerceptualConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(VGG16 weights, LPIPS weights) as files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(small_vgg16().state_dict(), folder / "vgg16.pth")
    lins = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
    torch.save(lins, folder / "lpips.pth")
    return folder / "vgg16.pth", folder / "lpips.pth"


@pytest.fixture(autouse=True)
def without_the_large_classifier(monkeypatch):
    monkeypatch.setattr("vqt2i.vq.lpips.vgg16", small_vgg16)


def small_vgg16(weights: None = None) -> nn.Module:
    """VGG16 whose classifier (500 MB, not used by LPIPS) is cut to one number."""
    with torch.device("meta"):
        model = vgg16(weights=None)
    model.classifier = nn.Linear(1, 1)
    model.to_empty(device="cpu")
    for conv in (m for m in model.features if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight)
        nn.init.normal_(conv.bias, std=0.1)
    return model


@pytest.fixture(scope="module")
def pictures():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x, x.roll(3, dims=-1)


def make(files) -> LPIPS:
    return LPIPS(PerceptualConfig(vgg16_weights=files[0], lpips_weights=files[1]))


def test_distance_is_zero_for_equal_images_and_positive_for_others(files, pictures):
    x, y = pictures
    lpips = make(files)
    assert lpips(x, x).tolist() == [0.0, 0.0]
    assert (lpips(x, y) > 0.01).all()


def test_distance_equals_torch_fidelity(files, pictures, monkeypatch):
    monkeypatch.setattr(reference, "load_state_dict_from_url", lambda *_, **__: torch.load(files[1]))

    def loaded_vgg16() -> nn.Module:
        model = small_vgg16()
        model.load_state_dict(torch.load(files[0]))
        return model

    monkeypatch.setattr(reference, "torchvision_load_pretrained_vgg16", loaded_vgg16)
    theirs = reference.SampleSimilarityLPIPS("lpips")
    x, y = pictures
    torch.testing.assert_close(make(files)(x, y), theirs((x + 1) * 127.5, (y + 1) * 127.5).flatten())


def test_nothing_is_random_or_trained(files, pictures):
    x, y = pictures
    lpips = make(files).train()
    assert torch.equal(lpips(x, y), lpips(x, y))
    assert not any(p.requires_grad for p in lpips.parameters())


def test_gradient_is_finite_where_all_features_are_zero(files):
    lpips = make(files)
    nn.init.constant_(lpips.slices[0][2].bias, -1e6)  # the second ReLU passes nothing
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips(x, torch.ones(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_missing_weights_are_refused_by_name(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file; expected torchvision's VGG16 weights"):
        make((tmp_path / "nowhere.pth", files[1]))
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file; expected torch-fidelity's LPIPS weights"):
        make((files[0], tmp_path / "nowhere.pth"))


def test_damaged_or_other_weights_are_refused_by_name(files, tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(CheckpointError, match=r"text\.pth: cannot be loaded"):
        make((tmp_path / "text.pth", files[1]))
    with pytest.raises(CheckpointError, match=r"lpips\.pth: cannot be loaded .*nothing is downloaded"):
        make((files[1], files[1]))
