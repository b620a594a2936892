"""What runs of an experiment gave, a line of JSON for each finished one, so that an experiment goes on after a kill."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

R, S = TypeVar("R"), TypeVar("S")  # a run and its result, both dataclasses


@dataclass(frozen=True)
class Journal(Generic[R, S]):
    """path: the file, which need not be there yet. run, result: the dataclasses that a line holds."""

    path: Path
    run: type[R]
    result: type[S]

    def read(self) -> dict[R, S]:
        """The finished runs; a line that was cut off by a kill is left out."""
        results = {}
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            results[self.run(**row["run"])] = self.result(**row["result"])
        return results

    def add(self, run: R, result: S) -> None:
        """Write a finished run, on a line of its own whatever a kill has left before."""
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(row_of(run, result)) + "\n")


def row_of(run: Any, result: Any) -> dict[str, Any]:
    """A mapping of plain JSON values."""
    return {"run": asdict(run), "result": asdict(result)}
