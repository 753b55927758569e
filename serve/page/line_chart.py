"""Line charts by uPlot (`assets/uPlot.iife.min.js`, MIT): hover, zoom, log scale, smoothing, PNG and CSV.

    plot = LineChart(elem_id="runs-plot")
    ...
    return {plot: chart([ChartLine("gru", steps, bits, best=7)], x_title="step", y_title="bits per byte", file="runs")}

uPlot has 51 kB and no dependency; Plotly would have 4.5 MB. The browser gets it when the first chart appears.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from serve.page.assets import asset_url, read_asset

# No subclass of gr.HTML: Gradio would write a .pyi file for it.
LineChart: Callable[..., Any] = functools.partial(
    gr.HTML, None, html_template="", css_template=read_asset("line_chart.css"),
    js_on_load=read_asset("line_chart.js"), apply_default_css=False,
    head=f'<script src="{asset_url("uPlot.iife.min.js")}"></script>',
)  # fmt: skip
"""The component for `chart`."""


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart, perhaps with a band around it."""

    name: str
    """In the legend; unique."""
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    """As #rrggbb."""
    thin: bool = False
    """For a line of less importance; the first drop of such a line does not set the scale."""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Ends of the band at each point."""
    best: int | None = None
    """Index of the point to mark."""


def chart(
    lines: Sequence[ChartLine], *, x_title: str, y_title: str, file: str, x_end: float | None = None
) -> dict[str, Any] | None:
    """The value of a `LineChart`; None if no line has a point, and the chart is then hidden.

    Args:
        lines: in the order of the legend.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        file: name of the saved picture and table, without its suffix.
        x_end: the horizontal axis reaches at least this value.
    """
    if not any(len(line.x) for line in lines):
        return None
    return {"lines": [asdict(line) for line in lines], "x_title": x_title, "y_title": y_title, "file": file,
            "x_end": x_end}  # fmt: skip
