"""Pieces of HTML pages that files and the served page share: the style, a line chart, tokens as marks, a film."""

from __future__ import annotations

import html
from pathlib import Path


def escape(text: str) -> str:
    """Text as HTML that shows it literally; Gradio's template signs are escaped too."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def read_style(name: str) -> str:
    """The CSS of a piece, such as line_chart."""
    return (Path(__file__).parent / f"{name}.css").read_text("utf-8")
