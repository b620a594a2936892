import pytest
import torch
from torch import Tensor, nn

from vqt2i.errors import ConfigError
from vqt2i.nn.conv import ResBlock, SpatialAttention
from vqt2i.training.compare import vq_model
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.config import VQConfig

CONFIG = ImageTokenizerConfig(
    architecture="taming", image_size_px=16, downsample=4, patch_px=1, channels=(64, 64, 128), n_res_blocks=2,
    latent_channels=32, quantizer=VQConfig(codebook_size=64, code_dim=8, l2_normalised=False),
)  # fmt: skip


def copy_weights(ours: ImageTokenizer, theirs: nn.Module) -> None:
    """Give ours the weights of a VQModel, block by block in the order of computation."""
    for mine, other in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        middle = [other.mid_block.resnets[0], other.mid_block.attentions[0], other.mid_block.resnets[1]]
        blocks = []
        for level in other.down_blocks if mine is ours.encoder else other.up_blocks:
            samplers = level.downsamplers if mine is ours.encoder else level.upsamplers
            blocks += [*level.resnets, *(samplers or [])]
        blocks = blocks + middle if mine is ours.encoder else middle + blocks
        copies = {"conv_in": other.conv_in, "norm_out": other.conv_norm_out, "conv_out": other.conv_out}
        for name, source in copies.items():
            getattr(mine, name).load_state_dict(source.state_dict())
        for block, source in zip(mine.layers, blocks, strict=True):
            weights = source.state_dict()
            if isinstance(block, ResBlock):
                weights = {key.replace("conv_shortcut", "skip"): value for key, value in weights.items()}
            elif isinstance(block, SpatialAttention):
                qkv = {kind: torch.cat([weights[f"to_{x}.{kind}"] for x in "qkv"]) for kind in ("weight", "bias")}
                weights = {
                    "norm.weight": weights["group_norm.weight"],
                    "norm.bias": weights["group_norm.bias"],
                    "qkv.weight": qkv["weight"][..., None, None],
                    "qkv.bias": qkv["bias"],
                    "out.weight": weights["to_out.0.weight"][..., None, None],
                    "out.bias": weights["to_out.0.bias"],
                }
            block.load_state_dict(weights)
    ours.quantizer.to_code.load_state_dict(theirs.quant_conv.state_dict())
    ours.quantizer.from_code.load_state_dict(theirs.post_quant_conv.state_dict())
    ours.quantizer.codebook.copy_(theirs.quantize.embedding.weight)


@pytest.fixture(scope="module")
def pair() -> tuple[ImageTokenizer, nn.Module]:
    torch.manual_seed(0)
    theirs = vq_model(CONFIG).eval()
    theirs.quantize.embedding.weight.data.normal_(std=0.1)
    ours = ImageTokenizer(CONFIG).eval()
    with torch.no_grad():
        copy_weights(ours, theirs)
    return ours, theirs


def images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("height, width", [(16, 16), (24, 40)])
@torch.no_grad()
def test_it_is_the_network_of_diffusers_vqmodel(pair: tuple[nn.Module, nn.Module], height: int, width: int) -> None:
    ours, theirs = pair
    x = images(height, width)
    latents = theirs.encode(x).latents
    torch.testing.assert_close(ours.quantizer.to_code(ours.encoder(x)), latents, rtol=1e-4, atol=1e-5)
    ids = theirs.quantize(latents)[2][2].view(2, height // 4, width // 4)
    assert torch.equal(ours.encode(x), ids) and len(ids.unique()) > 4
    torch.testing.assert_close(ours.decode(ids), theirs.decode(latents).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_both_have_as_many_parameters(pair: tuple[ImageTokenizer, nn.Module]) -> None:
    # our codebook moves by running means, and is no parameter
    counts = [sum(p.numel() for p in model.parameters()) for model in pair]
    assert counts[0] + 64 * 8 == counts[1]


@pytest.mark.parametrize("changes", [{"patch_px": 2, "channels": (64, 128)}, {"encoder": "patch"}])
def test_what_the_published_network_does_not_have_is_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="architecture 'taming' has patch_px 1 and encoder 'convolution'"):
        ImageTokenizerConfig(**(CONFIG.model_dump() | changes))


def test_a_lean_network_has_no_latent_width_of_its_own() -> None:
    with pytest.raises(ValueError, match="latent_channels of architecture 'lean' is its last width, 64; found 8"):
        ImageTokenizerConfig(latent_channels=8)
    with pytest.raises(ConfigError, match="architecture 'taming'"):
        vq_model(ImageTokenizerConfig())
