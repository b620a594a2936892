import numpy as np
import pytest
import torch

from vqt2i.config import build_config
from vqt2i.errors import ConfigError
from vqt2i.generation.sampling import SamplingConfig, draw, filter_logits, guide, keep_likeliest, pick

LOGITS = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
NO = -torch.inf


def kept(logits_BV: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits_BV]


def test_guidance_is_its_formula() -> None:
    conditional, unconditional = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 0.3, 1.0, 2.5, 7.0):
        expected = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(guide(conditional, unconditional, scale), expected)
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_by_hand(k: int, expected: list[int]) -> None:
    assert kept(keep_likeliest(LOGITS, k, None)) == [expected]


def test_top_k_keeps_ties_with_the_last() -> None:
    assert kept(keep_likeliest(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), 2, None)) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, [0]), (0.39, [0]), (0.41, [0, 1]), (0.75, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_by_hand(p: float, expected: list[int]) -> None:
    assert kept(keep_likeliest(LOGITS, None, p)) == [expected]
    shuffled = [2, 0, 3, 1]
    assert kept(keep_likeliest(LOGITS[:, shuffled], None, p)) == [sorted(shuffled.index(i) for i in expected)]


def test_filters_leave_what_they_keep_and_what_was_out_already() -> None:
    logits = torch.tensor([[2.0, NO, 1.0, 0.0]])
    assert torch.equal(keep_likeliest(logits, 2, None), torch.tensor([[2.0, NO, 1.0, NO]]))
    assert torch.equal(keep_likeliest(logits, None, 1.0), logits)
    assert torch.equal(LOGITS, torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log())


def test_a_number_picks_the_id_whose_interval_it_is_in() -> None:
    uniforms = torch.tensor([0.0, 0.399, 0.401, 0.699, 0.701, 0.899, 0.901, 1 - 1e-9], dtype=torch.float64)
    assert pick(LOGITS.expand(8, 4), uniforms).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
def test_picks_are_those_of_one_running_sum_over_the_vocabulary(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(300, n, generator=generator) * 3
    logits[:, ::3] = NO if n > 1 else 0.0
    uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
    ends = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True).squeeze(-1)
    assert torch.equal(pick(logits, uniforms), expected)


@pytest.mark.parametrize("k", [None, 1, 7, 500])
@pytest.mark.parametrize("p", [None, 0.3, 0.95])
def test_what_is_kept_is_what_a_sorted_list_says(k: int | None, p: float | None) -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits.double(), kept(keep_likeliest(logits, k, p)), strict=True):
        order = row.argsort(descending=True)[:k]
        probabilities = row[order].softmax(0)
        n = len(order) if p is None else int((probabilities.cumsum(0) - probabilities < p).sum())
        assert found == sorted(order[:n].tolist())


def test_an_id_that_was_filtered_out_is_never_picked() -> None:
    logits = torch.tensor([[NO, 0.0, NO, 0.0, NO]])
    uniforms = torch.cat((torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], torch.tensor([1 - 2**-53])))
    assert set(pick(logits.expand(len(uniforms), 5), uniforms).tolist()) == {1, 3}


def test_picks_have_the_distribution_of_the_logits() -> None:
    n, uniforms = 100_000, np.random.default_rng(0).random(100_000)
    counts = torch.bincount(pick(LOGITS.expand(n, 4), torch.from_numpy(uniforms)), minlength=4)
    # four standard deviations of a share are at most 4 * sqrt(0.25 / n) = 0.0063
    torch.testing.assert_close(counts / n, LOGITS.exp()[0], atol=0.0063, rtol=0)


def test_temperature_comes_before_the_filters() -> None:
    uniforms = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hot = SamplingConfig(top_p=0.5)
    sharpened = (LOGITS / 4).softmax(-1)[0]
    assert sharpened[0] < 0.5 < sharpened[:2].sum()
    assert set(draw(LOGITS.expand(2000, 4), uniforms, hot, 4.0).tolist()) == {0, 1}
    both = SamplingConfig(top_k=3, top_p=0.5)  # of the three kept the first has 4/9, so two reach a half
    assert set(draw(LOGITS.expand(2000, 4), uniforms, both, 1.0).tolist()) == {0, 1}


def test_top_k_1_is_greedy_whatever_the_number() -> None:
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    found = draw(logits, torch.rand(64), SamplingConfig(top_k=1), 50.0)
    assert torch.equal(found, logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from_in_full(dtype: torch.dtype) -> None:
    logits, uniforms = torch.randn(64, 9).to(dtype), torch.rand(64, dtype=torch.float64)
    half, full = (draw(x, uniforms, SamplingConfig(), 1.0) for x in (logits, logits.float()))
    assert torch.equal(half, full)


def test_the_guided_tokens_are_those_of_the_interval() -> None:
    def guided(*interval: float, scale: float = 2.0) -> list[int]:
        return list(SamplingConfig(guidance=scale, guidance_interval=interval).guided_tokens(8))

    assert guided(0, 1) == list(range(8)) and guided(0.25, 0.5) == [2, 3] and guided(0.5, 0.5) == []
    assert guided(0, 1, scale=1.0) == [] and guided(0, 1, scale=0.0) == list(range(8))
    assert SamplingConfig().guided_tokens(8) == range(8)


def test_guidance_comes_from_1_to_its_scale_over_its_interval() -> None:
    def scales(schedule: str, *interval: float) -> list[float]:
        return SamplingConfig(guidance=5, guidance_schedule=schedule, guidance_interval=interval).guidance_scales(8)

    assert scales("constant", 0, 1) == [5] * 8
    assert scales("constant", 0.25, 0.5) == [1, 1, 5, 5, 1, 1, 1, 1]
    assert scales("linear", 0.25, 0.75) == [1, 1, 2, 3, 4, 5, 1, 1]
    assert scales("cosine", 0.5, 1) == pytest.approx([1] * 4 + [3 - 2 * c for c in (0.5**0.5, 0, -(0.5**0.5), -1)])
    assert SamplingConfig(guidance=0, guidance_schedule="linear").guidance_scales(4) == [0.75, 0.5, 0.25, 0]


def test_temperature_goes_from_the_first_token_to_the_last_in_equal_steps() -> None:
    assert SamplingConfig(temperature=0.5).temperatures(3) == [0.5] * 3
    assert SamplingConfig(temperature=1.0, temperature_end=0.5).temperatures(3) == [1.0, 0.75, 0.5]
    assert SamplingConfig(temperature=1.0, temperature_end=2.0).temperatures(1) == [1.0]


@pytest.mark.parametrize(("share", "expected"), [(0.01, 4), (0.26, 3), (0.49, 3), (0.51, 2), (0.76, 1), (1.0, 1)])
def test_min_p_by_hand(share: float, expected: int) -> None:
    assert kept(filter_logits(LOGITS, SamplingConfig(min_p=share), 1.0)) == [[*range(expected)]]
    assert kept(filter_logits(LOGITS, SamplingConfig(min_p=share, top_k=2), 1.0)) == [[*range(min(2, expected))]]
    # at temperature 2 the shares are the square roots of those at 1
    assert kept(filter_logits(LOGITS, SamplingConfig(min_p=share**0.5), 2.0)) == [[*range(expected)]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance_interval", (0.5, 0.4)), ("guidance_interval", (0, 1.1)), ("guidance_interval", (0.5,)),
     ("guidance", -1), ("guidance", float("nan")), ("guidance", 101), ("temperature", 0), ("temperature", float("inf")),
     ("temperature_end", 0), ("min_p", 0), ("min_p", 1.1), ("jacobi_window", 0), ("guidance_schedule", "quadratic"),
     ("top_k", 0), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.1), ("top_p", float("nan"))],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        build_config(SamplingConfig, {name: value}, "sampling")
