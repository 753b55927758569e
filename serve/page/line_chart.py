"""The page's component for `lm.html_parts.line_chart`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from lm.html_parts import read_style

# No subclass of gr.HTML: Gradio would write a .pyi file for it.
LineChart: Callable[..., Any] = functools.partial(
    gr.HTML, "", css_template=read_style("line_chart"), apply_default_css=False
)
"""The component for `line_chart_html`."""
