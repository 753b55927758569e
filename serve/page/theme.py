"""Theme and style sheet of the page."""

from __future__ import annotations

import gradio as gr

from serve.page.assets import read_asset

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
# System fonts: the browser downloads nothing.
THEME = gr.themes.Default(
    primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=_SANS, font_mono=_MONO
).set(block_label_text_weight="600", block_title_text_weight="600")

CSS = read_asset("theme.css") + read_asset("write.css")
