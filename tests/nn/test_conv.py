import pytest
import torch

from vqt2i.nn.conv import Downsample, ResBlock, SpatialAttention, Upsample, group_norm


@pytest.mark.parametrize("channels_in, channels_out", [(16, 16), (16, 24)])
def test_fresh_res_block_equals_its_skip(channels_in, channels_out):
    torch.manual_seed(0)
    block = ResBlock(channels_in, channels_out)
    x = torch.randn(2, channels_in, 6, 4)
    assert torch.equal(block(x), block.skip(x))


def test_fresh_attention_is_the_identity():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 4)
    assert torch.equal(SpatialAttention(32)(x), x)


def test_attention_equals_the_formula_head_by_head():
    torch.manual_seed(0)
    block = SpatialAttention(128)
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(1, 128, 3, 2)
    q, k, v = block.qkv(block.norm(x)).flatten(2)[0].split(128)
    heads = [v[n] @ torch.softmax(q[n].T @ k[n] / 8, dim=-1).T for n in (slice(0, 64), slice(64, 128))]
    expected = x + block.out(torch.cat(heads).view(1, 128, 3, 2))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_attention_refuses_widths_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="200 channels"):
        SpatialAttention(200)


def test_attention_does_not_depend_on_the_order_of_positions():
    torch.manual_seed(0)
    block = SpatialAttention(32)
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(block(x.flip(-1)), block(x).flip(-1))


def test_down_and_up_halve_and_double_the_sides():
    x = torch.zeros(1, 8, 6, 4)
    assert Downsample(8, 16)(x).shape == (1, 16, 3, 2)
    assert Upsample(8, 16)(x).shape == (1, 16, 12, 8)


@pytest.mark.parametrize("channels, groups", [(32, 16), (64, 32), (96, 32), (48, 16), (7, 1), (1, 1)])
def test_group_norm_divides_any_width_into_groups_of_two_or_more(channels, groups):
    assert group_norm(channels).num_groups == groups
