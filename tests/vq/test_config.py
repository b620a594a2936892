import pytest

from vqt2i.config import build_config, load_config, save_config
from vqt2i.errors import ConfigError
from vqt2i.vq.config import ImageTokenizerConfig


def test_saved_config_loads_equal(tmp_path):
    config = ImageTokenizerConfig(downsample=8, patch_px=1, channels=(8, 8, 16, 16), attention_sizes_px=(4,))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(ImageTokenizerConfig, tmp_path / "config.yaml") == config


def test_sizes_are_derived():
    config = ImageTokenizerConfig(image_size_px=64, downsample=8, patch_px=2, channels=(8, 16, 32))
    assert config.level_sizes_px == (32, 16, 8)
    assert (config.grid_size, config.n_image_ids, config.vocab_size) == (8, 64, config.quantizer.codebook_size)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"downsample": 6}, "downsample must be a power of two that divides image_size_px (32), found 6"),
        ({"image_size_px": 30}, "divides image_size_px (30), found 4"),
        ({"patch_px": 8}, "patch_px must be a power of two up to downsample (4), found 8"),
        ({"channels": [8]}, "channels must give 2 widths, for feature maps of [16, 8] px; found 1"),
        ({"attention_sizes_px": [32]}, "attention_sizes_px must be among [16, 8], found 32"),
        ({"quantizer": {"codebook_sise": 4}}, "quantizer.codebook_sise: unknown key, did you mean 'codebook_size'?"),
        ({"quantizer": {"kind": "magic"}}, "quantizer.kind"),
        ({"quantizer": {"update": "gradient"}}, "codebook_weight: give a number with update 'gradient'"),
        ({"quantizer": {"codebook_weight": 1.0}}, "null with update 'ema'"),
    ],
)
def test_config_that_does_not_fit_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        build_config(ImageTokenizerConfig, values, "vq.yaml")
    assert message in str(error.value)
