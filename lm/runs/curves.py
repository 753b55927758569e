"""Learning curves: from the metrics of runs to a picture, or to lines for a terminal.

metrics.jsonl ──► curves ──► draw (PNG, SVG, PDF: matplotlib)   or   sketch (text: uniplot)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lm.errors import ConfigError, MissingExtraError, RunError
from lm.files import write_file
from lm.registry import did_you_mean
from lm.runs.run_folder import RunFolder

Axis = Literal["step", "tokens", "time"]
AXES: dict[Axis, tuple[str, str]] = {
    "step": ("step", "step"), "tokens": ("tokens", "tokens of training"), "time": ("seconds", "minutes of training"),
}  # fmt: skip
"""Axis → field of metrics.jsonl, and title."""
UNITS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte", "memory_bytes": "memory (bytes)"}
FORMATS = ("png", "svg", "pdf")
MAX_NATS = 700.0
"""A higher loss has no perplexity that fits a float, so no point in the picture."""
MAX_SKETCHED = 8
START = 0.03
"""First share of a training curve that may lie outside the picture."""
BORDER = 14
"""Characters left and right of a plot in the terminal: the frame and the numbers."""


@dataclass(frozen=True)
class Curve:
    """One curve of the picture."""

    run: str
    split: str
    """train, valid, or "" for a figure of training itself."""
    x: list[float]
    y: list[float]

    @property
    def label(self) -> str:
        """In the legend."""
        return f"{self.run} {self.split}".strip()


def curves(runs: Sequence[RunFolder], metric: str = "loss", by: str = "step") -> list[Curve]:
    """The training and validation curves of runs.

    Args:
        runs: with a metrics.jsonl.
        metric: loss, perplexity, bits_per_byte, accuracy, or any figure of a line, such as learning_rate.
        by: step, tokens or time.

    Raises:
        ConfigError: no such metric or axis.
        RunError: a run has no lines with it.
    """
    if by not in get_args(Axis):
        raise ConfigError(f"--by {by!r}: use {', '.join(get_args(Axis))}.")
    found, known = [], set()
    for run in runs:
        rows = [_with_perplexity(row) for row in run.read_metrics()]
        if not rows:
            raise RunError(f"Run {run.name!r} has no learning curve: its metrics.jsonl is missing or empty.")
        known |= {name.removeprefix("train_").removeprefix("valid_") for row in rows for name in row if name != "step"}
        for split in ("train", "valid", ""):
            curve = _curve(run.name, split, rows, metric, AXES[by][0])  # type: ignore[index]
            if curve.y:
                found.append(curve)
    if metric not in known:
        known -= {"sample", "tokens", "seconds", "best_step"}
        raise ConfigError(
            f"--metric {metric!r}: there is no such figure.{did_you_mean(metric, known)} There are: "
            f"{', '.join(sorted(known))}."
        )
    if missing := [run.name for run in runs if run.name not in {curve.run for curve in found}]:
        raise RunError(f"Run {missing[0]!r} has no {metric} by {by}: it was trained without, or by an older Inkling.")
    return found


def _with_perplexity(row: dict[str, Any]) -> dict[str, Any]:
    losses = {name: row[name] for name in ("train_loss", "valid_loss") if _is_number(row.get(name))}
    return row | {
        name.replace("loss", "perplexity"): math.exp(loss) for name, loss in losses.items() if loss < MAX_NATS
    }


def _curve(run: str, split: str, rows: list[dict[str, Any]], metric: str, axis: str) -> Curve:
    name = f"{split}_{metric}" if split else metric
    points = [row for row in rows if _is_number(row.get(name)) and _is_number(row.get(axis))]
    scale = 60 if axis == "seconds" else 1
    return Curve(run, split, [row[axis] / scale for row in points], [row[name] for row in points])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _titles(metric: str, by: str) -> tuple[str, str]:
    return AXES[by][1], UNITS.get(metric, metric.replace("_", " "))  # type: ignore[index]


def draw(drawn: Sequence[Curve], path: Path, *, metric: str, by: str) -> None:
    """Write the picture; the file's suffix gives the format.

    Raises:
        ConfigError: the suffix is no known format.
        MissingExtraError: matplotlib is not installed.
        RunError: the file cannot be written.
    """
    import io

    ending = path.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise ConfigError(f"{path}: a picture's name ends with .{', .'.join(FORMATS[:-1])} or .{FORMATS[-1]}.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise MissingExtraError(
            "Pictures need matplotlib: pip install '.[plot]' in a checkout of Inkling. Or plot in the terminal with "
            "--terminal."
        ) from None
    # Not pyplot, which has global state and opens windows.
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    colors = {run: f"C{number % 10}" for number, run in enumerate(dict.fromkeys(curve.run for curve in drawn))}
    for curve in drawn:
        style: dict[str, Any] = {"color": colors[curve.run], "label": curve.label}
        if curve.split == "train":
            # Validation curves matter more than training curves.
            style |= {"alpha": 0.4, "linewidth": 1}
        elif curve.split == "valid":
            style |= {"marker": "o", "markersize": 3.5, "linewidth": 1.8}
        axes.plot(curve.x, curve.y, **style)
    x_title, y_title = _titles(metric, by)
    axes.set(xlabel=x_title, ylabel=y_title)
    axes.set_ylim(*_span(drawn))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if by == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(drawn) > 1:
        axes.legend(frameon=False, ncols=1 + (len(drawn) > 12))
    picture = io.BytesIO()
    figure.savefig(picture, format=ending, dpi=150)
    write_file(path, picture.getvalue())


def _span(drawn: Sequence[Curve]) -> tuple[float, float]:
    """Range of the vertical axis, without the first drop of the training loss, which would flatten the rest."""
    begun = START * max(curve.x[-1] for curve in drawn)
    values = [
        y for curve in drawn for x, y in zip(curve.x, curve.y, strict=True) if curve.split != "train" or x >= begun
    ]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def sketch(drawn: Sequence[Curve], *, metric: str, by: str, width: int, height: int, color: bool) -> list[str]:
    """Lines for a terminal: the picture and its legend.

    Args:
        drawn: the curves; if there are many, only those of validation are drawn.
        metric, by: for the titles.
        width: of the terminal, in characters.
        height: of the plot, in lines.
        color: whether the curves have colours; else they are drawn with letters.

    Raises:
        MissingExtraError: uniplot is not installed.
    """
    try:
        from uniplot import plot_to_string
    except ImportError:
        needed = "Plots in the terminal need uniplot: pip install '.[plot]' in a checkout of Inkling."
        raise MissingExtraError(needed) from None
    if len(drawn) > MAX_SKETCHED:
        drawn = [curve for curve in drawn if curve.split != "train"]
    x_title, y_title = _titles(metric, by)
    picture: str = plot_to_string(
        xs=[curve.x for curve in drawn],
        ys=[curve.y for curve in drawn],
        lines=True,
        color=color,
        character_set="block" if color else "ascii",
        legend_labels=[curve.label for curve in drawn],
        title=f"{y_title}, by {x_title}",
        width=max(20, width - BORDER),
        height=height,
    )
    return picture.splitlines()
