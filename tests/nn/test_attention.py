import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from vqt2i.nn.attention import BLOCK, causal_attention, relaxed_attention


def inputs(length: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """q, k, v, (2, 3, length, 8) each, and a causal mask with padding at the left of the second row."""
    generator = torch.Generator().manual_seed(length)
    qkv = [torch.randn(2, 3, length, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, : length // 3] = False
    return qkv, mask | torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_causal_attention_and_its_gradients_are_those_of_pytorchs_attention(length: int) -> None:
    qkv, mask = inputs(length)
    grad = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    actual = causal_attention(*qkv, mask)
    torch.testing.assert_close(actual, expected)
    expected_grads = torch.autograd.grad(expected, qkv, grad)
    for mine, theirs in zip(torch.autograd.grad(actual, qkv, grad), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "bf16 in autocast"])
def test_bf16_is_rounded_at_the_end_only(autocast: bool) -> None:
    qkv, mask = inputs(BLOCK + 9, torch.bfloat16)
    exact = F.scaled_dot_product_attention(*(x.float() for x in qkv), attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = causal_attention(*qkv, mask)
    torch.testing.assert_close(actual, exact.bfloat16(), rtol=2**-8, atol=1e-6)


def test_it_follows_pytorchs_rules_for_operators() -> None:
    qkv, mask = inputs(BLOCK + 1)
    library.opcheck(causal_attention, (*qkv, mask))


@pytest.mark.parametrize("masked", [True, False])
def test_relaxed_attention_and_its_gradients_are_those_of_plain_attention_in_fp32(masked: bool) -> None:
    qkv, mask = inputs(17)
    mask = mask if masked else None
    expected, found = F.scaled_dot_product_attention(*qkv, attn_mask=mask), relaxed_attention(*qkv, mask)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(y.square().sum(), qkv) for y in (found, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_relaxed_attention_in_fp16_is_finite_and_right_where_plain_scores_overflow() -> None:
    (q, k, v), mask = inputs(9)
    q, k, v = (x.detach().half() for x in (q * 300, k * 300, v))
    plain = ((q @ k.mT) * 8**-0.5).masked_fill(~mask, -torch.inf)
    assert plain.isposinf().any() and plain.softmax(-1).isnan().any()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    found = relaxed_attention(q, k, v, mask)
    assert found.isfinite().all()
    # a score has 11 bits: where two are nearly equal it is lost which is larger
    wrong = (found.double() - exact).abs().amax(-1) > 0.01
    assert wrong.double().mean() < 0.05
