import pytest
import torch

from vqt2i.config import build_config
from vqt2i.errors import ConfigError
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import VQConfig

CONFIG = ImageTokenizerConfig(
    architecture="strided", image_size_px=16, downsample=8, patch_px=2, channels=(8, 12, 16), latent_channels=6,
    n_res_blocks=0, quantizer=VQConfig(codebook_size=9, code_dim=4),
)  # fmt: skip


@pytest.fixture
def vq() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(CONFIG)


def test_each_level_halves_the_sides_and_the_decoder_doubles_them(vq: ImageTokenizer) -> None:
    x = torch.rand(2, 3, 32, 16) * 2 - 1
    assert vq.encoder(x).shape == (2, 16, 4, 2)
    ids = vq.eval().encode(x)
    assert ids.shape == (2, 4, 2) and vq.decode(ids).shape == x.shape


def test_it_learns(vq: ImageTokenizer) -> None:
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    out = vq.train()(x)
    ((out.reconstruction_B3HW - x).square().mean() + out.quantizer_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vq.parameters())


@torch.no_grad()
def test_pixels_are_normalised_before_they_are_padded(vq: ImageTokenizer) -> None:
    vq.encoder.pixel_mean.fill_(0.25)
    vq.encoder.pixel_std.fill_(0.5)
    x = torch.rand(1, 3, 16, 16)
    found = vq.encoder(x)
    vq.encoder.pixel_mean.fill_(0)
    vq.encoder.pixel_std.fill_(1)
    torch.testing.assert_close(found, vq.encoder((x - 0.25) / 0.5))


@pytest.mark.parametrize(("values", "told"), [
    ({"patch_px": 1, "channels": (8, 12, 16, 16)}, "has patch_px 2"),
    ({"n_res_blocks": 1}, "n_res_blocks 0; found"),
    ({"attention_sizes_px": (2,)}, "no attention_sizes_px"),
    ({"norm_eps": 1e-5}, "norm_eps 1e-05: of architecture 'taming' only"),
])  # fmt: skip
def test_what_it_does_not_have_is_refused(values: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_config(ImageTokenizerConfig, CONFIG.model_dump() | values, "test")
