"""What drawing takes is known before, is what it then takes, and decides how much is done at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.errors import ResourceError
from vqt2i.generation import SamplingConfig, TextToImage, decode_image_ids
from vqt2i.generation.decode import Job
from vqt2i.generation.memory import (
    FINISHED_AT_ONCE,
    ROWS_AT_ONCE,
    Budget,
    Needs,
    decoding_needs,
    finishing_needs,
    tracked_peak,
    weight_bytes,
)
from vqt2i.generation.rerank import caption_scores, clip_scores
from vqt2i.generation.rows import Mixed
from vqt2i.gpt import GPT, GPTConfig, LayoutConfig
from vqt2i.nn.transformer import TransformerConfig

CPU = torch.device("cpu")
SAMPLINGS = [
    SamplingConfig(guidance=1.0), SamplingConfig(), SamplingConfig(guidance_interval=(0.5, 1.0), top_k=50, top_p=0.9)
]  # fmt: skip


@pytest.fixture(scope="module")
def medium_gpt() -> GPT:
    """1.3 M parameters, 36 image tokens of 2,048 ids after texts of up to 20."""
    torch.manual_seed(0)
    transformer = TransformerConfig(width=128, n_layers=4, n_heads=4, mlp_width=320)
    layout = LayoutConfig(n_text_ids=100, n_image_ids=2048, text_length=20, grid_height=6, grid_width=6)
    return GPT(GPTConfig(transformer=transformer, layout=layout, text_tokenizer="t", image_tokenizer="i")).eval()


@pytest.fixture
def pipeline(model_folders: Path) -> TextToImage:
    return TextToImage.load(model_folders, "cpu")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("count", "n_texts"), [(1, 8), (4, 2), (16, 1)])
def test_decoding_takes_what_was_calculated(
    medium_gpt: GPT, sampling: SamplingConfig, count: int, n_texts: int
) -> None:
    """Not over 5 % more, and at least three fifths: each part of a step is counted at its largest."""
    jobs = [Job(tuple(range(t, t + 20)), t, i) for t in range(n_texts) for i in range(count)]
    calculated = decoding_needs(medium_gpt, sampling, count).of(len(jobs))
    assert 0.6 <= tracked_peak(decode_image_ids, medium_gpt, jobs, sampling, 0) / calculated <= 1.05


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_decoding_of_mixed_prompts_takes_what_was_calculated(medium_gpt: GPT, sampling: SamplingConfig) -> None:
    mixed, text = Mixed(tuple(range(30, 50)), 0.5), tuple(range(20))
    jobs = [Job(text, 0, i, mixed=mixed) for i in range(8)]
    calculated = decoding_needs(medium_gpt, sampling, 8, mixed=True).of(8)
    assert 0.6 <= tracked_peak(decode_image_ids, medium_gpt, jobs, sampling, 0) / calculated <= 1.05


@pytest.mark.parametrize("n", [1, 4, 16])
def test_finishing_takes_what_was_calculated(pipeline: TextToImage, n: int) -> None:
    ids, texts = torch.zeros(n, 4, 4, dtype=torch.long), [tuple(range(12))] * n
    image = pipeline.vq.decode(ids)
    clip_only = finishing_needs(pipeline.vq, pipeline.gpt, pipeline.clip, False).of(n)
    both = finishing_needs(pipeline.vq, pipeline.gpt, pipeline.clip, True).of(n)
    assert tracked_peak(pipeline.vq.decode, ids) <= clip_only
    assert tracked_peak(clip_scores, pipeline.clip, image, texts) <= 1.05 * clip_only
    assert 0.5 <= tracked_peak(caption_scores, pipeline.gpt, ids, texts) / both <= 1.05


def test_the_decoder_of_pictures_is_measured_without_data(pipeline: TextToImage) -> None:
    unscored = finishing_needs(pipeline.vq, pipeline.gpt, None, False)
    for n in (1, 3):
        peak = tracked_peak(pipeline.vq.decode, torch.zeros(n, 4, 4, dtype=torch.long))
        assert peak <= unscored.of(n) <= 1.4 * peak


def test_the_peak_is_that_of_the_tensors_alive_together() -> None:
    def work() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        b.view(10, 100).mul_(2)
        torch.cat((b, b))

    assert tracked_peak(work) == 4 * 3000


def test_memory_decides_how_many_are_drawn_together_and_the_first_batch_is_a_quarter() -> None:
    needs, free = Needs(100, 10), Needs(0, 1)
    assert Budget(CPU, needs, free, 10**6).rows == ROWS_AT_ONCE
    budget = Budget(CPU, needs, free, 500)
    assert (budget.rows, budget.finished) == (2, FINISHED_AT_ONCE)
    budget.watch(2, lambda: torch.zeros(1))
    assert 1 <= budget.rows <= 40  # less where the process was seen to grow
    assert Budget(CPU, needs, Needs(0, 100), 500).finished == 5


def test_what_the_first_batch_took_corrects_the_calculation(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100 + 2 * 20, 10**9])
    monkeypatch.setattr("vqt2i.generation.memory.measured_peak", lambda device, work: (work(), next(peaks)))
    budget = Budget(CPU, Needs(100, 10), Needs(0, 1), 500)
    for _ in range(2):
        budget.watch(2, lambda: torch.zeros(1))
        assert budget.rows == 20


@pytest.mark.parametrize("needs", [(Needs(0, 501), Needs(0, 1)), (Needs(0, 1), Needs(400, 101))])
def test_what_does_not_fit_at_all_is_refused_with_the_numbers(needs: tuple[Needs, Needs]) -> None:
    with pytest.raises(ResourceError, match=r"an image needs 0\.00 GB .* 0\.00 GB are free on cpu; free some"):
        Budget(CPU, *needs, room=500)


def test_too_little_memory_is_told_before_anything_is_drawn(model_folders: Path) -> None:
    pipeline, drawn = TextToImage.load(model_folders, "cpu", memory_gb=1e-4), []
    with pytest.raises(ResourceError, match="an image needs"):
        pipeline.stream(["a red square"], 2, on_token=drawn.append)
    assert drawn == []


def test_under_a_limit_the_same_pictures_come_from_smaller_batches(model_folders: Path) -> None:
    plain = TextToImage.load(model_folders, "cpu")
    limit = weight_bytes(plain.gpt, plain.vq, plain.clip) + 400_000
    limited, drawn = TextToImage.load(model_folders, "cpu", memory_gb=limit / 1e9), []
    found = limited.generate(["a red square"], n=20, on_token=drawn.append)
    assert max(drawn) < 20 and sum(drawn) == 20 * 16
    for a, b in zip(found, plain.generate(["a red square"], n=20), strict=True):
        assert np.array_equal(a.image_HW3, b.image_HW3)


def test_a_batch_that_ran_out_of_memory_is_drawn_again_by_halves(
    model_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = TextToImage.load(model_folders, "cpu", engine="plain")
    expected, tokens = pipeline.candidates(["a red square", "x"], 5), []
    step, decode = GPT.step, type(pipeline.vq).decode

    def small_step(self: GPT, image_BI: torch.Tensor, cache, n_scored: int = 1) -> torch.Tensor:
        if len(image_BI) > 4 and cache.n_filled == 3:
            raise torch.OutOfMemoryError
        return step(self, image_BI, cache, n_scored)

    def small_decode(self, ids_BHW: torch.Tensor) -> torch.Tensor:
        if len(ids_BHW) > 2:
            raise torch.OutOfMemoryError
        return decode(self, ids_BHW)

    monkeypatch.setattr(GPT, "step", small_step)
    monkeypatch.setattr(type(pipeline.vq), "decode", small_decode)
    found = pipeline.candidates(["a red square", "x"], 5, on_token=tokens.append)
    assert sum(n < 0 for n in tokens) == 2 and sum(tokens) == 10 * 16 and tokens[-1] == 2
    for a, b in zip((s for g in found for s in g), (s for g in expected for s in g), strict=True):
        assert a.image_index == b.image_index and np.array_equal(a.image_HW3, b.image_HW3)
    told = capsys.readouterr().err
    assert "for 10 images at once; going on with 5" in told and "for 5 images at once; going on with 2" in told
    monkeypatch.setattr(GPT, "step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(ResourceError, match="too little memory for one image"):
        pipeline.candidates(["x"], 2)


def test_parts_that_wait_on_the_cpu_come_only_to_work(model_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TextToImage.load(model_folders, "cpu", engine="plain")
    away = TextToImage.load(model_folders, "cpu", engine="plain", offload="always")
    assert plain.away == () and away.away == (away.vq, away.clip)
    moved = []
    for name in ("vq", "clip"):
        part = getattr(away, name)
        monkeypatch.setattr(part, "to", lambda device, part=part, name=name: moved.append((name, str(device))))
    monkeypatch.setattr(away.gpt, "step", lambda *a, step=away.gpt.step: (moved.append("step"), step(*a))[1])
    found = away.generate(["a red square"], n=1, rerank=2)
    assert moved == ["step"] * 15 + [("vq", "cpu"), ("clip", "cpu")] * 2
    assert np.array_equal(found[0].image_HW3, plain.generate(["a red square"], n=1, rerank=2)[0].image_HW3)
    moved.clear()
    away.generate(["a red square"], n=1, rerank=2, scorer="caption")
    assert moved == ["step"] * 15 + [("vq", "cpu")] * 2


@pytest.mark.parametrize(("memory", "away"), [(10**9, False), (10**6, True)])
def test_parts_wait_on_the_cpu_by_themselves_where_a_full_batch_would_not_fit(
    pipeline: TextToImage, memory: int, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {}
    for name in ("gpt", "vq", "clip"):
        part = getattr(pipeline, name)
        monkeypatch.setattr(part, "to", lambda device, name=name: places.update({name: str(device)}))
    monkeypatch.setattr("vqt2i.generation.memory.free_memory", lambda device: 10**12)
    pipeline.place(torch.device("meta"), memory)
    assert places == {"gpt": "meta", "vq": "cpu" if away else "meta", "clip": "cpu" if away else "meta"}
    pipeline.place(torch.device("meta"), memory, "never")
    assert places["clip"] == "meta" and pipeline.away == ()
    with pytest.raises(ResourceError, match="the GPT's weights need"):
        pipeline.place(torch.device("meta"), 1000)
