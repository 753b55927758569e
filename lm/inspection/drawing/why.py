"""Why tokens were predicted, as an HTML page (the text, coloured by source) or a picture (totals of the sources)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lm.html_parts.page import whole_page
from lm.inspection.why import Floats, Why
from lm.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10_000
"""Tokens that a page shows."""
HUES: dict[str, tuple[str, str]] = {
    # From light to dark, for the first and the last of a kind; from Okabe and Ito's palette, for colour-blind readers.
    "network": ("#009e73", "#009e73"),
    "bias": ("#8c8c8c", "#8c8c8c"),
    "table": ("#ffd27a", "#d07000"),
    "counts": ("#b5dcf5", "#0072b2"),
    "mixing": ("#cc79a7", "#cc79a7"),
    "layer": ("#f0e442", "#b0530a"),
}
OTHER = ("#d9d9d9", "#6e6e6e")
"""The ends of a kind without a name here."""
LEAST_GAIN = 0.1
"""Nats: a token on which no source has at least this is not coloured."""
PERCENTS = (25, 45, 65, 85)
"""Strengths of a colour: of a gain below a quarter of log V, …, of more than three quarters."""
LEAST_LABEL = 0.08
"""Share of a bar that has room for a name."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

WHY_STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; color: #111;
  background: #fff; border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem; }
.tokens i { font-style: normal; color: #5d6670; }
.legend i { border: 1px solid #0003; }
.sum { display: flex; height: 1.6rem; margin: .15rem 0; }
.sum b { font: 11px/1.6rem system-ui, sans-serif; overflow: hidden; text-align: center; box-sizing: border-box; }
"""


def colors_of(names: Sequence[str]) -> list[str]:
    """A colour for each name; those that differ in their number alone go from light to dark."""
    kinds = [name.split(maxsplit=1)[0] for name in names]
    colors = []
    for place, kind in enumerate(kinds):
        begin, end = HUES.get(kind, OTHER)
        share = kinds[:place].count(kind) / max(1, kinds.count(kind) - 1)
        channels = zip(_channels(begin), _channels(end), strict=True)
        colors.append("#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in channels))
    return colors


def _channels(color: str) -> list[int]:
    return [int(color[place : place + 2], 16) for place in (1, 3, 5)]


def _ink(color: str) -> str:
    """Black or white: the one that is easier to read on a colour."""
    red, green, blue = _channels(color)
    return "#111" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"


def page(view: Why) -> str:
    """The whole HTML page, without external files."""
    layers = _layer_names(view)
    names = [*view.sources, *layers]
    colors = [*colors_of(view.sources), *colors_of(layers)]
    styles = "".join(
        f".c{index}-{step} {{ background: color-mix(in srgb, {color} {percent}%, #fff); }}\n"
        for index, color in enumerate(colors)
        for step, percent in enumerate(PERCENTS)
    )
    notes = "".join(f"<p>Note: {escape(note)}.</p>" for note in view.notes)
    if len(view.pieces) > SHOWN:
        notes += f"<p>Note: the text below is the first {SHOWN:,} of {len(view.pieces):,} tokens.</p>"
    by_layer = ""
    if layers:
        by_layer = (
            "<h2>By layer</h2><p>The output layer applied after each layer (logit lens). A token has the colour of the "
            f"layer that added most to its log-probability.</p>{_legend(layers, colors[len(view.sources) :])}"
            f"{_totals(view, layers, view.layer_gains.mean(axis=0), colors[len(view.sources) :])}"
            f"{_tokens(view, view.layer_gains, layers, len(view.sources))}"
        )
    body = f"""<h1>What {escape(view.run)} predicts from</h1>
<p>{len(view.pieces):,} tokens of {escape(view.text)}, loss {view.loss:.3f} nats per token. Inkling {__version__}.</p>
<p>The log-probability of each token is exactly the sum of what the sources added to the uniform distribution, which
gives {view.baseline.mean():.2f} nats. A token has the colour of the source that added most; the stronger the colour,
the more. Point at a token to see all terms.</p>{notes}
{_legend(view.sources, colors)}
<h2>Mean nats per token</h2>
<p>From the uniform distribution to certainty: what sources added, what they took away, and the loss that is left.</p>
{_totals(view, view.sources, view.terms.mean(axis=0), colors)}
{_parts(view)}
<h2>Text</h2>
{_tokens(view, view.terms, names, 0)}
{by_layer}"""
    return whole_page(f"Sources of the predictions of {view.run}", body, WHY_STYLE + styles)


def _layer_names(view: Why) -> list[str]:
    return [f"layer {number}" for number in range(view.layers.shape[1])]


def _legend(names: Sequence[str], colors: Sequence[str]) -> str:
    entries = (
        f'<span><i style="background:{color}"></i>{escape(name)}</span>'
        for name, color in zip(names, colors, strict=False)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _totals(view: Why, names: Sequence[str], means: Floats, colors: Sequence[str]) -> str:
    """Bars in one scale, from the uniform distribution to certainty: what was added, what was taken away, the loss."""
    signed = [
        (name, mean, f"background:{color};color:{_ink(color)}")
        for name, mean, color in zip(names, means.tolist(), colors, strict=False)
    ]
    gained = [(name, mean, look) for name, mean, look in signed if mean > 0]
    lost = [(name, -mean, look) for name, mean, look in signed if mean < 0]
    end = sum(mean for _, mean, _ in gained)
    reached = max(0.0, end - sum(size for _, size, _ in lost))
    scale = max(end, reached + view.loss)

    def bar(left: float, entries: Sequence[tuple[str, float, str]]) -> str:
        parts = "".join(
            f'<b style="width:{100 * size / scale:.2f}%;{look}" title="{escape(name)}: {size:.3f} nats">'
            f"{escape(name) if size > scale * LEAST_LABEL else ''}</b>"
            for name, size, look in entries
        )
        return f'<div class="sum"><b style="width:{100 * left / scale:.2f}%"></b>{parts}</div>'

    bars = bar(0, gained) + (bar(reached, lost) if lost else "")
    bars += bar(reached, [("loss", view.loss, "border:1px solid var(--soft)")])
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{mean:+.3f}</td></tr>" for name, mean, _ in signed)
    sums = f"<tr><td>uniform distribution</td><td>{view.baseline.mean():.3f}</td></tr>{rows}"
    foot = f"<tfoot><tr><td>log-probability (minus the loss)</td><td>{-view.loss:.3f}</td></tr></tfoot>"
    head = "<thead><tr><th>Source</th><th>Mean nats</th></tr></thead>"
    return f'{bars}<div class="scroll"><table>{head}<tbody>{sums}</tbody>{foot}</table></div>'


def _parts(view: Why) -> str:
    if not view.parts:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{weight:.1%}</td><td>{share:.1%}</td></tr>"
        for name, weight, share in zip(
            view.parts, view.weights.mean(axis=0).tolist(), view.shares.mean(axis=0).tolist(), strict=True
        )
    )
    return (
        "<h2>Parts of the mixture</h2><p>The weight is set before the token is known; the share is what the part gave "
        'of the token\'s probability. Means over all tokens.</p><div class="scroll"><table><thead><tr><th>Part</th>'
        f"<th>Weight</th><th>Share</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _tokens(view: Why, terms: Floats, names: Sequence[str], first: int) -> str:
    """The text; the colours of the columns of `terms` begin with number `first`."""
    count = min(SHOWN, len(view.pieces))
    best = terms[:count].argmax(axis=1)
    gains = terms[np.arange(count), best]
    steps = np.clip(4 * gains / np.maximum(-view.baseline[:count], 1e-9), 0, 3).astype(int)
    classes = [
        "" if gain < LEAST_GAIN else f' class="c{first + column}-{step}"'
        for gain, column, step in zip(gains.tolist(), best.tolist(), steps.tolist(), strict=True)
    ]
    spans = (
        f'<span{look} title="{_title(view, number, terms, names)}">{_shown(view.pieces[number])}</span>'
        for number, look in enumerate(classes)
    )
    return f'<div class="tokens">{"".join(spans)}</div>'


def _title(view: Why, number: int, terms: Floats, names: Sequence[str]) -> str:
    chance = math.exp(view.log_probabilities[number])
    lines = [f"p = {chance:.4g} ({view.log_probabilities[number]:.2f} nats)"]
    lines += [f"{name} {term:+.2f}" for name, term in zip(names, terms[number].tolist(), strict=False)]
    lines += [
        f"{name}: weight {weight:.0%}, p = {math.exp(log):.3g}"
        for name, weight, log in zip(
            view.parts, view.weights[number].tolist(), view.part_log_probabilities[number].tolist(), strict=True
        )
    ]
    return "&#10;".join(escape(line, quote=True) for line in lines)


def _shown(piece: str) -> str:
    """A token as HTML: a space of `Tokenizer.pieces` is a space again, and a newline breaks the line."""
    if piece in ("\\n", "\n"):
        return "<i>↵</i>\n"
    return escape(_CONTROLS.sub("\N{MIDDLE DOT}", piece.replace("▁", " ")))


# -- the picture ------------------------------------------------------------------------------------------


def figure(view: Why) -> Figure:
    """Stacked bars of the mean terms, and of the layers and the mixed parts if the model has them."""
    from matplotlib.figure import Figure

    layers = _layer_names(view)
    rows: list[tuple[str, Sequence[str], npt.NDArray[np.float64]]] = [
        ("by source", view.sources, view.terms.mean(axis=0))
    ]
    if layers:
        rows.append(("by layer", layers, view.layer_gains.mean(axis=0)))
    drawn = Figure(figsize=(10, 1.6 + 1.9 * len(rows)), layout="constrained")
    drawn.suptitle(f"{view.run} on {view.text}: loss {view.loss:.3f} nats per token", fontsize=12)
    for axes, (label, names, means) in zip(drawn.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        _bar(axes, view, names, means)
        axes.set_title(label, fontsize=10, loc="left")
    return drawn


def _bar(axes: Any, view: Why, names: Sequence[str], means: Floats) -> None:
    """One bar from the uniform distribution's log-probability up, and one below it of what was taken away."""
    start = float(view.baseline.mean())
    up = down = 0.0
    for name, mean, color in zip(names, means.tolist(), colors_of(names), strict=True):
        left = start + up if mean > 0 else -view.loss + down
        axes.barh(
            0 if mean > 0 else 1, abs(mean), left=left, color=color, edgecolor="white", label=f"{name} {mean:+.2f}"
        )
        up, down = up + max(mean, 0), down + max(-mean, 0)
    axes.axvline(start, color="#5d6670", linewidth=1, linestyle=":")
    axes.axvline(-view.loss, color="black", linewidth=1)
    is_mixed = down > 0
    axes.set_yticks([0, 1] if is_mixed else [0], ["added", "taken away"] if is_mixed else ["added"], fontsize=9)
    axes.set_ylim(1.6 if is_mixed else 0.6, -0.6)
    axes.set_xlabel(
        f"nats per token, from the uniform distribution ({start:.2f}) to the model ({-view.loss:.2f})", fontsize=9
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, ncols=1 + (len(names) > 8))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
