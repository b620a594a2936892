import pytest
import torch
from pydantic import ValidationError
from torch import nn

from vqt2i.vq.autoencoder import VQOutput
from vqt2i.vq.discriminator import AdversarialConfig, PatchDiscriminator
from vqt2i.vq.logit_laplace import location_of, logit_laplace_loss
from vqt2i.vq.losses import (
    ReconstructionLoss,
    VQGANLossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def output(reconstruction: torch.Tensor, decoded: torch.Tensor | None = None) -> VQOutput:
    """What the losses read of a tokenizer's output."""
    return VQOutput(reconstruction, reconstruction if decoded is None else decoded, None, None, 0, {})


def test_pixel_losses_equal_their_formula():
    x, y = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), -0.1)
    loss = ReconstructionLoss(VQGANLossConfig(l1_weight=2.0, l2_weight=3.0))
    assert loss(output(x), y).item() == pytest.approx(2 * 0.6 + 3 * 0.36)
    assert loss(output(x), x).item() == 0


def test_logit_laplace_reads_what_the_decoder_said():
    decoded, y = torch.randn(2, 6, 4, 4), torch.rand(2, 3, 4, 4)
    loss = ReconstructionLoss(VQGANLossConfig(l1_weight=0.5, l2_weight=0, logit_laplace_weight=2.0))
    expected = 0.5 * (location_of(decoded) - y).abs().mean() + 2 * logit_laplace_loss(decoded, y)
    torch.testing.assert_close(loss(output(location_of(decoded), decoded), y), expected)


def test_no_pixel_loss_at_all_is_refused():
    with pytest.raises(ValidationError, match="all 0"):
        VQGANLossConfig(l1_weight=0, l2_weight=0)


def test_hinge_losses_equal_hand_computed():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.5) / 2))
    assert generator_loss(fake).item() == pytest.approx(1.25)


def test_adaptive_weight_equals_the_ratio_of_gradient_norms():
    torch.manual_seed(0)
    layer, critic, h, target = nn.Linear(3, 2), nn.Linear(2, 1), torch.randn(5, 3), torch.randn(5, 2)
    y = layer(h)
    pixels, adversarial = (y - target).square().mean(), -critic(y).mean()
    by_pixels = 2 * (y - target).T @ h / y.numel()
    by_critic = -critic.weight.T @ h.sum(0, keepdim=True) / len(h)
    weight = adaptive_weight(pixels, adversarial, layer.weight, highest=1e4)
    assert weight.item() == pytest.approx((by_pixels.norm() / by_critic.norm()).item(), rel=1e-4)
    assert not weight.requires_grad
    assert adaptive_weight(pixels, adversarial, layer.weight, highest=0.25).item() == 0.25
    (pixels + weight * adversarial).backward()  # the graph is still there


def test_discriminator_has_one_logit_per_patch():
    for n_layers, height, width in ((1, 8, 8), (3, 32, 16), (4, 32, 32)):
        model = PatchDiscriminator(AdversarialConfig(channels=4, n_layers=n_layers))
        logits = model(torch.zeros(2, 3, height, width))
        assert logits.shape == (2, 1, height >> n_layers, width >> n_layers)


def test_logits_of_a_picture_do_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    model = PatchDiscriminator(AdversarialConfig(channels=4))
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))
