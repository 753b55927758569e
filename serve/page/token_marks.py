"""Two components: tokens as coloured marks, and next-token probabilities as bars.

    marks = Marks(label="The text, token by token")
    marks.pick(handler)                 # gr.EventData with .index: a mark was picked by mouse or keyboard

Their values are HTML from the functions here, which escape all text.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lm.generation.request import Score
from serve.page.assets import read_asset
from serve.page.messages import escape

MAX_MARKS = 5000
"""Most tokens that are shown as marks: a browser is slow with more."""


@dataclass(frozen=True)
class Mark:
    """A token on the page."""

    text: str
    strength: float
    """Strength of the colour, from 0 to 1."""
    note: str = ""
    """Tooltip."""
    tone: str = "surprise"
    """Colour: surprise (orange), less (blue), plain (none)."""
    unknown: bool = False
    """Whether the symbol is outside the vocabulary."""


def marks_html(marks: Iterable[Mark], *, first: int = 0) -> str:
    """One `<span class="mark">` a token; `first` is the index of the first one."""
    return "".join(_mark(index, mark) for index, mark in enumerate(marks, start=first))


def _mark(index: int, mark: Mark) -> str:
    classes = f"mark {mark.tone}" + (" unknown" if mark.unknown else "")
    shown = re.sub(
        r"[\n\t]", lambda found: f'<i aria-hidden="true">{visible(found[0])}</i>{found[0]}', escape(mark.text)
    )
    note = f' title="{escape(mark.note)}"' if mark.note else ""
    return (
        f'<span class="{classes}" data-index="{index}" tabindex="{0 if index == 0 else -1}" role="button"'
        f' style="--strength:{min(max(mark.strength, 0.0), 1.0):.3f}"{note}>{shown or "·"}</span>'
    )


def surprise_strength(logprob: float) -> float:
    """Strength of a token's colour: 0 at 0 nats, 1 from 6 nats (1 in 400) upwards."""
    return min(-logprob, 6.0) / 6.0 if math.isfinite(logprob) else 1.0


def score_note(score: Score, text_of: Callable[[int], str]) -> str:
    """Tooltip of a token: its probability, and those of `score.top`."""
    note = f"“{visible(text_of(score.token))}”: {percent(math.exp(score.logprob))} ({-score.logprob:.2f} nats)"
    others = [
        f"“{visible(text_of(token))}” {percent(math.exp(logprob))}"
        for token, logprob in score.top
        if token != score.token
    ]
    if not others:
        return note
    is_first = score.top[0][0] == score.token
    return f"{note}{', the first choice' if is_first else ''}; alternatives: {', '.join(others)}"


def scale_html(low: str, high: str, tone: str = "surprise") -> str:
    """Legend of the colours: from `low` (no colour) to `high`; tone "both" goes from blue to orange."""
    return (
        f'<span class="scale {tone}">{escape(low)} <span class="ramp" aria-hidden="true"></span> {escape(high)}</span>'
    )


SCALE_CSS = read_asset("scale.css")
"""For the `css_template` of a component that shows a scale."""

SURPRISE_SCALE = scale_html("expected", "surprising (1 in 400)")
"""Legend of `surprise_strength`."""

_MARKS = """
<div class="marks" role="group" aria-label="Tokens; arrow keys move, Enter picks">${value}</div>
<p class="about" aria-live="polite"></p>
"""
_SETTINGS: dict[str, Any] = {"container": True, "padding": True, "show_label": False, "apply_default_css": False}
# No subclasses of gr.HTML: Gradio would write a .pyi file for each next to this module.
Marks: Callable[..., Any] = functools.partial(
    gr.HTML, html_template=_MARKS, css_template=read_asset("token_marks.css"),
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


def visible(text: str) -> str:
    """A token's text with visible white space."""
    return text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣") or "·"


def percent(share: float) -> str:
    """A probability in percent."""
    if share == 0:
        return "0"
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


Bars: Callable[..., Any] = functools.partial(
    gr.HTML, html_template="<div class='bars'>${value}</div>", css_template=read_asset("bars.css"),
    js_on_load=read_asset("bars.js"), **_SETTINGS,
)  # fmt: skip
"""Bars that a visitor picks."""
