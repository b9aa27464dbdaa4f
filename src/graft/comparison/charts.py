"""Charts as inline SVG, coloured by the page's style sheet so that they suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_CHARACTER = 6.6
"""Width of a character of a label, in px, about."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 40
_MOST_POINTS = 400


@dataclass(frozen=True)
class Point:
    """A mark in a scatter chart."""

    x: float
    y: float
    label: str
    y_spread: float | None = None


@dataclass(frozen=True)
class Line:
    """A line in a line chart."""

    points: Sequence[tuple[float, float]]
    style: str
    """Class of the style sheet: 'raw', 'smooth' or 'held'."""
    marks: bool = False


@dataclass(frozen=True)
class _Scale:
    """Maps [low, high] to [start, end] in px."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * (value - self.low) / span

    def ticks(self) -> list[float]:
        step = _step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [count * step for count in range(first, last + 1)]


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Return a scatter chart; each mark has its label beside it, where there is room."""
    width, height = 760, 400
    spreads = [point.y_spread or 0.0 for point in points]
    lows = [point.y - spread for point, spread in zip(points, spreads, strict=True)]
    highs = [point.y + spread for point, spread in zip(points, spreads, strict=True)]
    x = _scale([0.0, *(point.x for point in points)], _LEFT, width - _RIGHT, room=(0.0, 0.12))
    y = _scale([*lows, *highs], height - _BOTTOM, _TOP, room=(0.1, 0.1))
    parts = [_axes(x, y, width, height, x_title, y_title)]
    taken = [
        (x.at(point.x) - 6, y.at(point.y) - 6, x.at(point.x) + 6, y.at(point.y) + 6)
        for point in points
    ]
    for point, spread in zip(points, spreads, strict=True):
        left, top = x.at(point.x), y.at(point.y)
        if spread:
            ends = y.at(point.y - spread), y.at(point.y + spread)
            parts.append(
                f'<line class="bar-line" x1="{left:.1f}" x2="{left:.1f}" y1="{ends[0]:.1f}" '
                f'y2="{ends[1]:.1f}"/>'
            )
        parts.append(f'<circle class="mark" cx="{left:.1f}" cy="{top:.1f}" r="5"/>')
        box = _place(point.label, left, top, taken, width)
        taken.append(box)
        parts.append(f'<text x="{box[0]:.1f}" y="{box[3] - 4:.1f}">{escape(point.label)}</text>')
    return _svg(width, height, parts, f"{y_title} against {x_title}")


def lines(
    drawn: Sequence[Line], x_title: str, y_title: str, y_range: tuple[float, float], title: str
) -> str:
    """Return a line chart of a given range of y, at which lines are cut off."""
    width, height = 372, 250
    xs = [x for line in drawn for x, _ in line.points]
    x = _scale([0.0, *xs], _LEFT, width - _RIGHT, room=(0.0, 0.0))
    y = _Scale(*y_range, height - _BOTTOM, _TOP)
    parts = []
    for line in drawn:
        kept = line.points[:: max(1, len(line.points) // _MOST_POINTS)]
        at = [(x.at(a), y.at(b)) for a, b in kept]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in at)
        parts.append(f'<polyline class="{escape(line.style)}" points="{path}"/>')
        if line.marks:
            parts += [
                f'<circle class="{escape(line.style)}-mark" cx="{left:.1f}" cy="{top:.1f}" r="3">'
                f"<title>{b:.4f} at {a:,.0f}</title></circle>"
                for (left, top), (a, b) in zip(at, kept, strict=True)
            ]
    # An inner svg cuts off what is outside; the marks at the ends have 4 px beyond it.
    box = f"{_LEFT - 4} {_TOP} {width - _LEFT - _RIGHT + 8} {height - _TOP - _BOTTOM + 4}"
    left_edge, top_edge, wide, high = box.split()
    inner = (
        f'<svg x="{left_edge}" y="{top_edge}" width="{wide}" height="{high}" viewBox="{box}">'
        f"{''.join(parts)}</svg>"
    )
    return _svg(width, height, [_axes(x, y, width, height, x_title, y_title), inner], title)


def bars(values: Sequence[tuple[str, float, str]], title: str) -> str:
    """Return horizontal bars from 0 of (label, value, value in words)."""
    width, row = 372, 24
    label_width = 12 + _CHARACTER * max(len(label) for label, _, _ in values)
    end_width = 14 + _CHARACTER * max(len(words) for _, _, words in values)
    most = max(value for _, value, _ in values) or 1.0
    room = max(40.0, width - label_width - end_width)
    parts = []
    for index, (label, value, words) in enumerate(values):
        top, length = index * row + 4, max(1.0, room * value / most)
        parts.append(
            f'<text x="{label_width - 8:.1f}" y="{top + 13}" text-anchor="end">'
            f"{escape(label)}</text>"
            f'<rect class="bar" x="{label_width:.1f}" y="{top}" width="{length:.1f}" height="17" '
            f'rx="2"/><text x="{label_width + length + 6:.1f}" y="{top + 13}">'
            f"{escape(words)}</text>"
        )
    full = max(width, round(label_width + room + end_width))
    return _svg(full, row * len(values) + 8, parts, title)


def _axes(x: _Scale, y: _Scale, width: int, height: int, x_title: str, y_title: str) -> str:
    parts = []
    for value in y.ticks():
        top = y.at(value)
        parts.append(
            f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{top:.1f}" '
            f'y2="{top:.1f}"/><text class="tick" x="{x.start - 6:.1f}" y="{top + 4:.1f}" '
            f'text-anchor="end">{value:,.6g}</text>'
        )
    for value in x.ticks():
        parts.append(
            f'<text class="tick" x="{x.at(value):.1f}" y="{y.start + 16:.1f}" '
            f'text-anchor="middle">{value:,.6g}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y.start:.1f}" '
        f'y2="{y.start:.1f}"/>'
        f'<text class="title" x="{(x.start + x.end) / 2:.1f}" y="{height - 6}" '
        f'text-anchor="middle">{escape(x_title)}</text>'
        f'<text class="title" transform="translate(13 {(y.start + y.end) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_title)}</text>'
    )
    return "".join(parts)


def _place(
    label: str,
    left: float,
    top: float,
    taken: Sequence[tuple[float, float, float, float]],
    width: int,
) -> tuple[float, float, float, float]:
    """Return the box (left, top, right, bottom) of a label where it covers the least."""
    size = _CHARACTER * len(label)
    choices = []
    for shift in (0, -16, 16, -32, 32, -48, 48):
        for start in (left + 9, left - 9 - size):
            box = (start, top - 8 + shift, start + size, top + 8 + shift)
            outside = max(0.0, _LEFT - box[0]) + max(0.0, box[2] - width)
            covered = sum(_overlap(box, other) for other in taken)
            choices.append((covered + 100 * outside, abs(shift), box))
    return min(choices, key=lambda choice: choice[:2])[2]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _scale(values: Sequence[float], start: float, end: float, room: tuple[float, float]) -> _Scale:
    low, high = min(values), max(values)
    span = high - low or abs(high) * 0.1 or 1.0
    return _Scale(low - room[0] * span, high + room[1] * span, start, end)


def _step(least: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
