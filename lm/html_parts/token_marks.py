"""Tokens as coloured marks, in HTML; all text is escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm.html_parts import escape

if TYPE_CHECKING:
    from lm.generation.request import Score


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


def visible(text: str) -> str:
    """A token's text with visible white space."""
    return text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣") or "·"


def percent(share: float) -> str:
    """A probability in percent."""
    if share == 0:
        return "0"
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


SURPRISE_SCALE = scale_html("expected", "surprising (1 in 400)")
"""Legend of `surprise_strength`."""
