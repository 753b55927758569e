"""Tokens as coloured marks, and the tokens that might come next as bars: two widgets that several tabs share.

    marks = Marks(label="The text, token by token")
    marks.pick(handler)                 # gr.EventData with .index: a mark was clicked, or chosen by keyboard

Their values are HTML made here, in which everything that came from a text is escaped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lm.generation.request import Score
from serve.page.site import safe

MOST_MARKS = 5000
"""Tokens that are shown as marks: a browser draws no more in good time."""


@dataclass(frozen=True)
class Mark:
    """A token as it is shown."""

    text: str
    strength: float
    """Of the colour, from 0 to 1."""
    note: str = ""
    """What hovering tells."""
    tone: str = "surprise"
    """Which colour: surprise (warm), less (cool), plain."""
    unknown: bool = False
    """Whether the model never saw the symbol."""


def marks_html(marks: Iterable[Mark], *, chosen: int | None = None, first: int = 0) -> str:
    """One `<span class="mark">` a token; `first` is the index of the first of them."""
    return "".join(_mark(index, mark, index == chosen) for index, mark in enumerate(marks, start=first))


def _mark(index: int, mark: Mark, chosen: bool) -> str:
    classes = f"mark {mark.tone}" + (" unknown" if mark.unknown else "") + (" chosen" if chosen else "")
    shown = (
        safe(mark.text).replace("\n", '<i aria-hidden="true">↵</i>\n').replace("\t", '<i aria-hidden="true">→</i>\t')
    )
    note = f' title="{safe(mark.note)}"' if mark.note else ""
    return (
        f'<span class="{classes}" data-index="{index}" tabindex="{0 if chosen or index == 0 else -1}" role="button"'
        f' style="--strength:{min(max(mark.strength, 0.0), 1.0):.3f}"{note}>{shown or "·"}</span>'
    )


def surprise_strength(logprob: float) -> float:
    """The colour of a token by how it surprised: none where it was certain, full from 6 nats on (1 in 400)."""
    return min(-logprob, 6.0) / 6.0 if math.isfinite(logprob) else 1.0


def score_note(score: Score, text_of: Callable[[int], str]) -> str:
    """How likely a token was, and what the model would rather have seen."""
    told = f"{quoted(text_of(score.token))}: {percent(math.exp(score.logprob))} ({-score.logprob:.2f} nats)"
    others = [
        f"{quoted(text_of(token))} {percent(math.exp(logprob))}" for token, logprob in score.top if token != score.token
    ]
    first = bool(score.top) and score.top[0][0] == score.token
    joint = ", its first choice; then " if first else "; rather "
    return told + (joint + ", ".join(others) if others else "")


SCALE_CSS = """
color: var(--body-text-color-subdued); font-size: .9rem;
.scale { display: inline-flex; flex-wrap: wrap; align-items: center; gap: .35rem;
  color: var(--body-text-color-subdued); }
.scale .ramp { width: 4rem; height: .7rem; border-radius: 3px; border: 1px solid var(--border-color-primary);
  background: linear-gradient(to right, transparent, color-mix(in srgb, var(--tone) 72%, transparent)); }
.scale.surprise { --tone: #f97316; }
.scale.less { --tone: #0ea5e9; }
.scale.both .ramp { width: 7rem; background: linear-gradient(to right, #0ea5e9b8, transparent, #f97316b8); }
"""
"""For the `css_template` of what shows a scale."""


def scale_html(low: str, high: str, tone: str = "surprise") -> str:
    """What the colours of marks mean: from `low`, which has none, to `high`; or from less to surprise, tone "both"."""
    return f'<span class="scale {tone}">{safe(low)} <span class="ramp" aria-hidden="true"></span> {safe(high)}</span>'


_MARKS = """
<div class="marks" role="group" aria-label="Tokens; arrow keys move, Enter picks">${value}</div>
<p class="about" aria-live="polite"></p>
"""
_MARKS_CSS = """
.marks { white-space: pre-wrap; overflow-wrap: anywhere; font-family: Georgia, "Times New Roman", serif;
  font-size: 1.06rem; line-height: 1.75; color: var(--body-text-color); max-height: 34rem; overflow-y: auto; }
.mark { border-radius: 3px; padding: .1em 0; cursor: pointer; color: inherit;
  background: color-mix(in srgb, var(--tone) calc(var(--strength) * 72%), transparent); }
.surprise { --tone: #f97316; }
.less { --tone: #0ea5e9; }
.plain { --tone: transparent; }
.mark i { font-style: normal; opacity: .35; font-size: .8em; }
.mark.unknown { border-bottom: 2px dotted var(--error-text-color, #dc2626); }
.mark:hover, .mark:focus-visible, .mark.chosen { outline: 2px solid var(--primary-500); outline-offset: 0; }
.about { min-height: 1.4em; margin: .5rem 0 0; font-size: .88rem; color: var(--body-text-color-subdued);
  overflow-wrap: anywhere; }
.given { font-weight: 600; }
.empty { color: var(--body-text-color-subdued); font-family: var(--font); font-size: 1rem; white-space: normal; }
"""
_MARKS_JS = """
const marks = () => [...element.querySelectorAll('.mark')];
const about = (mark) => { element.querySelector('.about').textContent = mark.title; };
const pick = (mark) => {
  element.querySelectorAll('.mark.chosen').forEach((other) => other.classList.remove('chosen'));
  element.querySelectorAll('.mark[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
  mark.classList.add('chosen');
  mark.tabIndex = 0;
  about(mark);
  trigger('pick', { index: Number(mark.dataset.index) });
};
element.addEventListener('click', (event) => {
  const mark = event.target.closest('.mark');
  if (mark) pick(mark);
});
element.addEventListener('focusin', (event) => {
  const mark = event.target.closest('.mark');
  if (mark) about(mark);
});
element.addEventListener('keydown', (event) => {
  const mark = event.target.closest('.mark');
  if (!mark) return;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); pick(mark); return; }
  const all = marks();
  const next = event.key === 'Home' ? all[0] : event.key === 'End' ? all.at(-1) : step && all[all.indexOf(mark) + step];
  if (!next) return;
  event.preventDefault();
  mark.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
"""


_OURS: dict[str, Any] = {"container": True, "padding": True, "show_label": False, "apply_default_css": False}
# Not classes of their own: for those Gradio writes files beside this one.
Marks: Callable[..., Any] = functools.partial(
    gr.HTML, html_template=_MARKS, css_template=_MARKS_CSS, js_on_load=_MARKS_JS, **_OURS
)
"""Marks that can be picked with mouse and keyboard: Tab to enter, arrows to move, Enter to pick."""


# -- what might come next -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A token that might come next."""

    token: int
    text: str
    before: float
    """Its probability under the model."""
    after: float
    """Its probability once the filters have been at it: what it is drawn with."""


@dataclass(frozen=True)
class Rest:
    """The tokens that have no bar."""

    count: int
    before: float
    """Their probability together, under the model."""
    after: float


def bars_html(bars: Sequence[Bar], *, chosen: int | None = None, picks: str = "", rest: Rest | None = None) -> str:
    """One button a token, with a pale bar for the model and a full one for what is drawn from.

    Args:
        bars: the likeliest first.
        chosen: the token that stands in the text.
        picks: what picking one does.
        rest: the others, in one line without a button.
    """
    if not bars:
        return ""
    scale = max(max(bar.before, bar.after) for bar in bars) or 1.0
    rows = "".join(_bar(bar, scale, bar.token == chosen, picks) for bar in bars)
    if rest is not None and rest.count:
        rows += (
            f'<div class="rest"><span>{rest.count:,} other{"s" if rest.count > 1 else ""}</span>'
            f"{_shares(rest.before, rest.after)}</div>"
        )
    legend = (
        '<div class="legend"><span class="key before"></span>the model<span class="key after"></span>'
        f'<b>after your settings</b><span class="how">{safe(picks)}</span></div>'
    )
    return f"{legend}<div class='rows'>{rows}</div>"


def _bar(bar: Bar, scale: float, chosen: bool, picks: str) -> str:
    label = safe(visible(bar.text))
    return (
        f'<button type="button" class="bar{" chosen" if chosen else ""}{" out" if bar.after == 0 else ""}"'
        f' data-token="{bar.token}" title="{safe(picks)}">'
        f'<span class="token">{label}</span>'
        f'<span class="lanes"><span class="lane before" style="width:{100 * bar.before / scale:.2f}%"></span>'
        f'<span class="lane after" style="width:{100 * bar.after / scale:.2f}%"></span></span>'
        f"{_shares(bar.before, bar.after)}</button>"
    )


def _shares(before: float, after: float) -> str:
    told = safe(percent(after)) if after else "–"
    return f'<span class="share">{safe(percent(before))}</span><b class="share">{told}</b>'


def quoted(text: str) -> str:
    """A token's text in a sentence."""
    return f"“{visible(text)}”"


def visible(text: str) -> str:
    """A token's text with its white space made visible."""
    return text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣") or "·"


def percent(share: float) -> str:
    """A probability as people read it."""
    if share == 0:
        return "0"
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


_BARS_CSS = """
.bars { font-size: .92rem; color: var(--body-text-color); }
.said { margin: 0 0 .35rem; min-height: 4.5em; line-height: 1.5; overflow-wrap: anywhere; }
.how { margin-left: auto; }
.rows { display: flex; flex-direction: column; gap: 1px; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem; margin-bottom: .4rem;
  color: var(--body-text-color-subdued); font-size: .82rem; }
.legend b { color: var(--body-text-color); }
.key { display: inline-block; width: 1.1rem; height: .55rem; border-radius: 2px; }
.key.after { margin-left: .5rem; }
.key.before, .lane.before { background: color-mix(in srgb, var(--primary-500) 35%, transparent); }
.key.after, .lane.after { background: var(--primary-500); }
.bar, .rest { display: grid; grid-template-columns: 5rem 1fr 3.2rem 3.2rem; gap: .5rem;
  align-items: center; width: 100%; padding: 1px 4px; border: 0; border-radius: 4px; background: none; color: inherit;
  text-align: left; font: inherit; line-height: 1.25; }
.rest span:first-child { grid-column: span 2; color: var(--body-text-color-subdued); }
.bar { cursor: pointer; }
.bar:hover { background: var(--background-fill-secondary); }
.bar:focus-visible { outline: 2px solid var(--primary-500); outline-offset: -1px; }
.bar.chosen { background: color-mix(in srgb, var(--primary-500) 14%, transparent); }
.bar.chosen .token { font-weight: 700; }
.bar.out .token, .bar.out .lanes { opacity: .5; }
.token { font-family: var(--font-mono); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.lanes { display: flex; flex-direction: column; gap: 2px; }
.lane { display: block; height: 7px; border-radius: 2px; min-width: 1px; transition: width .15s; }
.bar.out .lane.after { min-width: 0; }
.share { font-variant-numeric: tabular-nums; text-align: right; color: var(--body-text-color-subdued);
  font-weight: 400; }
b.share { color: var(--body-text-color); font-weight: 600; }
@media (max-width: 600px) { .bar, .rest { grid-template-columns: 3.2rem 1fr 3rem 3rem; } }
@media (prefers-reduced-motion: reduce) { .lane { transition: none; } }
"""
_BARS_JS = """
element.addEventListener('click', (event) => {
  const bar = event.target.closest('.bar');
  if (bar) trigger('pick', { token: Number(bar.dataset.token) });
});
"""

Bars: Callable[..., Any] = functools.partial(
    gr.HTML, html_template="<div class='bars'>${value}</div>", css_template=_BARS_CSS, js_on_load=_BARS_JS, **_OURS
)
"""Bars of which one can be picked."""
