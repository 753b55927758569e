"""Gradients through time as a picture: one line a model, with the quartiles over the positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lm.inspection.gradients import Floats, Gradients, ModelGradients

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"
"""Okabe and Ito's palette, for colour-blind readers."""
PLACES = {"hidden": "hidden state of layer {}", "cells": "cell state of layer {}", "inputs": "embeddings"}
MARKS = "o", "s", "^", "D", "v", "P", "X"
MARKS_A_LINE = 8


def figure(view: Gradients) -> Figure:
    """The norm of dLoss_t/dstate_{t-k} against k, on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = Figure(figsize=(9, 5.5), layout="constrained")
    axes = drawn.add_subplot()
    lags = np.arange(view.steps + 1)
    for number, model in enumerate(view.models):
        norms, color = model.main, COLORS[number % len(COLORS)]
        axes.plot(
            lags, _positive(norms.median), color=color, linewidth=1.8, marker=MARKS[number % len(MARKS)],
            markersize=4.5, markevery=max(1, view.steps // MARKS_A_LINE), label=label(model),
        )  # fmt: skip
        axes.fill_between(lags, _positive(norms.lower), _positive(norms.upper), color=color, alpha=0.18, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlim(0, view.steps)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="k: steps back", ylabel="norm of dLoss$_t$ / dstate$_{t-k}$  (line: median, band: quartiles)",
        title="How much an earlier state changes the loss now",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn


def label(model: ModelGradients) -> str:
    """Name of the model, layer and mean factor a step."""
    main = model.main
    return f"{model.name}, {PLACES[main.part].format(main.layer)}: × {main.factor_per_step:.2f} a step"


def _positive(values: Floats) -> Floats:
    """A logarithmic axis has no 0: it becomes a gap."""
    return np.where(values > 0, values, np.nan)
