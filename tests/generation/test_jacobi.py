from itertools import product

import numpy as np
import pytest
import torch

from vqt2i.generation import TextToImage
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.find import SHIPPED
from vqt2i.generation.int8 import to_int8
from vqt2i.generation.jacobi import carry_over
from vqt2i.generation.rows import GuidedRows, Mixed
from vqt2i.generation.sampling import SamplingConfig, filter_logits
from vqt2i.gpt import GPT

TEXTS = [(1, 2, 3), (), (9, 8)]
JOBS = [Job(text, prompt, image) for prompt, text in enumerate(TEXTS) for image in range(2)]
JOBS += [Job((1, 2, 3), 3, 0, negative=(4,)), Job((1, 2, 3), 4, 0, mixed=Mixed((7, 7), 0.4))]


@pytest.fixture
def wilful(make_gpt):
    """A GPT whose next token depends much on those before it; an untrained one looks hardly at them."""

    def make(**layout: int) -> GPT:
        gpt = make_gpt(**layout)
        with torch.no_grad():
            gpt.embedding.weight.mul_(30)
            gpt.head.weight.mul_(1.5)
        return gpt

    return make


def drawn(gpt: GPT, jobs: list[Job], sampling: SamplingConfig) -> tuple[list[list[int]], list[int]]:
    """Tokens and passes of each image."""
    passes = []
    ids = decode_image_ids(gpt, jobs, sampling, seed=5, on_passes=lambda job, n: passes.append(n))
    return ids.flatten(1).tolist(), passes


@pytest.mark.parametrize(
    ("window", "interval"),
    [(1, (0, 1)), (2, (0, 0.5)), (5, (0.4, 0.7)), (5, (0.9, 1)), (100, (0, 1)), (100, (0.3, 0.6)), (100, (1, 1))],
)
def test_greedy_tokens_are_those_of_one_after_another(wilful, window: int, interval: tuple) -> None:
    gpt = wilful(grid_height=4, grid_width=4)
    greedy = SamplingConfig(guidance=3.0, top_k=1, guidance_interval=interval, guidance_schedule="linear")
    expected, tokens = drawn(gpt, JOBS, greedy)
    found, passes = drawn(gpt, JOBS, greedy.model_copy(update={"jacobi_window": window}))
    assert found == expected and tokens == [16] * len(JOBS)
    assert max(passes) <= 16 and (passes == tokens if window == 1 else sum(passes) < sum(tokens))


def test_greedy_tokens_are_equal_with_8_bit_matrices_too(wilful) -> None:
    twin, greedy = to_int8(wilful(grid_height=4, grid_width=4)), SamplingConfig(guidance=3.0, top_k=1)
    assert drawn(twin, JOBS, greedy)[0] == drawn(twin, JOBS, greedy.model_copy(update={"jacobi_window": 4}))[0]


def test_what_is_carried_over_has_the_new_distribution_and_is_kept_as_often_as_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 5, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    certain = torch.eye(5, dtype=torch.float64)
    middle = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    uniform_W2 = torch.cartesian_prod(middle, middle)
    for p in (old, new, *certain):
        probability, unchanged = torch.zeros(5, dtype=torch.float64), 0.0
        for draft in range(5):
            rows = len(uniform_W2)
            tokens = carry_over(torch.full((rows,), draft), p.expand(rows, 5), new.expand(rows, 5), uniform_W2)
            share = torch.bincount(tokens, minlength=5) / rows
            probability += p[draft] * share
            unchanged += float(p[draft] * share[draft])
        torch.testing.assert_close(probability, new, atol=0.02, rtol=0)
        assert unchanged == pytest.approx(float(torch.minimum(p, new).sum()), abs=0.02)


@pytest.mark.parametrize(
    ("sampling", "job"),
    [
        (SamplingConfig(guidance=1.0), Job((1, 2), 0, 0)),
        (SamplingConfig(guidance=2.0, guidance_interval=(0.4, 1), guidance_schedule="linear", temperature=1.5,
                        temperature_end=0.8, top_p=0.95), Job((1, 2), 0, 0, (4,), Mixed((7,), 0.4))),
    ],
    ids=["plain", "all options"],
)  # fmt: skip
def test_images_have_their_exact_probabilities(wilful, sampling: SamplingConfig, job: Job) -> None:
    """Pearson's chi-square of whole images of 4 tokens of 3 ids against the product of their tokens' probabilities."""
    gpt, n_drawn = wilful(n_image_ids=3, grid_height=2, grid_width=2), 800
    images = torch.tensor([*product(range(3), repeat=4)])
    with torch.inference_mode():
        rows = GuidedRows(gpt, [job] * len(images), sampling)
        logits = torch.stack([rows.logits(images[:, :i])[:, -1] for i in range(4)], dim=1)
    temperature_I1 = torch.tensor(sampling.temperatures(4))[:, None]
    p_BIV = filter_logits(logits, sampling, temperature_I1).double().softmax(-1)
    expected = n_drawn * p_BIV.gather(2, images[..., None]).prod(1).flatten().numpy()
    jobs = [job._replace(image_index=i) for i in range(n_drawn)]
    tokens, passes = drawn(gpt, jobs, sampling.model_copy(update={"jacobi_window": 3}))
    found = np.bincount([int("".join(map(str, row)), 3) for row in tokens], minlength=81)
    assert expected.sum() == pytest.approx(n_drawn) and found[expected == 0].sum() == 0
    # the rare ones together, for the approximation by chi-square wants some five in each cell
    rare = expected < 5
    cells = [(found[rare].sum(), expected[rare].sum()), *zip(found[~rare], expected[~rare], strict=True)]
    statistic = sum((n - mean) ** 2 / mean for n, mean in cells if mean)
    assert len(cells) > 15 and sum(passes) < 4 * n_drawn
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)) > 0.01  # the chance of as large a statistic


def test_passes_read_the_window_for_both_rows_and_each_text_is_read_once(wilful) -> None:
    gpt, sizes = wilful(grid_height=4, grid_width=4), []
    hook = gpt.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    _, passes = drawn(gpt, JOBS[:2], SamplingConfig(guidance=3.0, jacobi_window=4))
    hook.remove()
    assert sizes[:2] == [(1, 3 + 3), (1, 1 + 3)]
    assert len(sizes) == 2 + sum(passes) - 2 and {rows for rows, _ in sizes[2:]} == {2}
    assert max(tokens for _, tokens in sizes[2:]) == 4


def test_watching_sees_final_tokens_only_and_counts_every_one(wilful) -> None:
    gpt, seen, counts = wilful(grid_height=4, grid_width=4), [], []
    sampling = SamplingConfig(guidance=3.0, jacobi_window=4)
    ids = decode_image_ids(gpt, JOBS, sampling, 5, on_token=counts.append,
                           on_partial=lambda jobs, ids: seen.append((*jobs, ids()))).flatten(1)  # fmt: skip
    assert sum(counts) == len(JOBS) * 16 and len(counts) == len(seen) < len(JOBS) * 16
    for job, part in seen:
        assert part.tolist() == [ids[JOBS.index(job), : part.shape[1]].tolist()]


def test_other_seeds_and_candidates_draw_other_images(wilful) -> None:
    gpt, sampling = wilful(grid_height=4, grid_width=4), SamplingConfig(jacobi_window=4)
    jobs = [Job((1, 2), prompt, image) for prompt in range(3) for image in range(3)]
    a, b, c = (decode_image_ids(gpt, jobs, sampling, seed).flatten(1) for seed in (5, 5, 6))
    assert torch.equal(a, b) and len({tuple(row) for row in torch.cat((a, c)).tolist()}) == 18


def test_the_shipped_weights_take_less_than_half_as_many_passes_as_tokens() -> None:
    pipeline = TextToImage.load(SHIPPED / "shapes32", "cpu")
    sampling = pipeline.config.sampling.model_copy(update={"jacobi_window": 16})
    samples = pipeline.generate(pipeline.config.example_prompts[:3], n=2, sampling=sampling)
    assert sum(sample.n_passes for sample in samples) < 0.5 * 64 * len(samples)
