"""Line charts as HTML with SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lm.html_parts import escape

COLOURS = ("#6366f1", "#f97316", "#10b981", "#ec4899", "#0ea5e9", "#eab308", "#a855f7", "#64748b")
MAX_DOTS = 40
"""A line with more points has no dots: they would hide the line."""
_MAX_TICKS = 6


@dataclass(frozen=True)
class Line:
    """A line of the chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y)"""
    colour: str = COLOURS[0]


def line_chart_html(lines: Sequence[Line], *, x_title: str, y_title: str, x_end: float | None = None) -> str:
    """A chart with axes and legend; an empty string if no line has a point.

    Args:
        lines: in the order of the legend.
        x_title: title of the horizontal axis, which begins at 0.
        y_title: title of the vertical axis.
        x_end: the horizontal axis reaches at least this value.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    right = max(x_end or 0, *(x for x, _ in points), 1e-9)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = (high - low) * 0.05 or max(abs(high) * 0.05, 0.5)
    low, high = low - margin, high + margin

    def to_svg(x: float, y: float) -> tuple[float, float]:
        return 1000 * x / right, 1000 * (high - y) / (high - low)

    grid, labels = [], []
    for tick in _ticks(low, high):
        _, y = to_svg(0, tick)
        grid.append(f'<path class="grid" d="M0 {y:.1f}H1000"/>')
        labels.append(f'<span class="y" style="top:{y / 10:.2f}%">{tick:,g}</span>')
    for tick in _ticks(0, right):
        x, _ = to_svg(tick, low)
        grid.append(f'<path class="grid" d="M{x:.1f} 0V1000"/>')
        labels.append(f'<span class="x" style="left:{x / 10:.2f}%">{tick:,g}</span>')
    paths = "".join(_line(line, [to_svg(*point) for point in line.points], x_title) for line in lines)
    keys = "".join(f'<li><i style="background:{line.colour}"></i>{escape(line.name)}</li>' for line in lines)
    about = escape(f"{y_title} by {x_title}: {', '.join(line.name for line in lines)}")
    return (
        f'<div class="curves"><div class="title">{escape(y_title)}</div><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{about}">'
        f"{''.join(grid)}{paths}</svg>{''.join(labels)}</div>"
        f'<div class="title below">{escape(x_title)}</div><ul>{keys}</ul></div>'
    )


def _line(line: Line, positions: Sequence[tuple[float, float]], x_title: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in positions)
    stroke = f'<path class="line" style="stroke:{line.colour}" d="M{path}"/>' if len(positions) > 1 else ""
    if len(positions) > MAX_DOTS:
        return stroke
    # A stroke of almost no length with round ends: a dot that stays round when the chart is stretched.
    dots = "".join(
        f'<path class="dot" style="stroke:{line.colour}" d="M{at[0]:.1f} {at[1]:.1f}h.01">'
        f"<title>{escape(line.name)}, {escape(x_title)} {x:,g}: {y:.4f}</title></path>"
        for at, (x, y) in zip(positions, line.points, strict=True)
    )
    return stroke + dots


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high."""
    power = 10.0 ** math.floor(math.log10((high - low) / _MAX_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= _MAX_TICKS)
    return [round(step * number, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
