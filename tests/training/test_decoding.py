"""That what is timed is what is said; how fast it is no test says."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vqt2i.cli import main
from vqt2i.errors import ConfigError
from vqt2i.generation.engine import Engine
from vqt2i.gpt import GPT
from vqt2i.origin import describe_origin
from vqt2i.runtime import best_rate
from vqt2i.training.compare import llama
from vqt2i.training.decoding import compare
from vqt2i.training.decoding.ceilings import RateMeter, Rates, least_seconds
from vqt2i.training.decoding.compare import Contestant, drawers
from vqt2i.training.decoding.contestants import MODES, our_drawing, their_drawing
from vqt2i.training.decoding.records import Measured, Row
from vqt2i.training.decoding.report import markdown
from vqt2i.training.decoding.scaling import fit, grid_of

CPU = torch.device("cpu")
RATES = Rates(bandwidth=1e9, products={"fp32": 1e12, "bf16": 2e12, "int8": 4e12})
TINY_VQ = "{name: tiny, model: {image_size_px: 12, downsample: 4, channels: [8, 16]}}"


def row(contestant: str, precision: str, *seconds: float, ours: bool = False, n_tokens: int = 6) -> Row:
    return Row(
        contestant=contestant, ours=ours, precision=precision, n_images=2, n_tokens=n_tokens, guided=True,
        seconds=seconds,
    )  # fmt: skip


@pytest.fixture
def benchmark(untrained_gpt: Path, tmp_path: Path, monkeypatch, capsys):
    """benchmark(*words): what `benchmark generate` of a tiny GPT prints, its clocks not run."""
    monkeypatch.setattr(RateMeter, "measure", lambda self: setattr(self, "best", RATES))
    (tmp_path / "vq.yaml").write_text(TINY_VQ)

    def run(*words: object) -> str:
        command = ["benchmark", "generate", "--config", untrained_gpt, "--rounds", 1, "--against", "dynamic", "static",
                   "--engines", "native"]  # fmt: skip
        assert main([str(word) for word in (*command, "--tokenizer", tmp_path / "vq.yaml", *words)]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_both_draw_every_token_of_every_image_and_read_the_whole_text(make_gpt, guided: bool, mode: str) -> None:
    gpt: GPT = make_gpt()
    other = llama(gpt.config, use_cache=True).eval()
    sizes: dict[str, list] = {"ours": [], "theirs": []}
    gpt.embedding.register_forward_hook(lambda _, args, out: sizes["ours"].append(tuple(args[0].shape)))
    other.model.embed_tokens.register_forward_hook(lambda _, args, out: sizes["theirs"].append(tuple(args[0].shape)))
    assert our_drawing(Engine("plain", "fp32", CPU), gpt, 3, guided)().flatten(1).shape == (3, 6)
    rows = 6 if guided else 3
    null = [(1, 4)] if guided else []  # the empty text, padded by one
    assert sizes["ours"] == [(1, 8), *null, *[(rows, 1)] * 5]
    draw = their_drawing(other, gpt.config, MODES[mode], 3, guided)
    for _ in range(2):  # a static cache is used again
        sizes["theirs"].clear()
        assert draw().shape == (3, 6)
        assert sizes["theirs"] == [(rows, 8), *[(rows, 1)] * 5]


@pytest.mark.parametrize("mode, frozen", [("compiled", False), ("frozen", True)])
@torch.no_grad()
def test_their_steps_are_compiled_where_it_says_so_and_draw_what_plain_ones_do(
    make_gpt, monkeypatch, mode: str, frozen: bool
) -> None:
    gpt: GPT = make_gpt()
    other = llama(gpt.config, use_cache=True).eval()
    compiled, steps = [], []

    def remember(function, **options):
        compiled.append(options)

        def step(*args, **kwargs):
            steps.append(torch._inductor.config.freezing)
            return function(*args, **kwargs)

        return step

    monkeypatch.setattr(torch, "compile", remember)
    torch.manual_seed(0)
    expected = their_drawing(other, gpt.config, MODES["dynamic"], 3, True)()
    assert not compiled
    draw = their_drawing(other, gpt.config, MODES[mode], 3, True)
    for _ in range(2):
        torch.manual_seed(0)
        assert torch.equal(draw(), expected)
    assert steps == [frozen] * 10  # all but the reading of the text, twice
    assert [options["options"] for options in compiled] == [{"freezing": True} if frozen else None]
    assert not torch._inductor.config.freezing


def test_the_least_time_is_that_of_reading_or_of_multiplying(make_gpt) -> None:
    config = make_gpt().config
    blocks = sum(p.numel() for p in make_gpt().transformer.parameters())
    weights, kv, prefix = blocks + 32 * 6, 2 * 2 * 32, 8
    few = least_seconds(config, "fp32", 1, False, RATES)
    assert few.bound == "memory"
    n_bytes = 4 * (5 * weights + kv * (5 * prefix + 1 + 2 + 3 + 4 + 5))
    assert few.seconds == pytest.approx(2 * blocks * prefix / 1e12 + n_bytes / 1e9)
    many = least_seconds(config, "bf16", 10_000, True, Rates(bandwidth=1e15, products={"bf16": 1e12}))
    assert many.bound == "products"
    flops = 2 * 5 * weights * 20_000 + 2 * kv * (10_000 * 5 * prefix + 20_000 * 15)
    assert many.seconds == pytest.approx((2 * blocks * prefix + flops) / 1e12)
    assert least_seconds(config, "int8", 1, False, RATES).seconds < few.seconds / 3


def test_the_best_rates_of_a_run_are_kept(monkeypatch) -> None:
    found = iter([3.0, 5.0, 4.0])
    monkeypatch.setattr("vqt2i.training.decoding.ceilings.memory_bandwidth", lambda kind: next(found))
    monkeypatch.setattr("vqt2i.training.decoding.ceilings.product_rate", lambda device, precision: 7.0)
    meter = RateMeter(CPU, ("fp32",))
    for _ in range(3):
        meter.measure()
    assert meter.best == Rates(bandwidth=5.0, products={"fp32": 7.0})


def test_a_rate_is_that_of_the_fastest_spell(monkeypatch) -> None:
    now, slow = [0.0], iter([9, 9, 4, 6, 4])
    monkeypatch.setattr("vqt2i.runtime.time.perf_counter", lambda: now[0])

    def action() -> None:
        now[0] += next(slow, 5)

    assert best_rate(action, 8.0, "cpu", seconds=20) == 2.0


def test_an_engine_that_cannot_be_made_here_is_left_out_and_said(make_gpt, capsys) -> None:
    wanted = [Contestant("plain", True, "fp32"), Contestant("plain", True, "int8")]
    assert list(drawers(make_gpt().config, wanted, CPU)) == wanted[:1]
    assert "plain in int8 is left out: precision int8: only the engine native" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="none of our engines can be made here in int8"):
        drawers(make_gpt().config, wanted[1:], CPU)


def test_int8_stands_beside_theirs_in_fp32_and_bf16() -> None:
    found = compare.contestants(["int8"], ["static"], ["native"])
    assert [(who.contestant, who.precision) for who in found] == [
        ("native", "int8"), ("static", "fp32"), ("static", "bf16"),
    ]  # fmt: skip


def test_ratios_are_to_each_mode_and_to_the_best_of_a_precision(make_gpt) -> None:
    table = (
        row("vqt2i", "int8", 1.0, 2.0, 1.0, ours=True),
        row("dynamic", "fp32", 8.0, 8.0, 8.0),
        row("static", "fp32", 6.0, 6.0, 9.0),
        row("dynamic", "bf16", 5.0, 5.0, 5.0),
    )
    text = markdown(Measured(origin=describe_origin(), gpt=make_gpt().config, rates=RATES, table=table))
    ours, ratios, theirs = text.split("\n\n")[1:]
    assert "| 2 | yes | int8 | vqt2i | 1.00 | 12.0 | 2.000 |" in ours
    assert ours.endswith("| 6.00 (3.00 to 9.00), static | 5.00 (2.50 to 5.00), dynamic |")
    assert ratios.endswith("| 8.00 (4.00 to 8.00) | 6.00 (3.00 to 9.00) | 5.00 (2.50 to 5.00) |")
    assert theirs.count("| 2 | yes |") == 3


def test_a_slope_and_what_a_token_costs_are_found_again() -> None:
    rows = [row("vqt2i", "fp32", 0.02 * n + 3e-6 * n**2, ours=True, n_tokens=n) for n in (64, 256, 1024, 4096)]
    found = fit(rows)
    assert found.linear == pytest.approx(0.02) and found.quadratic == pytest.approx(3e-6)
    assert 1 < found.slope < 1.2
    assert fit([row("vqt2i", "fp32", n / 7, n_tokens=n) for n in (4, 9, 16)]).slope == pytest.approx(1)


def test_a_grid_is_square(make_gpt) -> None:
    assert grid_of(16, make_gpt().config).layout.grid_width == 4
    with pytest.raises(ConfigError, match="15 image tokens: expected a square number"):
        grid_of(15, make_gpt().config)


def test_the_table_is_printed_and_written_and_printed_again(benchmark, tmp_path) -> None:
    out = benchmark("--images", 1, 2, "--out", tmp_path / "found.json")
    assert "30 image ids, 5 + 9 tokens" in out and "Memory is read at 1.0 GB/s" in out
    cases = [f"| {n} | {g} | {p} | native |" for n in (1, 2) for g in ("no", "yes") for p in ("fp32", "bf16", "int8")]
    assert re.findall(r"\| \d \| \w+ \| \w+ \| native \|", out) == cases * 2
    assert out.count("| dynamic |") == out.count("| static |") == 2 * 2 * 2
    written = json.loads((tmp_path / "found.json").read_text())
    assert len(written["table"]) == 4 * (3 + 2 * 2)
    assert {"cpu", "cpus", "threads"} <= written["origin"]["machine"].keys()
    assert benchmark("--show", tmp_path / "found.json") == out


def test_parts_and_reranking_are_of_guided_candidates(benchmark, model_folders) -> None:
    out = benchmark(
        "--measure", "parts", "rerank", "--images", 1, 2, "--precision", "fp32", "--model", model_folders
    )  # fmt: skip
    assert "text read (s) | tokens (s) | images decoded (s) | captions scored (s) | until all images (s)" in out
    assert re.findall(r"\| (\d) \| fp32 \| native \|", out) == ["1", "2"]
    assert "unscored (s) | scored (s)" in out and "scored by CLIP (s)" in out
    assert re.search(r"\| 2 \| fp32 \| .*% \(.* to .*%\) \|$", out)


def test_growth_is_of_one_guided_image_and_drawn(benchmark, tmp_path) -> None:
    out = benchmark(
        "--measure", "scaling", "--tokens", 4, 16, "--precision", "fp32", "--plot", tmp_path / "growth.png"
    )  # fmt: skip
    assert "4 tokens: s (least time, of that) | 16 tokens: s (least time, of that) | slope" in out
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_that_of_a_process_for_each(benchmark, monkeypatch) -> None:
    started = []

    def in_this_process(n_workers, context):
        started.append(context.get_start_method())
        return ThreadPoolExecutor(n_workers)

    monkeypatch.setattr(compare, "ProcessPoolExecutor", in_this_process)  # a new one imports for seconds
    out = benchmark("--measure", "memory", "--images", 1, 2, "--precision", "bf16")
    assert re.findall(r"\| 2 \| yes \| bf16 \| (\w+) \| [\d,]+ \| [\d,]+ \|", out) == ["native", "dynamic", "static"]
    assert started == ["spawn"] * 3


def test_numbers_that_make_no_sense_are_refused(fails, tmp_path) -> None:
    for option in ("--images", "--tokens", "--rounds"):
        assert f"{option}: found 0, expected 1 or more" in fails("benchmark", "generate", option, 0)
    (tmp_path / "other.json").write_text("{}")
    assert "other.json: expected what" in fails("benchmark", "generate", "--show", tmp_path / "other.json")
