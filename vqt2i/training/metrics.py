"""metrics.csv of a run that goes on: the rows before its checkpoint stay, those after it are made anew."""

import csv
import io
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vqt2i.files import write_atomic

METRICS = ExperimentWriter.NAME_METRICS_FILE


class MetricsLogger(CSVLogger):
    """Lightning's CSVLogger, which would delete the file of an earlier start.

    A row's `step` counts from 0: the update number `step` is what it tells of.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(run.parent, name=run.name, version="")

    @property
    def experiment(self) -> "_Writer":
        if self._experiment is None and rank_zero_only.rank == 0:
            self._experiment = _Writer(self.log_dir)
        return super().experiment


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys = _read(path)[0]

    def _check_log_dir_exists(self) -> None:
        """Lightning deletes the file here."""


def keep_metrics_before(path: Path, step: int) -> None:
    """Leave the rows of the first `step` updates; also a line cut short by a kill goes."""
    if not path.is_file():
        return
    names, rows = _read(path)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(row for row in rows if None not in row.values() and int(row["step"]) < step)
    write_atomic(path, text.getvalue())


def validation_at(path: Path, step: int) -> dict[str, float]:
    """What was validated after that step, by name; empty where nothing was."""
    rows = _read(path)[1] if path.is_file() else []
    validated = [row for row in rows if row["step"] == str(step - 1)]
    return {name: float(v) for row in validated for name, v in row.items() if name.startswith("val/") and v}


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return list(reader.fieldnames or ()), rows
