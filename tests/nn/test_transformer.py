import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.nn.transformer import (
    GELUMLP,
    Attention,
    Block,
    Rotary,
    ScaledLayerNorm,
    SwiGLU,
    Transformer,
    TransformerConfig,
    rotate,
)

CONFIG = TransformerConfig(width=24, n_layers=3, n_heads=3, mlp_width=40)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def angles(length: int, config: TransformerConfig = CONFIG) -> tuple[Tensor, Tensor]:
    return Rotary((config.head_width // 2,), (100.0,))(torch.arange(length)[None, :, None])


def rms_normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_a_softmax_written_by_hand(qk_norm: bool) -> None:
    config = CONFIG.model_copy(update={"qk_norm": qk_norm})
    layer, x_BLD = Attention(config, 0), torch.randn(2, 5, 24)
    found = layer(x_BLD, mask_B1LK=causal(5), cos_sin=None, cache=None)
    parts = [F.linear(x_BLD, w).view(2, 5, 3, 8) for w in layer.qkv.weight.chunk(3)]
    q, k, v = parts
    if qk_norm:
        q, k = rms_normed(q), rms_normed(k)
    scores_BNLK = torch.einsum("blnh,bknh->bnlk", q, k) / 8**0.5
    weights = scores_BNLK.masked_fill(~causal(5), -torch.inf).softmax(-1)
    expected = torch.einsum("bnlk,bknh->blnh", weights, v).reshape(2, 5, 24) @ layer.out.weight.T
    torch.testing.assert_close(found, expected)


def test_a_block_agrees_with_pytorchs_multi_head_attention() -> None:
    config = CONFIG.model_copy(update={"qk_norm": False})
    layer, x_BLD = Attention(config, 0), torch.randn(2, 5, 24)
    reference = torch.nn.MultiheadAttention(24, 3, bias=False)
    with torch.no_grad():
        reference.in_proj_weight.copy_(layer.qkv.weight)
        reference.out_proj.weight.copy_(layer.out.weight)
    x_LBD = x_BLD.transpose(0, 1)
    expected, _ = reference(x_LBD, x_LBD, x_LBD, attn_mask=~causal(5)[0, 0])
    found = layer(x_BLD, mask_B1LK=causal(5), cos_sin=None, cache=None)
    torch.testing.assert_close(found, expected.transpose(0, 1))


def test_swiglu_and_a_block_are_their_formulas() -> None:
    mlp, x = SwiGLU(CONFIG), torch.randn(2, 5, 24)
    gate, up = mlp.gate_up.weight.chunk(2)
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)
    block = Block(CONFIG, 0)
    h = x + block.attention(rms_normed(x), mask_B1LK=None, cos_sin=None, cache=None)
    found = block(x, mask_B1LK=None, cos_sin=None, cache=None)
    torch.testing.assert_close(found, h + block.mlp(rms_normed(h)))


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("gelu_quick", lambda x: x * torch.sigmoid(1.702 * x)),
    ],
)
def test_a_gelu_mlp_is_its_formula(kind: str, formula) -> None:
    mlp, x = GELUMLP(CONFIG.model_copy(update={"mlp": kind, "bias": True})), torch.randn(2, 5, 24)
    expected = formula(x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected)


def test_a_sandwiched_block_has_a_norm_at_both_ends_of_each_branch() -> None:
    config = CONFIG.model_copy(update={"norm": "layer", "norm_placement": "sandwich", "mlp": "gelu", "norm_eps": 1e-5})
    block, x = Block(config, 0), torch.randn(2, 5, 24)
    norms = [block.attention_norm, block.attention_out_norm, block.mlp_norm, block.mlp_out_norm]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    first, second, third, fourth = (lambda x, n=n: F.layer_norm(x, (24,), n.weight, n.bias, 1e-5) for n in norms)
    h = x + second(block.attention(first(x), mask_B1LK=None, cos_sin=None, cache=None))
    found = block(x, mask_B1LK=None, cos_sin=None, cache=None)
    torch.testing.assert_close(found, h + fourth(block.mlp(third(h))))


def test_a_scaled_layer_norm_is_layer_norm_and_does_not_see_the_scale() -> None:
    norm, x = ScaledLayerNorm(24, eps=1e-6), torch.randn(3, 5, 24)
    torch.nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (24,), norm.weight, norm.bias), rtol=1e-4, atol=1e-4)
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(norm(x * scale), norm(x))
    assert torch.equal(norm(torch.zeros(1, 24))[0], norm.bias)


def test_biases_are_in_every_linear_map_if_asked_for_and_start_at_zero() -> None:
    model = Transformer(CONFIG.model_copy(update={"bias": True, "mlp": "gelu"}))
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 4 * CONFIG.n_layers and all(torch.equal(m.bias, torch.zeros_like(m.bias)) for m in linear)
    assert not any(m.bias is not None for m in Transformer(CONFIG).modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("relaxed", [True, False])
def test_pb_relax_changes_nothing_in_fp32(relaxed: bool) -> None:
    x = torch.randn(2, 5, 24)
    layer = Attention(CONFIG.model_copy(update={"pb_relax": relaxed}), 0)
    plain = Attention(CONFIG, 0)
    plain.load_state_dict(layer.state_dict())
    how = {"mask_B1LK": causal(5), "cos_sin": angles(5), "cache": None}
    torch.testing.assert_close(layer(x, **how), plain(x, **how))


def test_rotary_scores_depend_on_differences_of_positions_only() -> None:
    rotary = Rotary((2, 1, 1), (1000.0, 10.0, 10.0))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(position_q: list[int], position_k: list[int]) -> Tensor:
        turned = [rotate(x, rotary(torch.tensor([[p]]))) for x, p in ((q, position_q), (k, position_k))]
        return (turned[0] * turned[1]).sum()

    expected = score([5, 2, 1], [3, 1, 4])
    torch.testing.assert_close(score([55, 9, 11], [53, 8, 14]), expected)
    for other in ([6, 2, 1], [5, 3, 1], [5, 2, 2]):
        assert (score(other, [3, 1, 4]) - expected).abs() > 1e-3


def test_rotary_angles_are_as_exact_under_autocast() -> None:
    rotary, positions = Rotary((4,), (100.0,)), torch.arange(300)[None, :, None]
    with torch.autocast("cpu", torch.bfloat16):
        under = rotary(positions)
    assert all(torch.equal(*pair) for pair in zip(under, rotary(positions), strict=True))


def test_rotary_frequencies_stay_exact_in_a_model_cast_to_bf16() -> None:
    rotary = Rotary((4,), (100.0,))
    cast = Rotary((4,), (100.0,)).bfloat16()
    assert torch.equal(cast.frequencies_AP, rotary.frequencies_AP) and cast.frequencies_AP.dtype == torch.float32
    assert "frequencies_AP" not in rotary.state_dict()


def test_rotation_keeps_lengths_and_position_zero_changes_nothing() -> None:
    rotary, x = Rotary((4,), (100.0,)), torch.randn(1, 2, 3, 8)
    turned = rotate(x, rotary(torch.tensor([[[0], [7], [500]]])))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_a_new_model_neither_grows_nor_shrinks_its_stream_with_depth() -> None:
    for n_layers in (2, 12):
        config = TransformerConfig(width=64, n_layers=n_layers, n_heads=4, mlp_width=128)
        stream = {}
        model = Transformer(config)
        model.norm.register_forward_pre_hook(lambda module, inputs, kept=stream: kept.update(x=inputs[0]))
        model(torch.randn(4, 8, 64), mask_B1LK=causal(8))
        assert 0.9 < stream["x"].std() < 1.6


def test_dropout_acts_in_training_only() -> None:
    model, x = Transformer(CONFIG.model_copy(update={"dropout": 0.5})), torch.randn(1, 4, 24)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("sizes", [{"width": 30, "n_heads": 4}, {"width": 24, "n_heads": 5}])
def test_a_width_that_the_heads_cannot_share_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be n_heads"):
        TransformerConfig(**sizes)
