"""The names of our tensors and of those of a public checkpoint, as a table that is read in both directions.

A row is our name and what our tensor is made of:

    "embedding.weight": "tok_embeddings.weight"              the same tensor
    "mlp.gate_up.weight": ("w1.weight", "w3.weight")         one below the other, in equal shares of the rows
    "x": Joined(("a", "b"), rows=(64, 11))                   in shares of so many rows
    "x": Changed("a", to_ours, to_theirs)                    in another order or shape
    "x": Mixed(("a", "b"), to_ours, to_theirs)               of several, or of none at all
    "usage": Fill(1.0)                                       nothing of theirs
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vqt2i.errors import CheckpointError
from vqt2i.weights import Later, LazyTensors

MOST_TOLD = 6  # names in an error


@dataclass(frozen=True)
class Joined:
    """Tensors one below the other, of so many rows each; None is equal shares."""

    names: tuple[str, ...]
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Changed:
    """A tensor by a function, and by another one back."""

    name: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mixed:
    """Tensors by a function of all of them, and by another one back. Without one they come back by other rows."""

    names: tuple[str, ...]
    to_ours: Callable[..., Tensor]
    to_theirs: Callable[[Tensor], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Fill:
    """One value everywhere, for what only we keep."""

    value: float


Row = str | tuple[str, ...] | Joined | Changed | Mixed | Fill
Table = dict[str, Row]


def their_names(table: Table) -> list[str]:
    """All names of theirs that a table reads."""
    return [name for row in table.values() for name in _names(row)]


def converted(
    table: Table,
    theirs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    where: str,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Later]:
    """Our tensors, made of theirs when they are asked for, with the dtype that they have there.

    Args:
        expected: our tensors, for their names, shapes and integer dtypes; those of a model on the meta device do.
        where: starts the errors.
        ignored: says of a name that the table does not read whether it may be there.

    Raises:
        CheckpointError: names that are missing or too many, or a tensor of another shape; all are named, up to some.
    """
    assert table.keys() == expected.keys(), sorted(table.keys() ^ expected.keys())
    read = their_names(table)
    problems = []
    if missing := [name for name in read if name not in theirs]:
        problems.append(f"lacks {_some(missing)}")
    known = set(read)
    if extra := [name for name in theirs if name not in known and not ignored(name)]:
        problems.append(f"has {_some(extra)}, which this family does not")
    if not problems:
        with torch.device("meta"):
            shapes = {name: (_made(row, theirs, expected[name]), expected[name]) for name, row in table.items()}
        problems += [
            f"{' and '.join(_names(table[name]))}: found {told}, expected what makes {tuple(wanted.shape)}"
            for name, (told, wanted) in shapes.items() if told != tuple(wanted.shape)
        ][:MOST_TOLD]  # fmt: skip
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    return {name: _later(row, theirs, expected[name]) for name, row in table.items()}


def exported(table: Table, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, made of ours."""
    theirs = {}
    for name, row in table.items():
        if isinstance(row, Fill):
            continue
        if isinstance(row, Changed):
            theirs[row.name] = row.to_theirs(ours[name]).contiguous()
            continue
        if isinstance(row, Mixed):
            parts = row.to_theirs(ours[name]) if row.to_theirs else ()
            theirs |= {part_name: part.contiguous() for part_name, part in zip(row.names, parts, strict=False)}
            continue
        names = _names(row)
        rows = row.rows if isinstance(row, Joined) and row.rows else [len(ours[name]) // len(names)] * len(names)
        parts = ours[name].split(list(rows)) if len(names) > 1 else [ours[name]]
        theirs |= {part_name: part.contiguous() for part_name, part in zip(names, parts, strict=True)}
    return theirs


def prefixed(ours: str, theirs: str, rows: Table) -> Table:
    """The rows of a part whose names begin so."""
    return {f"{ours}{name}": _with_prefix(theirs, row) for name, row in rows.items()}


def with_weights(names: Mapping[str, str | tuple[str, ...]], kinds: Iterable[str] = ("weight", "bias")) -> Table:
    """Rows of modules as rows of their weight and bias."""
    return {
        f"{ours}.{kind}": tuple(f"{n}.{kind}" for n in theirs) if isinstance(theirs, tuple) else f"{theirs}.{kind}"
        for ours, theirs in names.items() for kind in kinds
    }  # fmt: skip


def _names(row: Row) -> tuple[str, ...]:
    if isinstance(row, Fill):
        return ()
    if isinstance(row, Joined | Mixed):
        return row.names
    if isinstance(row, Changed):
        return (row.name,)
    return (row,) if isinstance(row, str) else row


def _with_prefix(prefix: str, row: Row) -> Row:
    if isinstance(row, Fill):
        return row
    if isinstance(row, Joined):
        return Joined(tuple(prefix + name for name in row.names), row.rows)
    if isinstance(row, Mixed):
        return Mixed(tuple(prefix + name for name in row.names), row.to_ours, row.to_theirs)
    if isinstance(row, Changed):
        return Changed(prefix + row.name, row.to_ours, row.to_theirs)
    return prefix + row if isinstance(row, str) else tuple(prefix + name for name in row)


def _make(row: Row, parts: list[Tensor], wanted: Tensor) -> Tensor:
    if isinstance(row, Fill):
        return torch.full(wanted.shape, row.value, dtype=wanted.dtype)
    if isinstance(row, Changed):
        return row.to_ours(parts[0])
    if isinstance(row, Mixed):
        return row.to_ours(*parts)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _made(row: Row, theirs: Mapping[str, Tensor], wanted: Tensor) -> tuple[int, ...] | str:
    """The shape of what comes out, or what is there if nothing can."""
    parts = [_like(theirs, name) for name in _names(row)]
    told = " and ".join(str(tuple(part.shape)) for part in parts)
    if isinstance(row, Joined) and row.rows and [len(part) for part in parts] != list(row.rows):
        return told
    try:
        shape = tuple(_make(row, parts, wanted).shape)
    except RuntimeError:
        return told
    return shape if shape == tuple(wanted.shape) else told


def _like(theirs: Mapping[str, Tensor], name: str) -> Tensor:
    return theirs.like(name) if isinstance(theirs, LazyTensors) else theirs[name].to("meta")


def _later(row: Row, theirs: Mapping[str, Tensor], wanted: Tensor) -> Later:
    names = _names(row)
    dtype = _like(theirs, names[0]).dtype if names else wanted.dtype
    return Later(tuple(wanted.shape), dtype, partial(_read, row, names, theirs, wanted))


def _read(row: Row, names: tuple[str, ...], theirs: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    parts = [theirs[name] for name in names]
    return _make(row, parts, wanted).to(parts[0].dtype if parts else wanted.dtype)


def _some(names: list[str]) -> str:
    told = ", ".join(sorted(names)[:MOST_TOLD])
    return told + (f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else "")
