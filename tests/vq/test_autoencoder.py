import pytest
import torch

from vqt2i.checkpoint import load_model, save_model
from vqt2i.errors import DataError
from vqt2i.vq.autoencoder import ImageTokenizer
from vqt2i.vq.config import ImageTokenizerConfig, VQConfig
from vqt2i.vq.metrics import psnr

TINY = ImageTokenizerConfig(channels=(8, 16), quantizer=VQConfig(codebook_size=32, code_dim=4))

PATCH = TINY.model_copy(update={"encoder": "patch"})


def make(config: ImageTokenizerConfig = TINY) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(config)


def images(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY.model_copy(update={"attention_sizes_px": (8, 16)}),
        PATCH,
        PATCH.model_copy(update={"n_res_blocks": 0, "downsample": 8, "channels": (8, 8, 8)}),
        ImageTokenizerConfig(downsample=8, patch_px=1, channels=(4, 4, 8, 8), n_res_blocks=2),
        ImageTokenizerConfig(downsample=4, patch_px=4, channels=(16,), n_res_blocks=0, dropout=0.1),
    ],
)
@pytest.mark.parametrize("height, width", [(32, 32), (16, 48)])
def test_ids_are_a_grid_and_decode_to_the_same_size(config, height, width):
    model = make(config).eval()
    x = images(2, height, width)
    ids = model.encode(x)
    assert ids.dtype == torch.long
    assert ids.shape == (2, height // config.downsample, width // config.downsample)
    assert 0 <= ids.min() and ids.max() < config.vocab_size
    pictures = model.decode(ids)
    assert pictures.shape == x.shape
    assert pictures.abs().max() <= 1


def test_square_training_images_give_the_configured_number_of_ids():
    assert make().encode(images(1)).numel() == TINY.n_image_ids


def test_forward_equals_encode_and_decode_in_eval_mode():
    model = make().eval()
    x = images()
    out = model(x)
    assert torch.equal(out.ids_BHW, model.encode(x))
    torch.testing.assert_close(out.reconstruction_B3HW.clamp(-1, 1), model.decode(out.ids_BHW))


def test_with_the_patch_encoder_an_id_depends_on_its_own_patch_alone():
    x = images(1)
    other = images(2)[1:].clone()
    other[:, :, 8:12, 20:24] = x[:, :, 8:12, 20:24]
    same = {encoder: make(TINY.model_copy(update={"encoder": encoder})).eval() for encoder in ("patch", "convolution")}
    latents = {name: [model.encoder(picture)[0, :, 2, 5] for picture in (x, other)] for name, model in same.items()}
    torch.testing.assert_close(*latents["patch"])
    assert not torch.allclose(*latents["convolution"], atol=1e-2)
    # a picture of one patch, repeated, is a grid of one id, whatever the size
    ids = same["patch"].encode(x[:, :, :4, :4].repeat(1, 1, 8, 12))
    assert ids.shape == (1, 8, 12) and (ids == ids[0, 0, 0]).all()


def test_ids_of_an_image_do_not_depend_on_its_neighbours():
    model = make().eval()
    x = images(8)
    assert torch.equal(model.encode(x)[3:4], model.encode(x[3:4]))


def test_every_trained_parameter_gets_a_gradient():
    for update, weight in (("ema", None), ("gradient", 1.0)):
        quantizer = VQConfig(codebook_size=32, code_dim=4, update=update, codebook_weight=weight)
        model = make(TINY.model_copy(update={"quantizer": quantizer, "attention_sizes_px": (8,)})).train()
        out = model(images())
        (out.reconstruction_B3HW.square().mean() + out.quantizer_loss).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_saved_folder_loads_to_equal_ids_and_pictures(tmp_path):
    model = make().train()
    model(images())  # usage and codebook leave their first state
    save_model(tmp_path / "vq", model.eval(), model.config, {})
    loaded = load_model(tmp_path / "vq", ImageTokenizerConfig, ImageTokenizer)
    assert loaded.config == model.config
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    ids = model.encode(images())
    assert torch.equal(loaded.encode(images()), ids)
    assert torch.equal(loaded.decode(ids), model.decode(ids))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32), (1, 3, 32, 34)])
def test_images_of_a_wrong_shape_are_refused_by_shape(shape):
    model = make()
    for call in (model, model.encode):
        with pytest.raises(DataError, match=rf"sides that 4 divides, found \({shape[0]}, "):
            call(torch.zeros(shape))


def test_ids_that_are_none_of_ours_are_refused():
    model = make()
    for wrong in (torch.full((1, 8, 8), 32), torch.full((1, 8, 8), -1)):
        with pytest.raises(DataError, match="expected 0 to 31"):
            model.decode(wrong)
    for wrong in (torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, 8, 8)):
        with pytest.raises(DataError, match="expected an integer tensor"):
            model.decode(wrong)


def test_eight_pictures_are_learned_to_above_25_db():
    model = make().train()
    blocks = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = torch.nn.functional.interpolate(blocks, scale_factor=8.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    before = psnr(model.eval()(x).reconstruction_B3HW, x).mean()
    model.train()
    for _ in range(200):
        out = model(x)
        optimizer.zero_grad()
        ((out.reconstruction_B3HW - x).square().mean() + out.quantizer_loss).backward()
        optimizer.step()
    after = psnr(model.eval()(x).reconstruction_B3HW, x).mean()
    assert before < 12
    assert after > 25
