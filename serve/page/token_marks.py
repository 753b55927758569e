"""Two components: tokens as coloured marks, and next-token probabilities as bars.

    marks = Marks(label="The text, token by token")
    marks.pick(handler)                 # gr.EventData with .index: a mark was picked by mouse or keyboard

The value of `Marks` is HTML of `lm.html_parts.token_marks`, that of `Bars` of `bars_html`. Both escape all text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lm.html_parts import escape, read_style
from lm.html_parts.token_marks import percent, visible
from serve.page.assets import read_asset

MAX_MARKS = 5000
"""Most tokens that are shown as marks: a browser is slow with more."""
SCALE_CSS = read_style("scale")
"""For the `css_template` of a component that shows a scale."""

_MARKS = """
<div class="marks" role="group" aria-label="Tokens; arrow keys move, Enter picks">${value}</div>
<p class="about" aria-live="polite"></p>
"""
_SETTINGS: dict[str, Any] = {"container": True, "padding": True, "show_label": False, "apply_default_css": False}
# No subclasses of gr.HTML: Gradio would write a .pyi file for each next to this module.
Marks: Callable[..., Any] = functools.partial(
    gr.HTML, html_template=_MARKS, css_template=read_style("token_marks"),
    js_on_load=read_asset("token_marks.js"), **_SETTINGS,
)  # fmt: skip
"""Marks that a visitor picks by mouse or keyboard (Tab, arrow keys, Enter)."""


# -- bars ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A possible next token."""

    token: int
    text: str
    before: float
    """Probability in the model."""
    after: float
    """Probability after the filters: the sampler draws with it."""


@dataclass(frozen=True)
class Rest:
    """The tokens without a bar."""

    count: int
    before: float
    """Sum of their probabilities in the model."""
    after: float


def bars_html(bars: Sequence[Bar], rest: Rest, *, actual: int | None, hint: str) -> str:
    """One button a token, with a pale bar for the model and a full bar for the probability after the filters.

    Args:
        bars: the most likely first.
        rest: the other tokens, in one line without a button.
        actual: the token in the text.
        hint: what a click does.
    """
    scale = max(max(bar.before, bar.after) for bar in bars) or 1.0
    rows = "".join(_bar(bar, scale, bar.token == actual, hint) for bar in bars)
    if rest.count:
        rows += (
            f'<div class="rest"><span>{rest.count:,} other{"s" if rest.count > 1 else ""}</span>'
            f"{_shares(rest.before, rest.after)}</div>"
        )
    legend = (
        '<div class="legend"><span class="key before"></span>the model<span class="key after"></span>'
        f'<b>with your settings</b><span class="how">{escape(hint)}</span></div>'
    )
    return f"{legend}<div class='rows'>{rows}</div>"


def _bar(bar: Bar, scale: float, is_actual: bool, hint: str) -> str:
    return (
        f'<button type="button" class="bar{" chosen" if is_actual else ""}{" out" if bar.after == 0 else ""}"'
        f' data-token="{bar.token}" title="{escape(hint)}">'
        f'<span class="token">{escape(visible(bar.text))}</span>'
        f'<span class="lanes"><span class="lane before" style="width:{100 * bar.before / scale:.2f}%"></span>'
        f'<span class="lane after" style="width:{100 * bar.after / scale:.2f}%"></span></span>'
        f"{_shares(bar.before, bar.after)}</button>"
    )


def _shares(before: float, after: float) -> str:
    shown = escape(percent(after)) if after else "–"
    return f'<span class="share">{escape(percent(before))}</span><b class="share">{shown}</b>'


Bars: Callable[..., Any] = functools.partial(
    gr.HTML, html_template="<div class='bars'>${value}</div>", css_template=read_asset("bars.css"),
    js_on_load=read_asset("bars.js"), **_SETTINGS,
)  # fmt: skip
"""Bars that a visitor picks."""
