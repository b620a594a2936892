"""Plots as SVG, which a page holds as text: lines with bands, and points with their front."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#4c78a8", "#e45756", "#3a923a", "#b279a2", "#888888", "#f2a900")
WIDTH, HEIGHT = 430, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 26, 40
_LABEL_PX = 13  # between two names


class Line(NamedTuple):
    """Points from left to right; the band's ends may be None."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]


class Point(NamedTuple):
    name: str
    x: float
    y: float


class _Axes:
    """Maps values to pixels, and draws the frame."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, log2_x: bool, right: int = _RIGHT) -> None:
        self.log2_x, self.right = log2_x, WIDTH - right
        self.x_low, self.x_high = _span([math.log2(x) for x in xs] if log2_x else xs)
        self.y_low, self.y_high = _span(ys)

    def x(self, value: float) -> float:
        value = math.log2(value) if self.log2_x else value
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - _LEFT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - _BOTTOM - _TOP)

    def frame(self, title: str, x_label: str, x_ticks: Sequence[float]) -> list[str]:
        """The title says what is on the vertical axis."""
        bottom, middle = HEIGHT - _BOTTOM, (_LEFT + self.right) / 2
        parts = [_text(_LEFT, 15, title, weight=600)]
        for tick in _ticks(self.y_low, self.y_high):
            y = self.y(tick)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{self.right}" stroke="#e6e6e6"/>')
            parts.append(_text(_LEFT - 6, y + 4, _number(tick), anchor="end"))
        for tick in x_ticks:
            parts.append(_text(self.x(tick), bottom + 15, _number(tick), anchor="middle"))
            parts.append(f'<path d="M{self.x(tick):.1f} {bottom}v4" stroke="#888"/>')
        parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{self.right}" stroke="#888" fill="none"/>')
        return [*parts, _text(middle, HEIGHT - 6, x_label, anchor="middle")]


def line_chart(title: str, lines: Sequence[Line], x_label: str) -> str:
    """Lines over a logarithmic axis, each with its name at its end and a band between its low and high values."""
    ends = [v for line in lines for v in (*line.y, *line.low, *line.high) if v is not None]
    widest = max(len(line.name) for line in lines)
    axes = _Axes([x for line in lines for x in line.x], ends, log2_x=True, right=12 + 7 * widest)
    parts = axes.frame(title, x_label, sorted({x for line in lines for x in line.x}))
    names = []
    for line, colour in zip(lines, COLOURS, strict=False):
        points = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.y, strict=True)]
        if None not in (*line.low, *line.high):
            above = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.high, strict=True)]
            below = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.low, strict=True)]
            parts.append(f'<path d="{_path(above + below[::-1])}Z" fill="{colour}" opacity=".13"/>')
        parts.append(f'<path d="{_path(points)}" stroke="{colour}" stroke-width="2" fill="none"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        names.append((points[-1][1] + 4, line.name, colour))
    for y, name, colour in _apart(names):
        parts.append(_text(axes.right + 6, y, name, colour=colour, weight=600))
    return _svg(parts)


def front_chart(title: str, points: Sequence[Point], front: Sequence[Point], x_label: str) -> str:
    """Points with their names, and a line through those of the front."""
    axes = _Axes([p.x for p in points], [p.y for p in points], log2_x=False, right=60)
    parts = axes.frame(title, x_label, _ticks(axes.x_low, axes.x_high))
    line = sorted(((axes.x(p.x), axes.y(p.y)) for p in front), key=lambda xy: xy[0])
    parts.append(f'<path d="{_path(line)}" stroke="{COLOURS[1]}" stroke-width="2" fill="none" opacity=".6"/>')
    for point in points:
        colour = COLOURS[1] if point in front else COLOURS[0]
        parts.append(f'<circle cx="{axes.x(point.x):.1f}" cy="{axes.y(point.y):.1f}" r="4" fill="{colour}"/>')
        parts.append(_text(axes.x(point.x) + 6, axes.y(point.y) - 5, point.name, colour=colour))
    return _svg(parts)


def best_front(points: Sequence[Point]) -> list[Point]:
    """Those for which no other is to the left (a smaller distance) and above (better aligned)."""

    def beaten(point: Point) -> bool:
        return any(p.x <= point.x and p.y >= point.y and (p.x, p.y) != (point.x, point.y) for p in points)

    return [point for point in points if not beaten(point)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 8)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(names: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """The same from the top down, moved so that none lies on another."""
    placed: list[tuple[float, str, str]] = []
    for y, name, colour in sorted(names):
        placed.append((max(y, placed[-1][0] + _LABEL_PX) if placed else y, name, colour))
    return placed


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#444", weight: int = 400) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}">'
            f"{escape(text)}</text>")  # fmt: skip


def _svg(parts: Sequence[str]) -> str:
    style = 'font-family="system-ui, sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" {style}>'
    return "".join([head, *parts, "</svg>"])
