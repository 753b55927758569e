"""A component: tokens as coloured marks.

    marks = Marks(label="The text, token by token")
    marks.pick(handler)                 # gr.EventData with .index: a mark was picked by mouse or keyboard

The value of `Marks` is HTML of `lm.html_parts.token_marks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from lm.html_parts import read_style
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
