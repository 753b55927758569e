"""The reliability diagram: how often the first choice is right, by its probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.evaluation.calibration import Calibration, Reliability
from lm.inspection.drawing.gradients import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(calibration: Calibration, title: str) -> Figure:
    """Two diagrams: bins of equal mass, and of equal width with their shares of the tokens."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 5.8), layout="constrained")
    drawn.suptitle(title, fontsize=12)
    left, right = drawn.subplots(1, 2, sharey=True)
    _diagonal(left, "equal mass", calibration.equal_mass)
    bins = calibration.equal_mass.bins
    left.plot(
        [each.confidence for each in bins], [each.accuracy for each in bins],
        color=COLORS[0], marker="o", markersize=4.5, linewidth=1.5, label="first choice right",
    )  # fmt: skip
    left.set_ylabel("share of tokens where the first choice is right")
    left.legend(frameon=False, loc="upper left")
    _diagonal(right, "equal width", calibration.equal_width)
    bins = calibration.equal_width.bins
    widths = [each.high - each.low for each in bins]
    places = [each.low for each in bins]
    shares = [each.tokens / calibration.tokens for each in bins]
    right.bar(
        places, [each.accuracy for each in bins], widths,
        align="edge", color=COLORS[0], edgecolor="white", label="first choice right",
    )  # fmt: skip
    right.bar(places, shares, widths, align="edge", color=COLORS[1], edgecolor="white", label="share of the tokens")
    right.legend(frameon=False, loc="upper left")
    return drawn


def _diagonal(axes: Axes, kind: str, reliability: Reliability) -> None:
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--")
    axes.set(
        xlim=(0, 1), ylim=(0, 1), box_aspect=1, xlabel="probability of the first choice",
        title=f"{len(reliability.bins)} bins of {kind}: error {reliability.error:.4f}",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
