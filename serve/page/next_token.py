"""The chart of the next token: what the server sends, and the component that draws it in the browser.

The server sends the logits at one place of a text and what the filters need. The browser filters them: the chart
follows the sliders without a request. `assets/filters.js` gives the probabilities of `lm.generation.sampler`.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt

from lm.generation.filters import FILTERS
from lm.generation.options import SamplingOptions
from serve.engines.model_pool import Model
from serve.page.assets import read_asset

MAX_BARS = 7
MAX_TEXTS = 512
"""Tokens whose text the browser gets: the most likely ones."""
_CONTEXT_CHARACTERS = 24
"""Characters before the place, in the sentence above the chart."""

_NO_CHART = (
    "<p class='said'>Type a text: this chart shows the most likely next tokens, and how the settings change their "
    "probabilities.</p>"
)


@dataclass(frozen=True, eq=False)
class Place:
    """A place between two tokens of a text, with the logits of the token after it."""

    model: Model
    ids: Sequence[int]
    """The tokens before it, start token included."""
    generated: int
    """How many of these tokens, at the end, belong to the request that draws the next one."""
    logits: npt.NDArray[np.float32]
    """(1, V)"""
    text: str
    """The text before it."""
    actual: int | None = None
    """The token after it; None at the end of the text."""
    number: float | None = None
    """The random number in [0, 1) that chose it, if that is to be shown."""

    def to_json(self) -> dict[str, Any]:
        """The value of the chart."""
        tokenizer, row = self.model.tokenizer, self.logits[0].astype(np.float32)
        banned = [] if tokenizer.unknown_id is None else [tokenizer.unknown_id]
        generated = self.ids[len(self.ids) - self.generated :]
        order = np.argsort(-row, kind="stable")[:MAX_TEXTS].tolist()
        named = {*order, *self.ids, *([] if self.actual is None else [self.actual])}
        return {
            "logits": base64.b64encode(row.astype("<f4").tobytes()).decode(),
            "banned": banned,
            "fallback": next(token for token in range(len(row)) if token not in banned),
            "text_counts": _counts(self.ids), "generated_counts": _counts(generated),
            "texts": {str(token): self.model.tokens.text(token) for token in named},
            "before": end_of(self.text), "offset": utf16_length(self.text),
            "actual": self.actual, "number": self.number,
            "unknown": tokenizer.unknown_id is not None and tokenizer.unknown_id in self.ids[1:],
        }  # fmt: skip


def _counts(ids: Iterable[int]) -> list[tuple[int, int]]:
    tokens, counts = np.unique(np.array(list(ids), dtype=np.int64), return_counts=True)
    return list(zip(tokens.tolist(), counts.tolist(), strict=True))


def utf16_length(text: str) -> int:
    """The length of a text in a browser, which counts UTF-16 units."""
    return len(text) + sum(character > "\uffff" for character in text)


def end_of(text: str) -> str:
    """The end of a text, with visible line ends, tabs and final spaces."""
    end = text if len(text) <= _CONTEXT_CHARACTERS else "…" + text[-_CONTEXT_CHARACTERS:]
    words = end.rstrip(" ")
    return words.replace("\n", "↵").replace("\t", "→") + "␣" * (len(end) - len(words))


def settings_js(names: Sequence[str]) -> str:
    """The `js` that gives the values of the filters' sliders to the chart."""
    sliders = {name: slider for each in FILTERS for name, slider in each.controls.items()}
    off = [slider.off if (slider := sliders[name]) else None for name in names]
    settings = f"{json.dumps(list(names))}, values, {json.dumps(off)}"
    # The sliders may be restored before the chart is ready: it reads them then.
    return f"(...values) => {{ window.inklingSettings = [{settings}]; window.inklingChart?.settings({settings}); }}"


def _script() -> str:
    defaults = {name: getattr(SamplingOptions(), name) for each in FILTERS for name, slider in each.controls.items()
                if slider is not None}  # fmt: skip
    script = read_asset("next_token.js").replace("LIMIT", str(MAX_BARS)).replace("DEFAULTS", json.dumps(defaults))
    return read_asset("filters.js") + script.replace("EMPTY", json.dumps(_NO_CHART))


Chart: Callable[..., Any] = functools.partial(
    gr.HTML, html_template="<div class='bars'></div>", css_template=read_asset("next_token.css"), js_on_load=_script(),
    container=True, padding=False, show_label=False, apply_default_css=False,
)  # fmt: skip
"""The chart; its value is `Place.to_json()`, or {"error": a sentence}. A bar that a visitor picks triggers `pick`."""
