"""Curves as HTML: drawn here, so that they are the same in every browser, in the dark, and on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve.page.site import safe

COLOURS = ("#6366f1", "#f97316", "#10b981", "#ec4899", "#0ea5e9", "#eab308", "#a855f7", "#64748b")
MOST_DOTS = 40
"""Points of one curve that are marked, each with its values; more would hide the line."""
_MOST_TICKS = 6


@dataclass(frozen=True)
class Curve:
    """A named line."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = COLOURS[0]


def curves_html(curves: Sequence[Curve], *, x_title: str, y_title: str, x_most: float | None = None) -> str:
    """A plot of curves with its axes and legend; nothing where no curve has a point.

    Args:
        curves: in the order of the legend, and of drawing.
        x_title: what the horizontal axis counts, from 0.
        y_title: what the vertical axis measures.
        x_most: where the horizontal axis ends at least.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    right = max(x_most or 0, *(x for x, _ in points), 1e-9)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = (high - low) * 0.05 or max(abs(high) * 0.05, 0.5)
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return 1000 * x / right, 1000 * (high - y) / (high - low)

    grid, labels = [], []
    for tick in _ticks(low, high):
        _, y = place(0, tick)
        grid.append(f'<path class="grid" d="M0 {y:.1f}H1000"/>')
        labels.append(f'<span class="y" style="top:{y / 10:.2f}%">{tick:,g}</span>')
    for tick in _ticks(0, right):
        x, _ = place(tick, low)
        grid.append(f'<path class="grid" d="M{x:.1f} 0V1000"/>')
        labels.append(f'<span class="x" style="left:{x / 10:.2f}%">{tick:,g}</span>')
    lines = "".join(_line(curve, [place(*point) for point in curve.points], x_title) for curve in curves)
    keys = "".join(f'<li><i style="background:{curve.colour}"></i>{safe(curve.name)}</li>' for curve in curves)
    about = safe(f"{y_title} by {x_title}: {', '.join(curve.name for curve in curves)}")
    return (
        f'<div class="curves"><div class="title">{safe(y_title)}</div><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{about}">'
        f"{''.join(grid)}{lines}</svg>{''.join(labels)}</div>"
        f'<div class="title below">{safe(x_title)}</div><ul>{keys}</ul></div>'
    )


def _line(curve: Curve, places: Sequence[tuple[float, float]], x_title: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    line = f'<path class="line" style="stroke:{curve.colour}" d="M{path}"/>' if len(places) > 1 else ""
    if len(places) > MOST_DOTS:
        return line
    # A stroke without length and with round ends: a dot that stays round however the plot is stretched.
    dots = "".join(
        f'<path class="dot" style="stroke:{curve.colour}" d="M{at[0]:.1f} {at[1]:.1f}h.01">'
        f"<title>{safe(curve.name)}, {safe(x_title)} {x:,g}: {y:.4f}</title></path>"
        for at, (x, y) in zip(places, curve.points, strict=True)
    )
    return line + dots


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high."""
    power = 10.0 ** math.floor(math.log10((high - low) / _MOST_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= _MOST_TICKS)
    return [round(step * number, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


CURVES_CSS = """
.curves { color: var(--body-text-color-subdued); font-size: .82rem; }
.curves .plot { position: relative; height: 14rem; margin: .4rem .9rem 1.5rem 3rem; }
.curves svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.curves path { vector-effect: non-scaling-stroke; fill: none; }
.curves .grid { stroke: var(--border-color-primary); stroke-width: 1; }
.curves .line { stroke-width: 2; stroke-linejoin: round; }
.curves .dot { stroke-width: 6; stroke-linecap: round; }
.curves .dot:hover { stroke-width: 10; }
.curves span { position: absolute; font-variant-numeric: tabular-nums; }
.curves .y { right: 100%; padding-right: .4rem; transform: translateY(-50%); }
.curves .x { top: 100%; padding-top: .25rem; transform: translateX(-50%); }
.curves .below { text-align: center; }
.curves ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .3rem 0 0; padding: 0; list-style: none; }
.curves li { display: flex; align-items: center; gap: .35rem; margin: 0; color: var(--body-text-color);
  overflow-wrap: anywhere; }
.curves li i { flex: none; width: 1rem; height: .2rem; border-radius: .1rem; }
"""
