import math

import pytest
import torch

from vqt2i.generation.decode import Job, decode_image_ids, uniforms
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.rerank import caption_scores
from vqt2i.generation.rows import Mixed
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT
from vqt2i.nn.sparsity import PivotWindowConfig
from vqt2i.text import pad_texts

PIVOTS = PivotWindowConfig(n_pivots=2, block_size=2, n_blocks=1)
TEXTS = [(1, 2, 3), (), (1, 2, 3), (9, 8)]
JOBS = [Job(text, prompt, image) for prompt, text in enumerate(TEXTS) for image in range(3)]
# beside plain ones some with another negative prompt, some mixed, some both
BESIDE = [
    job._replace(negative=(4, 5) if i % 2 else (), mixed=Mixed((7,), 0.3) if i % 3 == 1 else None)
    for i, job in enumerate(JOBS)
]
SETTINGS = [
    SamplingConfig(guidance=1.0),
    SamplingConfig(guidance=3.0),
    SamplingConfig(guidance=2.0, temperature=0.7, top_k=4),
    SamplingConfig(guidance=0.0, top_p=0.8),
    SamplingConfig(guidance=3.0, guidance_interval=(0.3, 0.8)),
    SamplingConfig(guidance=5.0, guidance_schedule="linear", guidance_interval=(0.3, 1.0), min_p=0.1),
    SamplingConfig(guidance=5.0, guidance_schedule="cosine", temperature=2.0, temperature_end=0.2),
]


@pytest.fixture
def gpt(make_gpt) -> GPT:
    return make_gpt()


@torch.no_grad()
def drawn_naively(gpt: GPT, job: Job, sampling: SamplingConfig, seed: int) -> list[int]:
    """One image alone, token by token, without cache or batch, each step a full forward pass."""
    config, ids = gpt.layout.config, []
    numbers = uniforms(job, seed, gpt.layout.image_length)
    for index, number in enumerate(numbers):
        start, end = (round(share * len(numbers)) for share in sampling.guidance_interval)
        share = (index + 1 - start) / max(1, end - start)
        ramp = {"constant": 1.0, "linear": share, "cosine": math.sin(math.pi / 2 * share) ** 2}
        scale = 1 + ramp[sampling.guidance_schedule] * (sampling.guidance - 1) if start <= index < end else 1.0
        last = sampling.temperature_end or sampling.temperature
        temperature = sampling.temperature + (last - sampling.temperature) * index / (len(numbers) - 1)
        logits = []
        for text in (job.condition, job.mixed.condition if job.mixed else (), job.negative or ()):
            so_far = torch.tensor([ids], dtype=torch.long)
            hidden = gpt(gpt.layout.join(pad_texts([list(text)], config.text_length), so_far))
            logits.append(gpt.image_logits(hidden[:, -1])[0].double())
        own, other, null = logits
        conditional = own + (job.mixed.share if job.mixed else 0) * (other - own)
        guided = (null + scale * (conditional - null)) / temperature
        order = guided.argsort(descending=True).tolist()[: sampling.top_k]
        p = guided.softmax(0)
        if sampling.top_k:
            p = p / p[order].sum()
        if sampling.top_p:
            order = [i for at, i in enumerate(order) if p[order[:at]].sum() < sampling.top_p]
        order = [i for i in order if p[i] >= (sampling.min_p or 0) * p.max()]
        weights = torch.tensor([float(p[i]) if i in order else 0.0 for i in range(len(p))], dtype=torch.float64)
        reached = (weights.cumsum(0) / weights.sum() > number).nonzero()
        ids.append(int(reached[0]))
    return ids


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_decoding_equals_the_naive_loop_of_full_passes(make_gpt, sampling: SamplingConfig, positions: str) -> None:
    gpt = make_gpt(positions)
    for jobs, rows in ((JOBS, (0, 4, 7, 11)), (BESIDE, (1, 2, 4, 9))):
        found = decode_image_ids(gpt, jobs, sampling, seed=5)
        assert found.shape == (len(JOBS), 3, 2) and found.dtype == torch.long
        for row in rows:
            assert found[row].flatten().tolist() == drawn_naively(gpt, jobs[row], sampling, 5)


@pytest.mark.parametrize("sampling", [*SETTINGS, SamplingConfig(guidance=3.0, jacobi_window=3)], ids=str)
@pytest.mark.parametrize("jobs", [JOBS, BESIDE], ids=["plain", "beside"])
def test_an_image_depends_on_no_neighbour_no_order_and_no_batch(
    gpt: GPT, sampling: SamplingConfig, jobs: list[Job]
) -> None:
    expected = decode_image_ids(gpt, jobs, sampling, seed=5)
    for rows in (1, 5, 64):
        assert torch.equal(decode_image_ids(gpt, jobs, sampling, seed=5, rows_at_once=rows), expected)
    order = torch.randperm(len(jobs), generator=torch.Generator().manual_seed(0))
    shuffled = decode_image_ids(gpt, [jobs[i] for i in order], sampling, seed=5)
    assert torch.equal(shuffled, expected[order])
    assert torch.equal(decode_image_ids(gpt, jobs[7:8], sampling, seed=5), expected[7:8])


def test_equal_seeds_give_equal_images_and_others_do_not(gpt: GPT) -> None:
    a, b, c = (decode_image_ids(gpt, JOBS, SETTINGS[1], seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_candidates_of_one_prompt_and_equal_prompts_get_streams_of_their_own(gpt: GPT) -> None:
    images = decode_image_ids(gpt, JOBS, SETTINGS[0], seed=5)
    assert len({tuple(image.flatten().tolist()) for image in images}) == len(JOBS)
    numbers = [tuple(uniforms(job, 5, 6)) for job in JOBS]
    assert len(set(numbers)) == len(JOBS) and all(0 <= x < 1 for row in numbers for x in row)


def test_guidance_1_is_plain_sampling_and_0_ignores_the_text(gpt: GPT) -> None:
    plain, same = (decode_image_ids(gpt, JOBS, SamplingConfig(guidance=s), seed=5) for s in (1.0, 1.0 + 1e-7))
    assert torch.equal(plain, same)
    texts = [Job((), job.prompt_index, job.image_index) for job in JOBS]
    free = SamplingConfig(guidance=0.0)
    assert torch.equal(decode_image_ids(gpt, JOBS, free, seed=5), decode_image_ids(gpt, texts, SETTINGS[0], seed=5))


def computed(gpt: GPT, sampling: SamplingConfig, jobs: list[Job] = JOBS) -> list[tuple[int, int]]:
    """Rows and positions of each pass through the transformer while decoding."""
    sizes = []
    hook = gpt.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    decode_image_ids(gpt, jobs, sampling, seed=5)
    hook.remove()
    return sizes


def test_each_text_is_read_once_padded_no_further_than_needed_and_each_image_steps_once(gpt: GPT) -> None:
    # (1, 2, 3) has six images, () and (9, 8) three each: read together; the null condition by itself
    read = [(2, 2 + 3), (1, 3 + 3)]
    assert computed(gpt, SETTINGS[0]) == [*read, *[(12, 1)] * 5]
    assert computed(gpt, SETTINGS[1]) == [*read, (1, 1 + 3), *[(24, 1)] * 5]


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ((0, 0.5), [(24, 1)] * 2 + [(12, 1)] * 3),
        ((0.5, 1), [(12, 1)] * 3 + [(12, 3)] + [(24, 1)] * 2),
        ((0.3, 0.5), [(12, 1)] * 2 + [(12, 2)] + [(12, 1)] * 3),
        ((1 / 6, 0.5), [(24, 1)] * 2 + [(12, 1)] * 3),
    ],
)  # fmt: skip
def test_where_guidance_is_off_the_null_rows_are_not_computed(gpt: GPT, interval, steps: list) -> None:
    found = computed(gpt, SamplingConfig(guidance=3.0, guidance_interval=interval))
    assert found[3:] == steps


def test_an_interval_of_nothing_is_plain_sampling(gpt: GPT) -> None:
    for interval in ((0, 0), (0.5, 0.5), (1, 1)):
        sampling = SamplingConfig(guidance=3.0, guidance_interval=interval)
        assert torch.equal(decode_image_ids(gpt, JOBS, sampling, seed=5), decode_image_ids(gpt, JOBS, SETTINGS[0], 5))
        assert computed(gpt, sampling) == computed(gpt, SETTINGS[0])


def test_guidance_of_the_empty_prompt_changes_nothing(gpt: GPT) -> None:
    empty = [job for job in JOBS if not job.condition]
    assert torch.equal(
        decode_image_ids(gpt, empty, SETTINGS[0], seed=5), decode_image_ids(gpt, empty, SETTINGS[1], seed=5)
    )


def test_a_prompt_mixed_with_itself_or_led_away_from_itself_is_that_prompt_alone(gpt: GPT) -> None:
    alone = decode_image_ids(gpt, JOBS, SETTINGS[0], seed=5)
    itself = [job._replace(negative=job.condition, mixed=Mixed(job.condition, 0.5)) for job in JOBS]
    assert torch.equal(decode_image_ids(gpt, itself, SETTINGS[1], seed=5), alone)


def test_guidance_0_reads_the_negative_prompt_only(gpt: GPT) -> None:
    negative = [Job((), job.prompt_index, job.image_index, job.condition) for job in JOBS]
    found = decode_image_ids(gpt, negative, SamplingConfig(guidance=0.0), seed=5)
    assert torch.equal(found, decode_image_ids(gpt, JOBS, SETTINGS[0], seed=5))


def test_a_text_mixed_in_is_one_more_row_and_where_guidance_is_off_no_negative_prompt_is_computed(gpt: GPT) -> None:
    jobs = [job._replace(negative=(4,), mixed=Mixed((7,), 0.5)) for job in JOBS]
    steps = [(rows, 1) for rows in (36, 36, 24, 24, 24)]
    assert computed(gpt, SamplingConfig(guidance=3.0, guidance_interval=(0, 0.5)), jobs)[-5:] == steps


def test_greedy_images_depend_on_the_text_only(gpt: GPT) -> None:
    greedy = SamplingConfig(guidance=2.0, top_k=1)
    images = decode_image_ids(gpt, JOBS, greedy, seed=5).flatten(1).tolist()
    assert images[0:3] == images[6:9] == [images[0]] * 3 and images[0] != images[9]
    assert images[9] == drawn_naively(gpt, JOBS[9], greedy, 1)


def test_nothing_that_was_given_is_changed(gpt: GPT) -> None:
    jobs, weights = list(JOBS), {name: value.clone() for name, value in gpt.state_dict().items()}
    decode_image_ids(gpt, jobs, SETTINGS[1], seed=5)
    assert jobs == JOBS
    assert all(torch.equal(value, weights[name]) for name, value in gpt.state_dict().items())


def test_every_token_of_every_image_is_counted(gpt: GPT) -> None:
    counts = []
    decode_image_ids(gpt, JOBS, SETTINGS[1], seed=5, rows_at_once=5, on_token=counts.append)
    assert sum(counts) == len(JOBS) * gpt.layout.image_length and set(counts) == {5, 2}


def test_after_each_step_the_ids_drawn_so_far_can_be_asked_for(gpt: GPT) -> None:
    seen: list[tuple[list[Job], torch.Tensor]] = []
    ids = decode_image_ids(
        gpt, JOBS, SETTINGS[1], seed=5, rows_at_once=5, on_partial=lambda jobs, ids: seen.append((list(jobs), ids()))
    ).flatten(1)
    n = gpt.layout.image_length
    assert [part.shape[1] for _, part in seen] == [*range(1, n + 1)] * 3
    for jobs, part in seen:
        rows = [JOBS.index(job) for job in jobs]
        assert torch.equal(part, ids[rows, : part.shape[1]])


def test_a_text_that_is_too_long_is_read_up_to_the_length(gpt: GPT) -> None:
    long, short = Job((1, 2, 3, 4, 5, 6, 7), 0, 0), Job((1, 2, 3, 4, 5), 0, 0)
    a, b = (decode_image_ids(gpt, [job], SETTINGS[1], seed=5) for job in (long, short))
    assert torch.equal(a, b)


def told_captions(gpt: GPT | NativeGPT, jobs: list[Job], sampling: SamplingConfig) -> tuple[torch.Tensor, dict]:
    """The drawn ids, and the caption scores that were told while they were drawn."""
    scores: dict[Job, float] = {}
    ids_BHW = decode_image_ids(gpt, jobs, sampling, seed=0, rows_at_once=5, on_caption=scores.__setitem__)
    return ids_BHW, scores


@pytest.mark.parametrize("engine", ["plain", "native"])
@pytest.mark.parametrize("sampling", [s for s in SETTINGS if s.guidance != 1], ids=str)
@pytest.mark.parametrize("gpt_kind", ["rotary", "learned", "minDALL-E", "CogView"], indirect=True)
def test_caption_scores_told_while_drawing_are_those_of_a_pass_over_everything(
    make_gpt, gpt_kind: dict, sampling: SamplingConfig, engine: str
) -> None:
    gpt = make_gpt(**gpt_kind, null_condition="image_first")
    ids_BHW, told = told_captions(gpt if engine == "plain" else NativeGPT(gpt, "fp32"), JOBS, sampling)
    assert ids_BHW.equal(decode_image_ids(gpt, JOBS, sampling, seed=0))
    expected = caption_scores(gpt, ids_BHW, [job.condition for job in JOBS])
    torch.testing.assert_close(torch.tensor([told[job] for job in JOBS]), expected)


@pytest.mark.parametrize(
    "kind, beside, sampling",
    [
        ({}, {}, SamplingConfig(guidance=2.0)),  # its null is an empty text
        ({"null_condition": "image_first"}, {}, SamplingConfig(guidance=1.0)),
        ({"null_condition": "image_first"}, {"negative": (4, 5)}, SamplingConfig(guidance=2.0)),
        ({"null_condition": "image_first"}, {}, SamplingConfig(guidance=2.0, jacobi_window=3)),
        ({"null_condition": "image_first", "sparsity": PIVOTS}, {}, SamplingConfig(guidance=2.0)),
    ],
    ids=str,
)
def test_where_guidance_reads_no_image_first_no_caption_score_is_told(make_gpt, kind, beside, sampling) -> None:
    jobs = [job._replace(**beside) for job in JOBS]
    assert told_captions(make_gpt(**kind), jobs, sampling)[1] == {}
