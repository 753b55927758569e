"""Theme and style sheet of the page.

Every text has a contrast of at least 4.5 to its background, in the light and in the dark theme. One button a tab has
the accent colour. Only what can be changed has a frame.
"""

from __future__ import annotations

import gradio as gr

from serve.page.assets import read_asset

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
_BACK, _BACK_DARK = "#fbfbf9", "#0d1220"
# System fonts: the browser downloads nothing.
THEME = gr.themes.Default(
    primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=_SANS, font_mono=_MONO
).set(
    body_background_fill=_BACK, body_background_fill_dark=_BACK_DARK,
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
    block_background_fill="transparent", block_background_fill_dark="transparent",
    block_border_width="0px", block_border_width_dark="0px", block_shadow="none", block_shadow_dark="none",
    block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
    block_label_border_width="0px", block_label_border_width_dark="0px",
    block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_200",
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
    block_label_text_weight="600", block_title_text_weight="600",
    panel_background_fill="transparent", panel_background_fill_dark="transparent",
    input_background_fill="white", input_background_fill_dark="*neutral_900",
    input_border_color="*neutral_300", input_border_color_dark="*neutral_700",
    input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_700",
    button_primary_text_color="white", button_primary_text_color_dark="white",
    checkbox_border_color="*neutral_400", checkbox_border_color_dark="*neutral_400",
    button_border_width="1px", button_border_width_dark="1px",
    button_primary_border_color="transparent", button_primary_border_color_dark="transparent",
    button_primary_border_color_hover="transparent", button_primary_border_color_hover_dark="transparent",
    button_secondary_background_fill_hover="*neutral_100", button_secondary_background_fill_hover_dark="*neutral_800",
    button_secondary_background_fill="transparent", button_secondary_background_fill_dark="transparent",
    button_secondary_border_color="*neutral_300", button_secondary_border_color_dark="*neutral_600",
    button_secondary_text_color="*neutral_700", button_secondary_text_color_dark="*neutral_200",
)  # fmt: skip

CSS = read_asset("theme.css") + read_asset("write.css")
