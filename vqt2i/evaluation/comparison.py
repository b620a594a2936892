"""Results side by side, of equal protocols."""

from collections.abc import Sequence
from typing import NamedTuple

from vqt2i.data.report import Section
from vqt2i.errors import DataError
from vqt2i.evaluation.page import label_of, shown, told_rows
from vqt2i.evaluation.result import Result, Row, differences


class Compared(NamedTuple):
    """One measure of several results. differences: of the other results' protocols from the first's, each in words."""

    measure: str
    results: tuple[Result, ...]
    differences: tuple[str, ...]


def compare(results: Sequence[Result], measures: Sequence[str] | None = None) -> list[Compared]:
    """What the results have in common, or those measures of it.

    Raises:
        DataError: a measure that one of them does not hold, or none that all do.
    """
    common = [name for name in results[0].measures if all(name in result.measures for result in results)]
    missing = [name for name in measures or () if name not in common]
    if missing or not common:
        held = "; ".join(f"{result.model}: {', '.join(result.measures) or 'nothing'}" for result in results)
        raise DataError(f"{', '.join(missing) or 'no measure'}: is not in all results ({held})")
    found = []
    for name in measures or common:
        first, *others = (result.measures[name].protocol for result in results)
        unlike = dict.fromkeys(difference for other in others for difference in differences(first, other))
        found.append(Compared(name, tuple(results), tuple(unlike)))
    return found


def section_of(compared: Compared, heads: Sequence[str]) -> Section:
    """The measure's values, a column for each result; marked where their protocols differ."""
    columns = [{_key(row): row for row in told_rows(result.measures[compared.measure].rows)}
               for result in compared.results]  # fmt: skip
    keys = dict.fromkeys(key for column in columns for key in column)
    lines = [(key, *(shown(column[key]) if key in column else "" for column in columns)) for key in keys]
    mark = f"NOT ALIKE: {'; '.join(compared.differences)}" if compared.differences else ""
    title = ("≠ " if mark else "") + compared.measure
    return Section(title, ("in brackets: 95 %", *heads), lines, remark=mark)


def _key(row: Row) -> str:
    return " · ".join([label_of(row.name), *(str(value) for key, value in row.where.items() if key != "of")])
