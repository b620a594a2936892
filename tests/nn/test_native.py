"""Whole sequences through compiled code; steps of decoding are tested beside the GPT."""

import itertools

import pytest
import torch

from vqt2i.nn.native import ROWS_AT_ONCE, NativeTransformer, pack
from vqt2i.nn.transformer import Rotary, Transformer, TransformerConfig

CONFIGS = {
    "default": TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=40),
    "CLIP": TransformerConfig(
        width=96, n_layers=2, n_heads=2, mlp_width=100, norm="layer", mlp="gelu_quick", bias=True, qk_norm=False
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("causal", [False, True])
@torch.inference_mode()
def test_whole_sequences_come_out_as_from_the_transformer(name: str, causal: bool) -> None:
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = Transformer(config).eval()
    for batch, length in ((3, 7), (3, ROWS_AT_ONCE // 2 + 3), (1, 1)):
        x_BLD = torch.randn(batch, length, config.width)
        cos_sin = Rotary((config.head_width // 2,), (100.0,))(torch.arange(length)[None, :, None])
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if causal else None
        expected = model(x_BLD, mask_B1LK=mask, causal=causal, cos_sin=cos_sin)
        found = NativeTransformer(model, config, "fp32")(x_BLD, causal=causal, cos_sin=cos_sin)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_an_earlier_result_stays_as_it_was_when_more_is_computed() -> None:
    torch.manual_seed(0)
    native = NativeTransformer(Transformer(CONFIGS["default"]), CONFIGS["default"], "bf16")
    first = native(torch.randn(2, 5, 32))
    kept = first.clone()
    native(torch.randn(4, 9, 32)), native(torch.randn(1, 5, 32))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("batch", [2, 16, 17, 33])
@torch.inference_mode()
def test_a_sequence_comes_out_the_same_beside_any_number_of_others_bit_by_bit(batch: int, precision: str) -> None:
    torch.manual_seed(0)
    config, x_BLD = CONFIGS["CLIP"], torch.randn(batch, 1, 96)
    native = NativeTransformer(Transformer(config), config, precision)
    assert native(x_BLD).equal(torch.cat([native(x_1LD) for x_1LD in x_BLD.split(1)]))


def test_a_matrix_is_packed_panel_by_panel_and_word_by_word() -> None:
    weight_OI = torch.arange(70 * 3).reshape(70, 3).float()
    words, scale = pack(weight_OI, "bf16")
    assert words.shape == (2, 16, 64, 2) and words.dtype == torch.bfloat16 and scale is None
    for o, i in itertools.product((0, 5, 63, 64, 69), range(3)):
        assert words[o // 64, i // 2, o % 64, i % 2] == weight_OI[o, i].bfloat16()
    assert (words[:, 1, :, 1] == 0).all() and (words[:, 2:] == 0).all() and (words[1, :, 6:] == 0).all()
    words, scale = pack(weight_OI, "int8")
    assert words.dtype == torch.uint8 and len(scale) == 128
    restored = (words[0, 0, :, :3].float() - 128) * scale[:64, None]
    torch.testing.assert_close(restored, weight_OI[:64], rtol=0, atol=209 / 127 / 2)
