"""The curves of a run: what metrics.csv holds, smoothed, as a picture."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vqt2i.errors import DataError
from vqt2i.training.record import RunRecord, write_record


@pytest.fixture(scope="module")
def curves(experiment) -> ModuleType:
    return experiment("curves")


def put_run(folder: Path, kind: str) -> Path:
    folder.mkdir()
    write_record(folder, RunRecord(kind=kind, fingerprints={}, precision="fp32", starts=()))
    rows = [f"{step},{4 - step / 100},," for step in range(0, 300, 2)] + ["299,,1.5,20"]
    (folder / "metrics.csv").write_text("\n".join(["step,train/loss,val/loss,val/psnr", *rows]) + "\n")
    return folder


def test_a_column_is_read_at_its_steps_and_smoothed(curves: ModuleType, tmp_path: Path) -> None:
    run = put_run(tmp_path / "vqgan-mine", "vqgan")
    steps, values = curves.read_curve(run, "val/psnr")
    assert (steps.tolist(), values.tolist()) == ([300], [20])
    assert [len(part) for part in curves.read_curve(run, "val/none")] == [0, 0]
    steps, values = curves.smoothed(*curves.read_curve(run, "train/loss"), n_points=3)
    assert steps.tolist() == [50, 150, 250] and values == pytest.approx(4 - (np.array([49, 149, 249]) / 100))


def test_runs_stand_side_by_side(curves: ModuleType, tmp_path: Path) -> None:
    run = put_run(tmp_path / "vqgan-mine", "vqgan")
    curves.draw_curves([run, run], tmp_path / "two.png")
    curves.draw_curves([run], tmp_path / "one.png")
    assert Image.open(tmp_path / "two.png").width > 1.8 * Image.open(tmp_path / "one.png").width
    with pytest.raises(DataError, match="a run of kind 'palette'; curves are drawn of vqgan, gpt, clip"):
        curves.draw_curves([put_run(tmp_path / "palette", "palette")], tmp_path / "none.png")
