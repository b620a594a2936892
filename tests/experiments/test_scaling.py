"""The scaling experiment: its law is found again in losses that follow one, and runs go on after a kill."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vqt2i.evaluation.alignment import Candidates, alignment_rows
from vqt2i.evaluation.prompts import drawn_prompts


@pytest.fixture(scope="module")
def scaling(experiment) -> ModuleType:
    return experiment("scaling")


def made(scaling: ModuleType, law) -> dict:
    """Results of all runs whose losses follow a law exactly, and whose errors are 2 L^2."""
    results = {}
    for run in scaling.RUNS:
        times = np.array((run.width**2 / 128**2, run.n_pictures / 100_000, run.n_steps / 800))
        loss = float(law.at(times))
        right = dict.fromkeys(scaling.KINDS, 1 - 2 * loss**2)
        results[run] = scaling.Result(100 * run.width**2, loss, right, 60.0)
    return results


@pytest.mark.parametrize(
    ("floor", "terms", "exponents"),
    [(0.1, (0.05, 0.02, 0.1), (0.4, 0.6, 0.9)), (0.0, (0.05, 0.02, 0.1), (0.2, 1.0, 0.5))],
)
def test_a_law_is_found_again(scaling: ModuleType, floor: float, terms: tuple, exponents: tuple) -> None:
    law = scaling.Fit(floor, terms, exponents)
    found = scaling.fits_of(made(scaling, law))
    assert len(found) == len(scaling.RUNS)  # all, and all but one for each that is not the base run
    for one in found:
        assert one.floor == pytest.approx(floor, abs=1e-6) and one.terms == pytest.approx(terms, abs=1e-6)
        assert one.exponents == pytest.approx(exponents)


def test_a_term_that_would_be_negative_is_left_out(scaling: ModuleType) -> None:
    times = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [4.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    found = scaling.fit(times, np.array([1.0, 1.1, 1.2, 0.9, 1.0]))  # worse where there is more of the first
    assert found.terms[0] == 0 and min(found.floor, *found.terms) >= 0


def test_tables_and_plot_tell_runs_law_and_what_it_predicts(scaling: ModuleType, tmp_path: Path) -> None:
    results = made(scaling, scaling.Fit(0.1, (0.05, 0.02, 0.1), (0.5, 0.5, 0.5)))
    assert scaling.error_law(results, "two_seen") == pytest.approx((2.0, 2.0))
    fits = scaling.fits_of(results)
    told = scaling.tables(results, fits)
    assert "| 1,638,400 | 100,000 | 800 | 0.270 | 0.270 | 85% | 85% | 85% | 1.0 |" in told
    assert "| 100 x all three | 0.117 (0.117 to 0.117) | 97% | 97% | 97% |" in told
    scaling.plot(results, fits[0], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_what_evaluate_tells_of_each_kind_is_read(scaling: ModuleType) -> None:
    asked = drawn_prompts(scaling.KINDS, 4, 0)
    right = np.repeat([0.0, 0.5, 1.0], 4)[:, None] + np.array([[0.0, 0.0]])
    candidates = Candidates(asked, {"right": right}, {"caption": np.zeros((12, 2))})
    assert scaling.right_by_kind(alignment_rows(candidates)) == dict(zip(scaling.KINDS, (0, 0.5, 1), strict=True))


def test_finished_runs_are_read_back_and_half_a_line_is_not(scaling: ModuleType, tmp_path: Path) -> None:
    journal = scaling.Journal(tmp_path / "runs.jsonl", scaling.Run, scaling.Result)
    assert journal.read() == {}
    results = {run: scaling.Result(7, 0.5, {"single_seen": 0.5}, 1.0) for run in scaling.RUNS[:2]}
    first, second = results
    journal.add(first, results[first])
    whole = journal.path.read_text()
    journal.path.write_text(whole + whole[: len(whole) // 2])
    assert journal.read() == {first: results[first]}
    journal.add(second, results[second])
    assert journal.read() == results


def test_what_is_there_is_not_made_again(scaling: ModuleType, tmp_path: Path, monkeypatch) -> None:
    called = []
    monkeypatch.setattr(scaling, "_tool", lambda *command: called.append(command[0]))
    (tmp_path / "data" / "shapes-1000").mkdir(parents=True)
    run = scaling.Run(32, 1000, 250)
    (tmp_path / run.name / "model").mkdir(parents=True)
    monkeypatch.setattr(scaling, "read_card", lambda folder: {"steps": 100, "seconds": 1.0})
    with pytest.raises(Exception, match="result"):  # nothing was measured by the calls above
        scaling.finish(run, tmp_path / "data", tmp_path, 4)
    assert called == ["train_gpt.py", "evaluate.py"]
    assert "transformer.n_heads=1" in scaling.train_command(run, tmp_path, tmp_path)
