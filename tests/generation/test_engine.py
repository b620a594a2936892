from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.errors import ConfigError
from vqt2i.generation import TextToImage, decode
from vqt2i.generation.compiled import SLOW_CALLS, CompiledDrawing, CompiledEngine
from vqt2i.generation.decode import Job, PlainDrawing, decode_image_ids
from vqt2i.generation.engine import AutoStart, Engine, Measured, read_record, record_path
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT
from vqt2i.nn.transformer import TransformerConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SAMPLING = SamplingConfig(guidance=3.0)
JOBS = [Job(text, prompt, i) for prompt, text in enumerate([(1, 2, 3), (9,)]) for i in range(2)]
N = 16  # tokens of an image here
PLAIN, COMPILED, COMPILING = 1.0, 0.25, 40.0  # seconds of a step, and of making one


class Clock:
    """Seconds that pass when someone says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in ("engine", "compiled"):
        monkeypatch.setattr(f"vqt2i.generation.{module}.perf_counter", clock)
    plain_step = PlainDrawing.step

    def step(self: PlainDrawing, index: int) -> None:
        clock.now += PLAIN
        plain_step(self, index)

    monkeypatch.setattr(PlainDrawing, "step", step)
    return clock


@pytest.fixture
def gpt(make_gpt) -> GPT:
    return make_gpt(grid_height=4, grid_width=4)


def standing_in(clock: Clock, gpt: GPT) -> CompiledEngine:
    """An engine that compiles nothing and takes the seconds for it."""

    def compiler(step: Callable, gpt: GPT) -> Callable:
        cost = [COMPILING]

        def compiled(room: object) -> None:
            clock.now += COMPILED + (cost.pop() if cost else 0)
            step(room)

        return compiled

    return CompiledEngine(gpt, compiler)


def test_compiling_pays_where_what_it_saves_is_more_than_what_it_costs() -> None:
    once = Measured(compile_seconds=40, step_ratio=0.25, n_times=2)
    assert not once.pays(1.0, 53) and once.pays(1.0, 54)  # 54 * 0.75 = 40.5
    assert not once.pays(0.5, 106) and once.pays(0.5, 107)
    # the second time it comes from the cache on disk, which was not measured yet
    assert once.model_copy(update={"n_times": 1}).pays(1.0, 27)
    assert not Measured(compile_seconds=0, step_ratio=1.1).pays(1.0, 10_000)
    assert not Measured().pays(0.01, 256) and Measured().pays(0.01, 100 * 256)


@pytest.mark.parametrize(("n_batches", "compiles"), [(1, False), (7, False), (8, True), (20, True)])
def test_a_long_job_compiles_and_a_short_one_does_not_with_equal_images(
    gpt: GPT, clock: Clock, n_batches: int, compiles: bool
) -> None:
    # guessed before anything is measured: 60 s, and half of each of the 10 + 16 (n - 1) steps left
    start = AutoStart(standing_in(clock, gpt), n_batches * len(JOBS))
    expected = decode_image_ids(gpt, JOBS, SAMPLING, seed=5)
    clock.now = 0
    assert torch.equal(decode_image_ids(gpt, JOBS, SAMPLING, 5, start=start), expected)
    assert clock.now == (6 * PLAIN + COMPILING + 10 * COMPILED if compiles else N * PLAIN)
    before = clock.now
    assert torch.equal(decode_image_ids(gpt, JOBS, SAMPLING, 5, start=start), expected)
    assert clock.now - before == ((N - 1) * COMPILED if compiles else N * PLAIN)


def test_what_compiling_cost_and_brought_is_remembered_for_this_shape_and_model(make_gpt, gpt: GPT, clock) -> None:
    engine = standing_in(clock, gpt)
    decode_image_ids(gpt, JOBS, SAMPLING, 5, start=AutoStart(engine, 100 * len(JOBS)))
    shape = engine.shape([((1,), 2), ((9,), 2)], SAMPLING)
    measured = read_record(record_path(gpt, shape))
    assert measured.compile_seconds == COMPILING + SLOW_CALLS * COMPILED
    assert measured.step_ratio == COMPILED / PLAIN and measured.n_times == 1
    for other in (record_path(gpt, shape._replace(n_each=3)), record_path(make_gpt(), shape)):
        assert not other.exists() and read_record(other) == Measured()
    # in a new process half of 40.75 s is expected, and 0.75 s saved in each of 26 steps, 42 steps
    for n_batches, kind in ((2, PlainDrawing), (3, CompiledDrawing)):
        again = AutoStart(standing_in(clock, gpt), n_batches * len(JOBS))
        drawn = []
        decode_image_ids(gpt, JOBS, SAMPLING, 5, start=lambda *a, s=again, d=drawn: d.append(s(*a)) or d[0])
        assert type(drawn[0]._drawing) is kind


def test_a_damaged_memory_is_none_and_one_that_cannot_be_written_is_said(gpt: GPT, clock, tmp_path, capsys) -> None:
    engine = standing_in(clock, gpt)
    path = record_path(gpt, engine.shape([((1,), 2), ((9,), 2)], SAMPLING))
    path.parent.mkdir(parents=True)
    path.write_text("compile_seconds: many\n")
    assert read_record(path) == Measured()
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where the folder should be")
    decode_image_ids(gpt, JOBS, SAMPLING, 5, start=AutoStart(engine, 100 * len(JOBS)))
    assert "what compiling costs is not remembered" in capsys.readouterr().err


def test_where_compiling_fails_drawing_goes_on_plainly(gpt: GPT, clock: Clock, capsys) -> None:
    def compiler(step: Callable, gpt: GPT) -> Callable:
        def fails(room: object) -> None:
            raise RuntimeError("no kernel\nand a long story")

        return fails

    start = AutoStart(CompiledEngine(gpt, compiler), 100 * len(JOBS))
    expected = decode_image_ids(gpt, JOBS, SAMPLING, seed=5)
    for _ in range(2):
        assert torch.equal(decode_image_ids(gpt, JOBS, SAMPLING, 5, start=start), expected)
    assert capsys.readouterr().err.count("compiling failed, drawing goes on in plain PyTorch (no kernel)") == 1


def test_images_of_a_few_tokens_are_drawn_plainly(make_gpt, clock: Clock) -> None:
    gpt = make_gpt()
    decode_image_ids(gpt, JOBS, SAMPLING, 5, start=AutoStart(standing_in(clock, gpt), 10**6))
    assert clock.now == gpt.layout.image_length * PLAIN


def test_auto_is_native_on_cpus_and_plain_where_nothing_can_be_compiled(make_gpt, monkeypatch, capsys) -> None:
    monkeypatch.setattr("vqt2i.generation.engine.has_triton", lambda: True)
    assert Engine("auto", "fp32", CUDA).name == "auto"
    monkeypatch.setattr("vqt2i.generation.engine.has_triton", lambda: False)
    assert Engine("auto", "fp32", CUDA).name == Engine("auto", "fp32", torch.device("mps")).name == "plain"
    gpt = make_gpt()
    made = Engine("auto", "auto", CPU).gpt(gpt)
    assert isinstance(made, NativeGPT) and made.precision == "fp32"
    odd = make_gpt(transformer=TransformerConfig(width=24, n_layers=1, n_heads=2, mlp_width=8))
    assert Engine("auto", "auto", CPU).gpt(odd) is odd
    assert "engine plain, several times slower: heads are 12 wide" in capsys.readouterr().err


def test_each_precision_has_a_model_of_its_own_and_is_made_once(make_gpt) -> None:
    gpt = make_gpt()
    for precision in ("fp32", "bf16", "int8"):
        engine = Engine("native", precision, CPU)
        assert engine.gpt(gpt).precision == precision and engine.gpt(gpt) is engine.gpt(gpt)
    assert Engine("plain", "fp32", CPU).gpt(gpt) is gpt
    half = Engine("plain", "bf16", CPU).gpt(gpt)
    assert half.embedding.weight.dtype == torch.bfloat16 and gpt.embedding.weight.dtype == torch.float32
    other = make_gpt(seed=1)
    engine = Engine("plain", "fp32", CPU)
    assert engine.gpt(gpt) is gpt and engine.gpt(other) is other


def test_an_engine_that_cannot_be_had_is_refused(make_gpt, monkeypatch, model_folders: Path) -> None:
    with pytest.raises(ConfigError, match="found 'fast', expected one of auto, plain, native, compiled"):
        TextToImage.load(model_folders, "cpu", engine="fast")
    with pytest.raises(ConfigError, match="precision: found 'fp8', expected one of auto, fp32, bf16, int8"):
        TextToImage.load(model_folders, "cpu", precision="fp8")
    odd = make_gpt(transformer=TransformerConfig(width=24, n_layers=1, n_heads=2, mlp_width=8))
    for name, precision in (("native", "fp32"), ("auto", "int8")):
        with pytest.raises(ConfigError, match="engine native: heads are 12 wide"):
            Engine(name, precision, CPU).gpt(odd)
    with pytest.raises(ConfigError, match="only the engine native has it on CPUs"):
        Engine("plain", "int8", CPU).gpt(make_gpt())
    monkeypatch.setattr("vqt2i.generation.engine.find_cpp_compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"engine compiled: no C\+\+ compiler"):
        TextToImage.load(model_folders, "cpu", engine="compiled")
    with pytest.raises(ConfigError, match="on mps, expected cuda or cpu"):
        Engine("compiled", "fp32", torch.device("mps"))


def test_a_pipeline_draws_by_the_engine_it_was_loaded_with(model_folders: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "vqt2i.generation.engine.CompiledEngine", partial(CompiledEngine, compiler=lambda step, gpt: step)
    )
    names = ("plain", "native", "compiled")
    plain, native, compiled = (TextToImage.load(model_folders, "cpu", engine=name) for name in names)
    expected = plain.generate(["a red square"], n=2, rerank=3)
    for a, b in zip(native.generate(["a red square"], n=2, rerank=3), expected, strict=True):
        assert np.array_equal(a.image_HW3, b.image_HW3) and a.scores == pytest.approx(b.scores, abs=1e-4)
    monkeypatch.setattr(decode.PlainDrawing, "step", None)
    for a, b in zip(compiled.generate(["a red square"], n=2, rerank=3), expected, strict=True):
        assert np.array_equal(a.image_HW3, b.image_HW3)
    assert compiled.engine.start(compiled.gpt, 1) is compiled.engine.start(compiled.gpt, 1)


def test_lower_precisions_draw_and_score_and_say_so(model_folders: Path) -> None:
    for precision in ("bf16", "int8"):
        pipeline = TextToImage.load(model_folders, "cpu", precision=precision)
        samples = pipeline.generate(["a red square", ""], n=2, rerank=3)
        assert len(samples) == 4 and all(np.isfinite(list(s.scores.values())).all() for s in samples)
        assert pipeline.engine.precision == precision
