"""Measured numbers as Markdown tables."""

from collections.abc import Iterable, Sequence

from vqt2i.training.compare import Timing
from vqt2i.training.decoding.ceilings import least_seconds
from vqt2i.training.decoding.records import Measured, Parts, Peak, Row
from vqt2i.training.decoding.scaling import by_contestant, fit, grid_of
from vqt2i.training.plan import count_parameters

REFERENCES = ("fp32", "bf16")  # of the other side


def markdown(measured: Measured) -> str:
    """All tables of a run, after a paragraph that says what ran where."""
    parts = [_origin(measured)]
    if measured.table:
        parts += [_ours(measured), _ratios(measured.table), _theirs(measured.table)]
    if measured.parts:
        parts.append(_parts(measured.parts))
    if measured.rerank:
        parts.append(_rerank(measured.rerank))
    if measured.memory:
        parts.append(_memory(measured.memory))
    if measured.scaling:
        parts.append(_scaling(measured))
    return "\n\n".join(parts)


def _origin(measured: Measured) -> str:
    origin, gpt, rates = measured.origin, measured.gpt, measured.rates
    machine = origin.machine
    layout = gpt.layout
    products = ", ".join(f"{rate / 1e9:,.0f} in {precision}" for precision, rate in rates.products.items())
    return (
        f"`{origin.command}` at {(origin.git_commit or 'an unknown commit')[:7]}, {origin.time}: "
        f"{', '.join(machine['gpus']) or machine['cpu']}, {machine['cpus']} cores, {machine['threads']} threads, "
        f"torch {origin.versions['torch']}, transformers {origin.versions.get('transformers', 'none')}. "
        f"{count_parameters(gpt).total / 1e6:,.1f} M parameters, {layout.n_image_ids:,} image ids, "
        f"{layout.text_length} + {layout.grid_height * layout.grid_width} tokens. "
        f"Memory is read at {rates.bandwidth / 1e9:,.1f} GB/s; matrix products run at {products} GFLOP/s."
    )


def _ours(measured: Measured) -> str:
    rows = []
    for row in (row for row in measured.table if row.ours):
        least = least_seconds(measured.gpt, row.precision, row.n_images, row.guided, measured.rates)
        seconds = row.timing.median
        rows.append([
            *_case(row), f"{seconds:.2f}", f"{row.n_images * row.n_tokens / seconds:,.1f}",
            f"{row.n_images / seconds:.3f}", f"{least.seconds / seconds:.0%}", least.bound,
            *(_best_ratio(measured.table, row, precision) for precision in REFERENCES),
        ])  # fmt: skip
    head = ["images", "guided", "precision", "ours", "s", "tokens/s", "images/s", "least time, of that",
            "which is that of", *(f": their best in {precision}" for precision in REFERENCES)]  # fmt: skip
    return _table(head, rows)


def _ratios(table: Sequence[Row]) -> str:
    """Ours to each mode of theirs."""
    others = list(dict.fromkeys((row.contestant, row.precision) for row in table if not row.ours))
    rows = []
    for row in (row for row in table if row.ours):
        against = {(other.contestant, other.precision): other for other in table if _same_case(row, other)}
        rows.append([*_case(row), *(_ratio(row.timing, against[other].timing) for other in others)])
    return _table(["images", "guided", "precision", "ours", *(f": {' '.join(other)}" for other in others)], rows)


def _theirs(table: Sequence[Row]) -> str:
    rows = [
        [*_case(row), f"{row.timing.median:.2f}", f"{row.n_images * row.n_tokens / row.timing.median:,.1f}"]
        for row in table if not row.ours
    ]  # fmt: skip
    return _table(["images", "guided", "precision", "theirs", "s", "tokens/s"], rows)


def _parts(parts: Sequence[Parts]) -> str:
    """What is added to the tokens' time makes images, and then scores."""
    names = list(parts[0].seconds)
    rows = []
    for found in parts:
        medians = {name: found.timing(name).median for name in names}
        image = medians["tokens"] + medians["images decoded"]
        rows.append([
            f"{found.n_images}", found.precision, found.contestant, *(f"{medians[name]:.3f}" for name in names),
            f"{image:.2f}", f"{medians['captions scored'] / image:.0%}",
        ])  # fmt: skip
    head = ["images, guided", "precision", "ours", *(f"{name} (s)" for name in names), "until all images (s)",
            "captions scored, of that"]  # fmt: skip
    return _table(head, rows)


def _rerank(parts: Sequence[Parts]) -> str:
    names = list(parts[0].seconds)
    rows = []
    for found in parts:
        # of a round, unscored as a share of scored, turned round
        middle, lowest, highest = found.timing("unscored").times_as_fast_as(found.timing("scored"))
        medians = (f"{found.timing(name).median:.3f}" for name in names)
        added = f"{middle - 1:.1%} ({lowest - 1:.1%} to {highest - 1:.1%})"
        rows.append([f"{found.n_images}", found.precision, *medians, added])
    return _table(["images", "precision", *(f"{name} (s)" for name in names), "scoring adds"], rows)


def _memory(peaks: Sequence[Peak]) -> str:
    rows = [
        [*_case(peak), f"{peak.made_bytes / 1e6:,.0f}", f"{peak.drawn_bytes / 1e6:,.0f}"] for peak in peaks
    ]  # fmt: skip
    return _table(["images", "guided", "precision", "contestant", "peak once made (MB)", "once drawn (MB)"], rows)


def _scaling(measured: Measured) -> str:
    found = by_contestant(measured.scaling)
    lengths = sorted({row.n_tokens for row in measured.scaling})
    rows = []
    for (name, precision), timed in found.items():
        least = {n: least_seconds(grid_of(n, measured.gpt), precision, 1, True, measured.rates) for n in lengths}
        seconds = [f"{r.timing.median:.2f} ({least[r.n_tokens].seconds / r.timing.median:.0%})" for r in timed]
        rows.append([name, precision, *seconds, *(_fit(timed) if len(timed) > 1 else ["", "", ""])])
    head = ["one guided image", "precision", *(f"{n:,} tokens: s (least time, of that)" for n in lengths), "slope",
            "ms a token", "and µs a token before it"]  # fmt: skip
    return _table(head, rows)


def _fit(rows: Sequence[Row]) -> list[str]:
    # quadratic · n² is the sum over tokens of 2 · quadratic for each one before
    slope, linear, quadratic = fit(rows)
    return [f"{slope:.2f}", f"{1e3 * linear:.1f}", f"{2e6 * quadratic:.2f}"]


def _case(row: Row | Peak) -> list[str]:
    return [f"{row.n_images}", "yes" if row.guided else "no", row.precision, row.contestant]


def _same_case(row: Row, other: Row) -> bool:
    return not other.ours and (row.n_images, row.guided) == (other.n_images, other.guided)


def _best_ratio(table: Sequence[Row], row: Row, precision: str) -> str:
    others = [other for other in table if _same_case(row, other) and other.precision == precision]
    if not others:
        return ""
    best = min(others, key=lambda other: other.timing.median)
    return f"{_ratio(row.timing, best.timing)}, {best.contestant}"


def _ratio(ours: Timing, theirs: Timing) -> str:
    middle, lowest, highest = ours.times_as_fast_as(theirs)
    return f"{middle:.2f}" + (f" ({lowest:.2f} to {highest:.2f})" if len(ours.seconds) > 1 else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
