"""Cached pieces of a sequence against the whole of it."""

import pytest
import torch
from torch import Tensor

from vqt2i.nn.cache import BranchedCache, Branches, PrefixCache, StaticBranches
from vqt2i.nn.transformer import Rotary, Transformer, TransformerConfig

CONFIG = TransformerConfig(width=24, n_layers=3, n_heads=3, mlp_width=40)
CPU = torch.device("cpu")


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> Transformer:
    return Transformer(CONFIG).eval().requires_grad_(False)


def prefilled(model: Transformer, x_GPD: Tensor, mask: Tensor | None = None) -> PrefixCache:
    cache = PrefixCache(CONFIG, *x_GPD.shape[:2], CPU, torch.float32)
    model(x_GPD, mask_B1LK=causal(x_GPD.shape[1]) if mask is None else mask, causal=True, cache=cache)
    return cache


def test_cached_pieces_match_the_whole_whatever_the_cut(model: Transformer) -> None:
    x_BLD = torch.randn(2, 7, 24)
    cos, sin = Rotary((CONFIG.head_width // 2,), (100.0,))(torch.arange(7)[None, :, None])
    whole = model(x_BLD, mask_B1LK=causal(7), cos_sin=(cos, sin))
    for cuts in ([7], [3, 4], [1] * 7, [5, 1, 1]):
        cache = PrefixCache(CONFIG, 2, 7, CPU, torch.float32)
        parts, start = [], 0
        for size in cuts:
            stop = start + size
            at = (cos[:, :, start:stop], sin[:, :, start:stop])
            mask = causal(stop)[:, :, start:]
            parts.append(model(x_BLD[:, start:stop], mask_B1LK=mask, cos_sin=at, cache=cache))
            start = stop
        assert cache.n_filled == 7
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def static(prefix: PrefixCache, real_GP: Tensor, n_each: int, length: int) -> StaticBranches:
    """As `Branches`, in room that another prefix was continued in before."""
    branches = StaticBranches(prefix, *real_GP.shape[:1], n_each, real_GP.shape[1], length)
    for _ in range(2):
        for room in (*branches.prefix_kv, *branches.kv):
            room.normal_()
        branches.n_filled += 3
        branches.restart(prefix, real_GP, torch.arange(len(real_GP)))
    return branches


@pytest.mark.parametrize("kind", [Branches, static])
@pytest.mark.parametrize("cuts", [[4], [1, 1, 1, 1], [3, 1], [1, 2, 1]], ids=str)
def test_branches_of_ragged_prefixes_match_the_whole_of_each_row(model: Transformer, cuts: list[int], kind) -> None:
    # two prefixes of 3 with three branches each, one of 5 with two, the first of them left-padded by one
    sizes, n_each = [(2, 3), (1, 5)], [3, 2]
    prefixes = [torch.randn(n, length, 24) for n, length in sizes]
    real = [torch.tensor([[False, True, True], [True, True, True]]), torch.ones(1, 5, dtype=torch.bool)]
    own_BLD = torch.randn(8, 4, 24)
    mask = causal(3) & real[0][:, None, None] | torch.eye(3, dtype=torch.bool)
    caches = [prefilled(model, prefixes[0], mask), prefilled(model, prefixes[1])]
    cache = BranchedCache([kind(*parts, 4) for parts in zip(caches, real, n_each, strict=True)])
    found = torch.cat([model(part, cache=cache) for part in own_BLD.split(cuts, dim=1)], dim=1)

    for row in range(8):
        group, prefix = (0, row // 3) if row < 6 else (1, 0)
        x_PD = prefixes[group][prefix][real[group][prefix]]  # alone, without padding
        whole = model(torch.cat((x_PD, own_BLD[row]))[None], mask_B1LK=causal(len(x_PD) + 4))
        torch.testing.assert_close(found[row], whole[0, len(x_PD) :])
    assert cache.n_filled == 4


def test_branches_hold_each_prefix_once_and_change_nothing_of_it(model: Transformer) -> None:
    prefix = prefilled(model, torch.randn(2, 3, 24))
    before = prefix.kv.clone()
    branches = Branches(prefix, torch.ones(2, 3, dtype=torch.bool), 5, 4)
    assert branches.prefix_kv.data_ptr() == prefix.kv.data_ptr() and branches.kv.shape == (3, 2, 10, 3, 4, 8)
    room = branches.kv.data_ptr()
    for _ in range(4):
        model(torch.randn(10, 1, 24), cache=BranchedCache([branches]))
    assert torch.equal(prefix.kv, before) and branches.kv.data_ptr() == room


def test_static_branches_keep_their_places_and_change_nothing_of_the_prefix(model: Transformer) -> None:
    prefix = prefilled(model, torch.randn(2, 3, 24))
    before, real = prefix.kv.clone(), torch.ones(2, 3, dtype=torch.bool)
    branches = StaticBranches(prefix, 3, 2, 3, 4)
    places = [tensor.data_ptr() for tensor in branches.tensors]
    x_BLD, found = torch.randn(6, 4, 24), []
    for rows in ([0, 1, 1], [1, 0, 0]):
        branches.restart(prefix, real, torch.tensor(rows))
        found.append(model(x_BLD, cache=BranchedCache([branches])))
    assert [tensor.data_ptr() for tensor in branches.tensors] == places and torch.equal(prefix.kv, before)
    swapped = model(x_BLD, cache=BranchedCache([Branches(prefix, real, 3, 4)]))  # rows 0, 0, 0, 1, 1, 1
    torch.testing.assert_close(found[0][[0, 1, 3, 4, 5]], swapped[[0, 1, 3, 4, 5]])
    assert not torch.allclose(found[1][0], swapped[0])


def test_some_branches_can_be_stepped_without_the_others_and_catch_up_at_once(model: Transformer) -> None:
    x_BLD = torch.randn(3, 4, 24)
    prefix = prefilled(model, torch.randn(1, 2, 24))
    real = torch.ones(1, 2, dtype=torch.bool)
    together = BranchedCache([Branches(prefix, real, 3, 4)])
    expected = [model(x_BLD[:, i : i + 1], cache=together) for i in range(4)]
    first, rest = Branches(prefix, real, 1, 4), Branches(prefix, real, 2, 4)
    for i in range(3):
        torch.testing.assert_close(model(x_BLD[:1, i : i + 1], cache=BranchedCache([first])), expected[i][:1])
    late = model(x_BLD[1:, :3], cache=BranchedCache([rest]))
    torch.testing.assert_close(late, torch.cat(expected[:3], dim=1)[1:])
    torch.testing.assert_close(model(x_BLD[:, 3:], cache=BranchedCache([first, rest])), expected[3])
