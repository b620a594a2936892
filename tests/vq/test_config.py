import pytest

from vqt2i.config import build_config, load_config, save_config
from vqt2i.errors import ConfigError
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.quantizer import ResidualVQConfig


def test_saved_config_loads_equal(tmp_path):
    config = ImageTokenizerConfig(downsample=8, patch_px=1, channels=(8, 8, 16, 16), attention_sizes_px=(4,))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(ImageTokenizerConfig, tmp_path / "config.yaml") == config


def test_sizes_are_derived():
    config = ImageTokenizerConfig(image_size_px=64, downsample=8, patch_px=2, channels=(8, 16, 32))
    assert config.level_sizes_px == (32, 16, 8)
    assert (config.grid_height, config.grid_width, config.n_image_ids) == (8, 8, 64)
    assert config.vocab_size == config.quantizer.codebook_size


def test_the_ids_of_a_cell_stand_side_by_side_in_the_grid():
    config = ImageTokenizerConfig(quantizer=ResidualVQConfig(codebook_size=32, depth=3))
    assert (config.grid_height, config.grid_width, config.n_image_ids, config.vocab_size) == (8, 24, 192, 96)


DALLE = {"architecture": "dalle", "patch_px": 1, "channels": [4, 4, 8]}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"downsample": 6}, "downsample must be a power of two that divides image_size_px (32), found 6"),
        ({"image_size_px": 30}, "divides image_size_px (30), found 4"),
        ({"patch_px": 8}, "patch_px must be a power of two up to downsample (4), found 8"),
        ({"channels": [8]}, "channels must give 2 widths, for feature maps of [16, 8] px; found 1"),
        ({"attention_sizes_px": [32]}, "attention_sizes_px must be among [16, 8], found 32"),
        ({"quantizer": {"kind": "vq", "codebook_sise": 4}}, "codebook_sise: unknown key, did you mean 'codebook_"),
        ({"quantizer": {"kind": "fsq", "codebook_size": 4}}, "codebook_size: unknown key, known keys: kind, levels"),
        ({"quantizer": {"kind": "magic"}}, "quantizer: Input tag 'magic' found using 'kind' does not match"),
        ({"quantizer": {"kind": "vq", "update": "gradient"}}, "codebook_weight: give a number with update 'gradient'"),
        ({"quantizer": {"kind": "vq", "codebook_weight": 1.0}}, "null with update 'ema'"),
        ({"quantizer": {"kind": "vq", "code_dim": 1}}, "codes of code_dim 1 are +1 and -1, found codebook_size 512"),
        ({"quantizer": {"kind": "residual", "depth": 1}}, "quantizer.depth"),
        ({"quantizer": {"kind": "residual", "l2_normalised": True}}, "quantizer.l2_normalised: unknown key"),
        ({"quantizer": {"kind": "fsq", "levels": [8, 2]}}, "numbers of at least 3, found [8, 2]; for codes of bits"),
        ({"quantizer": {"kind": "lfq", "codebook_size": 1000}}, "a power of two, found 1000; the next one is 1024"),
        ({"quantizer": {"kind": "gumbel", "final_temperature": 2}}, "final_temperature (2.0) must be at most temp"),
        ({"architecture": "dalle"}, "architecture 'dalle' has patch_px 1 and encoder 'convolution', found 2"),
        ({**DALLE, "dropout": 0.1}, "architecture 'dalle' has no attention_sizes_px, dropout 0"),
        ({**DALLE, "channels": [4, 8, 6]}, "multiples of 4, found [4, 8, 6]"),
    ],
)
def test_config_that_does_not_fit_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        build_config(ImageTokenizerConfig, values, "vq.yaml")
    assert message in str(error.value)
