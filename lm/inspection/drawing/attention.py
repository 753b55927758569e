"""Attention as a picture: the map of each head, and what the division by sqrt(D) does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lm.inspection.attention import Attention

INCHES_PER_TOKEN, LEAST_PANEL, MOST_WIDTH = 0.1, 2.2, 22.0
"""Of a map: a token's label has 7 points."""
SINGLE_PANEL = 6.0
"""Of the map of one head alone."""
LEAST_BARS = 6
"""Heads for which there is room, so that the bars of one head are not wide."""
SCALED, UNSCALED = "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito's palette, for colour-blind readers."""


def figure(view: Attention) -> Figure:
    """A row of maps a layer, a column a head; below, entropy and gradient with the division and without."""
    from matplotlib.figure import Figure

    layers, heads, tokens, _ = view.maps.shape
    least = SINGLE_PANEL if layers * heads == 1 else LEAST_PANEL
    panel = min(max(least, tokens * INCHES_PER_TOKEN), MOST_WIDTH / heads)
    width = max(9.0, panel * heads + 1.6)
    drawn = Figure(figsize=(width, (panel + 0.35) * layers + 4.6), layout="constrained")
    title = f"{view.run}: attention along {view.text}"
    drawn.suptitle(title, fontsize=13)
    halves: Any = drawn.subfigures(2, 1, height_ratios=[(panel + 0.35) * layers + 0.6, 3.6])
    maps, below = halves
    panels = maps.subplots(layers, heads, squeeze=False)
    image: Any = None
    for row in range(layers):
        for column in range(heads):
            image = _map(panels[row, column], view, row, column, panel)
    maps.supylabel("query: the token that looks", fontsize=10)
    maps.supxlabel("key: the token that is looked at", fontsize=10)
    bar = maps.colorbar(image, ax=panels, fraction=0.02, pad=0.01)
    bar.set_label("weight", fontsize=9)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    _scaling(below, view)
    return drawn


def _map(axes: Any, view: Attention, row: int, column: int, panel: float) -> Any:
    from matplotlib.colors import PowerNorm

    weights = view.maps[row, column]
    tokens = len(weights)
    # Later tokens cannot be looked at: they are grey.
    seen = np.ma.array(weights, mask=np.triu(np.ones_like(weights, dtype=bool), 1))
    image = axes.imshow(seen, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set_facecolor("#e4e4e4")
    head = view.heads[row * view.maps.shape[1] + column]
    facts = f"{head.entropy:.2f} nats, {head.distance:.1f} back, {head.first:.0%} first"
    axes.set_title(f"layer {head.layer}, head {head.head}\n{facts}", fontsize=8)
    points = 72 * panel / tokens
    every = max(1, math.ceil(5.0 / points))
    places = range(0, tokens, every)
    # The sign of a space in `pieces` would touch the label below it.
    names = [view.pieces[place].replace("▁", "␣") for place in places]
    size = min(8.0, points * every * 0.95)
    is_left, is_low = column == 0, row == view.maps.shape[0] - 1
    axes.set_yticks(places if is_left else [], names if is_left else [], fontsize=size)
    axes.set_xticks(places if is_low else [], names if is_low else [], fontsize=size, rotation=90)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    return image


def _scaling(below: Any, view: Attention) -> None:
    places = np.arange(len(view.heads))
    entropy, gradient = below.subplots(1, 2)
    root = f"sqrt({view.head_size}) = {math.sqrt(view.head_size):.2f}"
    series = (
        (entropy, "entropy", "unscaled_entropy", "entropy of the weights, nats"),
        (gradient, "gradient", "unscaled_gradient", "norm of the softmax's Jacobian"),
    )
    for axes, scaled, unscaled, label in series:
        axes.bar(places - 0.2, [getattr(head, scaled) for head in view.heads], 0.4, color=SCALED)
        axes.bar(places + 0.2, [getattr(head, unscaled) for head in view.heads], 0.4, color=UNSCALED)
        axes.set_ylabel(label, fontsize=9)
        axes.set_xlabel("layer.head", fontsize=9)
        crowded = len(places) > 24
        names = [f"{head.layer}.{head.head}" for head in view.heads]
        axes.set_xticks(places, names, fontsize=6 if crowded else 8, rotation=90 if crowded else 0)
        axes.set_xlim(-0.7, max(len(places), LEAST_BARS) - 0.3)
        axes.spines[["top", "right"]].set_visible(False)
    entropy.axhline(view.even_entropy, color="#5d6670", linewidth=1, linestyle=":")
    entropy.annotate(
        "equal weights", (1, view.even_entropy), xycoords=("axes fraction", "data"), fontsize=8, color="#5d6670",
        ha="right", va="bottom",
    )  # fmt: skip
    handles = [
        entropy.bar(0, 0, color=color, label=label)
        for color, label in ((SCALED, f"scores / {root}"), (UNSCALED, "the same scores, not divided"))
    ]
    below.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
