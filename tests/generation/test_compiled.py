"""Compiled steps against plain ones and whole passes.

That steps of fixed shapes are right is shown without compiling them, which takes seconds; that compiling changes
nothing, with the devices' own compilers once.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vqt2i.generation.compiled import CompiledEngine, compile_step
from vqt2i.generation.decode import Job, PlainDrawing, decode_image_ids
from vqt2i.generation.int8 import to_int8
from vqt2i.generation.rows import Mixed
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT
from vqt2i.text import pad_texts

TEXTS = [(1, 2, 3), (), (1, 2, 3), (9, 8)]
JOBS = [Job(text, prompt, image) for prompt, text in enumerate(TEXTS) for image in range(3)]
GREEDY = SamplingConfig(guidance=2.0, guidance_interval=(0.3, 0.8), top_k=1)
SETTINGS = [
    SamplingConfig(guidance=1.0),
    SamplingConfig(guidance=3.0),
    SamplingConfig(guidance=2.0, temperature=0.7, top_k=4),
    SamplingConfig(guidance=0.0, top_p=0.8),
    SamplingConfig(guidance=3.0, guidance_interval=(0.3, 0.8)),
    SamplingConfig(guidance=3.0, guidance_interval=(0, 0.5), top_k=1),
    SamplingConfig(guidance=3.0, guidance_schedule="linear", temperature_end=0.3, min_p=0.1),
    GREEDY,
]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def uncompiled(step: Callable, gpt: GPT) -> Callable:
    return step


@pytest.fixture
def gpt(make_gpt) -> GPT:
    return make_gpt()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("positions", ["rotary", "rotary_image", "learned"])
def test_steps_of_fixed_shapes_draw_what_plain_steps_draw(make_gpt, sampling: SamplingConfig, positions: str) -> None:
    gpt = make_gpt(positions)
    engine = CompiledEngine(gpt, uncompiled)
    expected = decode_image_ids(gpt, JOBS, sampling, seed=5)
    for rows in (64, 5, 1):
        assert torch.equal(decode_image_ids(gpt, JOBS, sampling, 5, start=engine, rows_at_once=rows), expected)
    order = torch.randperm(len(JOBS), generator=torch.Generator().manual_seed(0))
    shuffled = decode_image_ids(gpt, [JOBS[i] for i in order], sampling, 5, start=engine)
    assert torch.equal(shuffled, expected[order])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 autocast"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_the_logits_of_ragged_texts_are_those_of_whole_fp32_passes(
    make_gpt, monkeypatch, precision: str, guidance: float
) -> None:
    gpt, whole, seen = make_gpt(), make_gpt(), []
    step = (gpt.bfloat16() if precision == "bf16" else gpt).step

    def recorded(*args: object) -> Tensor:
        seen.append(step(*args))
        return seen[-1]

    monkeypatch.setattr(gpt, "step", recorded)
    jobs = [Job(text, p, i) for p, text in enumerate([(1, 2, 3, 4, 5), (9,)]) for i in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        ids = decode_image_ids(gpt, jobs, SamplingConfig(guidance=guidance), 5, start=CompiledEngine(gpt, uncompiled))
    texts = [list(job.condition) for job in jobs] + [[]] * (len(jobs) if guidance != 1 else 0)
    ids_BI = ids.flatten(1).repeat(len(texts) // len(jobs), 1)
    hidden = whole(whole.layout.join(pad_texts(texts, 5), ids_BI))
    expected = whole.image_logits(hidden[:, whole.layout.image_targets(reversed_order=False)])[:, 1:]
    found = torch.cat(seen, dim=1)
    if precision == "fp32":
        torch.testing.assert_close(found, expected)
    else:
        assert (found.float() - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize("sampling", [GREEDY, GREEDY.model_copy(update={"guidance": 1.0})], ids=str)
def test_greedy_tokens_are_equal_in_bf16_too(gpt: GPT, sampling: SamplingConfig) -> None:
    gpt.bfloat16()
    found = decode_image_ids(gpt, JOBS, sampling, 5, start=CompiledEngine(gpt, uncompiled))
    assert torch.equal(found, decode_image_ids(gpt, JOBS, sampling, 5))


def test_texts_of_different_length_draw_together_what_each_draws_alone(gpt: GPT) -> None:
    engine = CompiledEngine(gpt, uncompiled)
    long, short = Job((1, 2, 3, 4, 5, 6, 7), 0, 0), Job((9,), 1, 0)
    together = decode_image_ids(gpt, [long, short], SETTINGS[1], 5, start=engine)
    for row, job in enumerate((long, short)):
        alone = CompiledEngine(gpt, uncompiled)
        assert torch.equal(decode_image_ids(gpt, [job], SETTINGS[1], 5, start=alone)[0], together[row])


def test_negative_and_mixed_prompts_are_drawn_plainly(gpt: GPT) -> None:
    jobs = [Job((1, 2), 0, 0, negative=(3,)), Job((1, 2), 0, 1, mixed=Mixed((4,), 0.5))]
    for job in jobs:
        drawing = CompiledEngine(gpt, uncompiled)([job], torch.rand(6, 1, dtype=torch.double), SETTINGS[1])
        assert isinstance(drawing, PlainDrawing)


def test_8_bit_weights_draw_what_they_draw_plainly(gpt: GPT) -> None:
    twin = to_int8(gpt)
    found = decode_image_ids(twin, JOBS, SETTINGS[1], 5, start=CompiledEngine(twin, uncompiled))
    assert torch.equal(found, decode_image_ids(twin, JOBS, SETTINGS[1], 5))


def test_nothing_that_was_given_is_changed(gpt: GPT) -> None:
    weights = {name: value.clone() for name, value in gpt.state_dict().items()}
    uniform_IB = torch.rand(6, 2, dtype=torch.double)
    numbers, jobs = uniform_IB.clone(), [Job((1, 2), 0, 0), Job((1, 2), 0, 1)]
    with torch.inference_mode():
        drawing = CompiledEngine(gpt, uncompiled)(jobs, uniform_IB, SETTINGS[1])
        for index in range(6):
            drawing.step(index)
    assert torch.equal(uniform_IB, numbers) and jobs == [Job((1, 2), 0, 0), Job((1, 2), 0, 1)]
    assert all(torch.equal(value, weights[name]) for name, value in gpt.state_dict().items())


@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[1], GREEDY], ids=str)
def test_it_goes_on_wherever_tokens_are_drawn_already(gpt: GPT, sampling: SamplingConfig) -> None:
    class From:
        def __init__(self, n_drawn: int) -> None:
            self.n_drawn = n_drawn

        def __call__(self, jobs, uniform_IB, sampling):
            drawing = engine(jobs, uniform_IB, sampling, expected.flatten(1)[:, : self.n_drawn])
            step, drawing.step = drawing.step, lambda index: step(index) if index >= self.n_drawn else None
            return drawing

    engine, jobs = CompiledEngine(gpt, uncompiled), JOBS[:3]
    expected = decode_image_ids(gpt, jobs, sampling, 5)
    for n_drawn in range(7):
        assert torch.equal(decode_image_ids(gpt, jobs, sampling, 5, start=From(n_drawn)), expected)


def test_a_room_serves_what_fits_and_the_last_used_ones_are_kept(gpt: GPT) -> None:
    made = []
    engine = CompiledEngine(gpt, lambda step, gpt: made.append(step) or step)
    few = SamplingConfig(guidance=1.0)
    expected = decode_image_ids(gpt, JOBS, few, 5)
    assert torch.equal(decode_image_ids(gpt, JOBS, few, 5, start=engine, rows_at_once=9), expected)
    assert len(made) == 2  # nine images are three texts of three; the last three find place among nine
    for n_each in (4, 5, 6, 7):
        jobs = [Job((1,), 0, i) for i in range(n_each)]
        decode_image_ids(gpt, jobs, few, 5, start=engine)
    decode_image_ids(gpt, JOBS[:3], few, 5, start=engine)
    assert len(made) == 2 + 4 * 2 + 2  # four rooms later the first is gone


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_steps_draw_what_plain_steps_draw(make_gpt, device: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    gpt = make_gpt().to(device)
    engine = CompiledEngine(gpt)
    for jobs, scale in ((JOBS[:6], 3.0), (JOBS[9:], 4.0)):
        sampling = SamplingConfig(guidance=scale)
        expected = decode_image_ids(gpt, jobs, sampling, 5)
        assert torch.equal(decode_image_ids(gpt, jobs, sampling, 5, start=engine), expected)
    assert any(tmp_path.rglob("*"))


def test_each_step_is_one_graph_which_other_numbers_do_not_compile_again(gpt: GPT) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    engine = CompiledEngine(gpt, lambda step, gpt: compile_step(step, gpt, backend))
    for jobs, scale, temperature in ((JOBS[:9], 3.0, 1.0), (JOBS[9:], 4.0, 0.5)):
        sampling = SamplingConfig(guidance=scale, guidance_interval=(0.3, 0.8), temperature=temperature)
        expected = decode_image_ids(gpt, jobs, sampling, 5)
        assert torch.equal(decode_image_ids(gpt, jobs, sampling, 5, start=engine), expected)
    assert len(graphs) == 2
