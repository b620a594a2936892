import math

import pytest
import torch
from torch import nn

from vqt2i.vq.autoencoder import ImageTokenizer
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.dalle import Bottleneck
from vqt2i.vq.logit_laplace import location_of, logit_laplace_loss, to_open_interval
from vqt2i.vq.quantizer import GumbelConfig

TINY = ImageTokenizerConfig(
    architecture="dalle", image_size_px=16, patch_px=1, channels=(8, 8, 16), latent_channels=12, output="logit_laplace",
    quantizer=GumbelConfig(codebook_size=20),
)  # fmt: skip


def test_pixels_and_locations_are_inverse():
    x = torch.linspace(-1, 1, 11)
    assert to_open_interval(x)[[0, -1]].tolist() == pytest.approx([0.1, 0.9])  # the published margin
    pictures = torch.rand(2, 3, 4, 4) * 2 - 1
    decoded = torch.cat((torch.logit(to_open_interval(pictures)), torch.randn(2, 3, 4, 4)), dim=1)
    torch.testing.assert_close(location_of(decoded), pictures)


def test_logit_laplace_is_a_density_over_the_unit_interval():
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    target = ((u - 0.1) / 0.4 - 1).view(1, 1, -1, 1)
    for location, log_scale in ((0.0, 0.0), (1.0, -1.0)):
        decoded = torch.tensor([location, log_scale]).view(1, 2, 1, 1).expand(1, 2, len(u), 1)
        density = torch.stack([
            torch.exp(-logit_laplace_loss(decoded[:, :, [i]], target[:, :, [i]])) for i in range(0, len(u), 1000)
        ])  # fmt: skip
        assert density.sum().item() * 1000 / 200_000 == pytest.approx(1, abs=0.02)


def test_loss_equals_the_published_formula():
    torch.manual_seed(0)
    x, location, scale = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    u = to_open_interval(x)
    density = torch.exp(-(torch.logit(u) - location).abs() / scale) / (2 * scale * u * (1 - u))
    loss = logit_laplace_loss(torch.cat((location, scale.log()), dim=1), x)
    assert loss.item() == pytest.approx(-density.log().mean().item(), rel=1e-5)


def test_a_block_is_its_skip_plus_a_little_of_its_residual():
    torch.manual_seed(0)
    block, x = Bottleneck(8, 16, (3, 3, 3, 1), 0.25), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(x), block.skip(x) + 0.25 * block.residual(x))
    convolutions = [layer for layer in block.residual if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [4, 4, 4, 16]
    assert isinstance(Bottleneck(8, 8, (1,) * 4, 1.0).skip, nn.Identity)


def test_its_features_have_the_widths_of_the_configuration():
    model = ImageTokenizer(TINY).eval()
    assert model.quantizer.to_code.in_channels == 16 and model.quantizer.codebook.shape == (20, 12)
    assert model.decoder.conv_out.out_channels == 6
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    out = model(x)
    assert out.ids_BHW.shape == (2, 4, 6) and out.reconstruction_B3HW.shape == x.shape
    torch.testing.assert_close(model.decode(model.encode(x)), out.reconstruction_B3HW.clamp(-1, 1))


def test_published_size_has_the_published_number_of_parameters():
    config = ImageTokenizerConfig(
        architecture="dalle", image_size_px=256, downsample=8, patch_px=1, channels=(256, 512, 1024, 2048),
        n_res_blocks=2, latent_channels=128, output="logit_laplace", quantizer=GumbelConfig(codebook_size=8192),
    )  # fmt: skip
    with torch.device("meta"):
        model = ImageTokenizer(config)
    encoder = [*model.encoder.parameters(), *model.quantizer.to_code.parameters()]
    decoder = [*model.decoder.parameters(), model.quantizer.codebook]
    counts = [sum(math.prod(p.shape) for p in part) for part in (encoder, decoder)]
    # theirs has a bias of 128 more, which the codes hold here
    assert counts == [53_786_240, 43_829_766 - 128]
