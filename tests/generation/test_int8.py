import pytest
import torch

from vqt2i.generation.int8 import Int8Linear, to_int8
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import pad_texts


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_product_is_that_of_weights_rounded_to_8_bits(dtype: torch.dtype) -> None:
    x, weight_OI = torch.randn(5, 1, 40).to(dtype), torch.randn(24, 40) * torch.logspace(-3, 3, 24)[:, None]
    bias_O = torch.randn(24)
    linear = Int8Linear(weight_OI, bias_O)
    scale = weight_OI.abs().amax(-1, keepdim=True) / 127
    assert linear.rounded_OI.dtype == torch.int8 and linear.rounded_OI.abs().max() == 127
    found, expected = linear(x), x.float() @ ((weight_OI / scale).round() * scale).T + bias_O
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2.6}
    torch.testing.assert_close(found.float() / scale.T, expected / scale.T, **tolerance)  # each output by its own size
    assert torch.equal(Int8Linear(torch.zeros(8, 16))(torch.randn(2, 16)), torch.zeros(2, 8))


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "norm": "layer", "bias": True}], ids=str)
@torch.no_grad()
def test_logits_stay_close_and_nothing_of_the_original_changes(make_gpt, changes: dict) -> None:
    gpt = make_gpt(transformer=TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=48, **changes))
    for bias in (p for name, p in gpt.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias, std=0.1)
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    prefix = gpt.layout.text_prefix(pad_texts([[1, 2, 3], [], [9, 8]], 5))
    expected, _ = gpt.prefill(prefix)
    twin = to_int8(gpt)
    found, _ = twin.prefill(prefix)
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.std()
    assert torch.equal(gpt.prefill(prefix)[0], expected)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())
    assert twin.embedding.weight is gpt.embedding.weight
