"""The experiment on a few steps of the coloured squares: runs, what ends one, going on after a kill, table and plot."""

from pathlib import Path
from types import ModuleType

import pytest

from vqt2i.data.shards import DataSet
from vqt2i.gpt import LayoutConfig
from vqt2i.training.batches import TokenSamples
from vqt2i.training.encode import encode_dataset


@pytest.fixture(scope="module")
def stability(experiment) -> ModuleType:
    return experiment("stability")


@pytest.fixture
def data(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> tuple[TokenSamples, LayoutConfig]:
    store = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("train",), tmp_path / "store")
    return TokenSamples(store.split("train"), 0), LayoutConfig(
        n_text_ids=tiny_text.n_ids, n_image_ids=16, text_length=12, grid_height=4, grid_width=4
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_variant_trains_alike_from_its_seed(stability, data, precision: str) -> None:
    for variant in stability.VARIANTS:
        run = stability.Run(variant, precision, 0.003, 0)
        result = stability.train(run, *data, 6)
        assert result.diverged_at is None and result.losses[-1] < result.losses[0] and result.largest_score > 0
        if variant == "all":
            assert stability.train(run, *data, 6) == result


def test_products_out_of_range_end_a_run_later_if_they_are_held_smaller(stability, data, monkeypatch) -> None:
    run = stability.Run("none", "fp16", 0.003, 0)
    free = stability.train(run, *data, 3)
    relaxed = stability.train(stability.Run("PB-relax", "fp16", 0.003, 0), *data, 1)
    plain = stability.train(run, *data, 1)
    assert relaxed.largest_score == pytest.approx(plain.largest_score / 32, rel=1e-4)
    monkeypatch.setattr(stability, "FP16_LARGEST", 1e-3)
    ended = stability.train(run, *data, 3)
    assert (ended.diverged_at, ended.why, ended.losses) == (0, "out of range", []) and free.why is None


def test_what_guessing_beats_has_diverged(stability, data) -> None:
    result = stability.train(stability.Run("none", "fp16", 300.0, 0), *data, 60)
    assert result.diverged_at is not None and result.why in ("worse than guessing", "out of range", "not finite")


def test_runs_that_the_journal_holds_are_not_trained_again(stability, data, tmp_path: Path) -> None:
    runs = [stability.Run("none", "bf16", 0.003, seed) for seed in (0, 1)]
    results = {run: stability.train(run, *data, 2) for run in runs}
    journal = stability.Journal(tmp_path / "runs.jsonl", stability.Run, stability.Result)
    for run, result in results.items():
        journal.add(run, result)
    assert journal.read() == results
    assert list(stability.finish(runs, 2, 1, journal)) == []


def test_table_and_plot_say_which_diverged_and_when(stability, tmp_path: Path) -> None:
    trained, diverged = stability.Result(None, None, 3.0, [2.0] * 12), stability.Result(7, "not finite", 9.0, [2.0] * 7)
    results = {
        stability.Run("none", "bf16", 0.3, 0): diverged,
        stability.Run("none", "bf16", 0.3, 1): trained,
        stability.Run("all", "bf16", 0.3, 0): trained,
    }
    assert stability.table(results).splitlines() == [
        "| diverged | bf16, 0.3 |",
        "|---|---|",
        "| none | 1 of 2; not finite at 7; loss 2.00 |",
        "| all | 0 of 1; loss 2.00 |",
    ]
    stability.plot(results, tmp_path / "stability.png")
    assert (tmp_path / "stability.png").read_bytes().startswith(b"\x89PNG")
