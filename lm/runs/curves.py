"""Learning curves: from the metrics of runs to a picture, or to lines for a terminal.

metrics.jsonl ──► curves ──► (with_bands) ──► draw (PNG, SVG, PDF: matplotlib)   or   sketch (text: uniplot)

Runs that differ by their seed alone can be one curve: their mean, with a band that shows their spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

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
BandKind = Literal["min-max", "std"]
BANDS: dict[BandKind, str] = {"min-max": "lowest to highest", "std": "± standard deviation"}
"""Kind of band → its name in the legend."""
FORMATS = ("png", "svg", "pdf")
MAX_NATS = 700.0
"""A higher loss has no perplexity that fits a float, so no point in the picture."""
MAX_SKETCHED = 8
SIGNS, BAND_SIGN = "+xo*~=abcdefghijklmnpqrstuvwyz", "."
"""Of curves in a terminal without colours, and of the ends of a band."""
COLORS = "blue", "magenta", "green", "yellow", "cyan", "red"
"""Of curves in a terminal, by uniplot's names."""
START = 0.03
"""First share of a training curve that may lie outside the picture."""
BORDER = 14
"""Characters left and right of a plot in the terminal: the frame and the numbers."""


@dataclass(frozen=True)
class Band:
    """The spread of several runs around their mean."""

    kind: BandKind
    runs: tuple[str, ...]
    """Those of the mean."""
    low: list[float]
    high: list[float]
    """Ends of the band at each point of the curve."""


@dataclass(frozen=True)
class Curve:
    """One curve of the picture."""

    run: str
    """Name of the run, or of the group of runs that `band` names."""
    split: str
    """train, valid, or "" for a figure of training itself."""
    x: list[float]
    y: list[float]
    band: Band | None = None
    """With it, `y` is the mean of several runs."""

    @property
    def label(self) -> str:
        """In the legend."""
        name = f"{self.run} {self.split}".strip()
        return name if self.band is None else f"{name}: mean"

    @property
    def ends(self) -> tuple[list[float], list[float]]:
        """The lowest and the highest value at each point."""
        return (self.y, self.y) if self.band is None else (self.band.low, self.band.high)


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
            raise RunError(
                f"Run {run.name!r} has no learning curve: its metrics.jsonl is missing or empty, as of an imported run."
            )
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


# -- bands across seeds ------------------------------------------------------------------------------------


def with_bands(drawn: Sequence[Curve], groups: Mapping[str, str], kind: str) -> list[Curve]:
    """The curves, with those of a group of several runs as one: their mean, with a band.

    Runs have their points at different places, as in plans by time. So each curve is interpolated linearly at the
    points of all, where every curve of the group has values. The standard deviation is that of a sample.

    Args:
        drawn: from `curves`.
        groups: run → name of its group.
        kind: min-max or std.

    Raises:
        ConfigError: no such kind of band.
    """
    if kind not in get_args(BandKind):
        raise ConfigError(f"--bands {kind!r}: use {' or '.join(get_args(BandKind))}.")
    found: dict[tuple[str, str], list[Curve]] = {}
    for curve in drawn:
        found.setdefault((groups.get(curve.run, curve.run), curve.split), []).append(curve)
    return [
        replace(each[0], run=name) if len(each) == 1 else _mean(name, each, kind)  # type: ignore[arg-type]
        for (name, _), each in found.items()
    ]


def _mean(name: str, group: Sequence[Curve], kind: BandKind) -> Curve:
    first, last = max(curve.x[0] for curve in group), min(curve.x[-1] for curve in group)
    points = sorted({x for curve in group for x in curve.x if first <= x <= last})
    if not points:
        # Nothing in common, such as one point each: the mean of the ends.
        points = [first]
    values = np.array([np.interp(points, curve.x, curve.y) for curve in group])
    mean = values.mean(axis=0)
    if kind == "std":
        deviation = values.std(axis=0, ddof=1)
        low, high = mean - deviation, mean + deviation
    else:
        low, high = values.min(axis=0), values.max(axis=0)
    band = Band(kind, tuple(curve.run for curve in group), low.tolist(), high.tolist())
    return Curve(name, group[0].split, points, mean.tolist(), band)


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
        if curve.band is not None:
            shade = 0.08 if curve.split == "train" else 0.18
            axes.fill_between(curve.x, *curve.ends, color=colors[curve.run], alpha=shade, linewidth=0)
    x_title, y_title = _titles(metric, by)
    axes.set(xlabel=x_title, ylabel=y_title)
    axes.set_ylim(*_span(drawn))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if by == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    title = _band_title(drawn)
    if len(drawn) > 1 or title:
        axes.legend(frameon=False, ncols=1 + (len(drawn) > 12), title=title)
    picture = io.BytesIO()
    figure.savefig(picture, format=ending, dpi=150)
    write_file(path, picture.getvalue())


def _band_title(drawn: Sequence[Curve]) -> str | None:
    """What the bands are; None: there is none."""
    kinds = {curve.band.kind for curve in drawn if curve.band is not None}
    return f"band: {', '.join(BANDS[kind] for kind in sorted(kinds))} of the seeds" if kinds else None


def _span(drawn: Sequence[Curve]) -> tuple[float, float]:
    """Range of the vertical axis, without the first drop of the training loss, which would flatten the rest."""
    begun = START * max(curve.x[-1] for curve in drawn)
    values = [
        y
        for curve in drawn
        for ends in curve.ends
        for x, y in zip(curve.x, ends, strict=True)
        if curve.split != "train" or x >= begun
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
    # A terminal has no areas: the ends of a band are points, in the colour or with the sign of `BAND_SIGN`.
    banded = [place for place, curve in enumerate(drawn) if curve.band is not None and curve.split != "train"]
    ends = [end for place in banded for end in drawn[place].ends]
    owners = [*range(len(drawn)), *(place for place in banded for _ in ("low", "high"))]
    title = _band_title(drawn)
    picture: str = plot_to_string(
        xs=[drawn[place].x for place in owners],
        ys=[*(curve.y for curve in drawn), *ends],
        lines=[*(True for _ in drawn), *(False for _ in ends)],
        color=[COLORS[place % len(COLORS)] for place in owners] if color else False,
        character_set="block" if color else "ascii",
        force_ascii_characters=[
            *(SIGNS[place % len(SIGNS)] for place in range(len(drawn))),
            *(BAND_SIGN for _ in ends),
        ],
        # The ends have no label: the title names them.
        legend_labels=[curve.label for curve in drawn],
        title=f"{y_title}, by {x_title}" + (f"; {title} (points)" if title else ""),
        width=max(20, width - BORDER),
        height=height,
    )
    return picture.splitlines()
