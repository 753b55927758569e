"""Controls for the sampling options of a tab, and the model picker.

controls = SamplingControls(page, first=("temperature", "top_k"), folded=("top_p", "max_tokens"))
attach(button.click, handler, [picker, prompt, *controls.inputs], outputs)
options = controls.options(values)                     # in the handler
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from lm.config import validate
from lm.generation.filters import FILTERS, Slider
from lm.generation.options import FILTER_FIELDS, SamplingOptions
from serve.page.browser_storage import store_at
from serve.page.context import ModelPicker, Page

DEFAULTS = SamplingOptions()
MAX_SAMPLES = 4
"""Samples, or columns, side by side."""
MAX_TOKENS = 4000

PRESETS: dict[str, dict[str, Any]] = {
    "Careful": {"temperature": 0.5, "top_k": 20, "top_p": 0.9},
    "Balanced": {"temperature": 0.8},
    "Lively": {"temperature": 1.1, "min_p": 0.03},
    "Greedy": {"temperature": 0.0},
}
"""Values of filter options; a preset sets all others to their default."""

_FOUND = {name: slider for each in FILTERS for name, slider in each.controls.items() if slider is not None}
FILTER_SLIDERS = {name: _FOUND[name] for name in FILTER_FIELDS if name in _FOUND}
"""The slider of each filter option that has one, in the order of the options."""
_SLIDERS: dict[str, Slider] = {
    **FILTER_SLIDERS,
    "max_tokens": Slider(1, MAX_TOKENS, 1, "Length", info="Maximum number of tokens."),
    "n": Slider(1, MAX_SAMPLES, 1, "Samples side by side", info="Several continuations of the same text."),
}


class SamplingControls:
    """The sampling options of one tab."""

    def __init__(
        self,
        page: Page,
        *,
        first: Sequence[str],
        folded: Sequence[str],
        presets: bool = True,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the components.

        Args:
            page: for the limits of the server.
            first: options that are always visible.
            folded: options under "More".
            presets: adds the preset buttons, and a slider under "More" for every other filter.
            own: options of the first model's source, where the sliders start.
        """
        self._own = own or {}
        self._limits = {"max_tokens": page.options.max_completion_tokens, "n": page.options.max_n}
        self._components: dict[str, Any] = {}
        buttons: dict[str, gr.Button] = {}
        if presets:
            with gr.Row(elem_classes="knobs"):
                buttons = {name: gr.Button(name, size="sm", min_width=60) for name in PRESETS}
        for name in first:
            self._components[name] = self._component(name)
        with gr.Accordion("More", open=False):
            for name in (*folded, *(FILTER_SLIDERS if presets else ())):
                if name not in self._components:
                    self._components[name] = self._component(name)
        for preset, button in buttons.items():
            values = self.filter_values(PRESETS[preset])
            outputs = list(self.filters.values())
            button.click(None, outputs=outputs, js=f"() => {json.dumps(values)}", api_visibility="private")

    @property
    def components(self) -> dict[str, Any]:
        """The component of each option."""
        return self._components

    @property
    def inputs(self) -> list[Any]:
        """The components, for the inputs of a handler."""
        return list(self._components.values())

    @property
    def filters(self) -> dict[str, Any]:
        """The component of each option of a filter."""
        return {name: component for name, component in self._components.items() if name in FILTER_SLIDERS}

    def filter_values(self, given: Mapping[str, Any]) -> list[Any]:
        """The values of the filters' sliders: these options, and the default of every other one."""
        return [_slider_value(name, given.get(name, getattr(DEFAULTS, name))) for name in self.filters]

    def options(self, values: Sequence[Any], **more: Any) -> SamplingOptions:
        """The options from the components' values.

        Raises:
            ConfigError: a value is invalid.
        """
        given: dict[str, Any] = {}
        for name, value in zip(self._components, values, strict=True):
            if name == "stop":
                given[name] = tuple(part for part in str(value or "").split("\n") if part)
            elif name == "seed":
                given[name] = 1 if value is None else int(value)
            elif (number := option_of(name, value)) is not None:
                given[name] = number
        return validate(SamplingOptions, {**given, **more}, where="sampling")

    def _component(self, name: str) -> Any:
        if name == "stop":
            info = "The model stops before this text. For several texts, use one line for each."
            return gr.Textbox(label="Stop before", info=info, lines=1)
        if name == "seed":
            return _seed()
        return slider_of(name, self._own.get(name, getattr(DEFAULTS, name)), self._limits.get(name))


def slider_of(name: str, value: Any, limit: float | None = None) -> gr.Slider:
    """The slider of a sampling option.

    Args:
        name: of the option.
        value: where it stands first.
        limit: its largest value on this server.
    """
    slider = _SLIDERS[name]
    maximum = slider.maximum if limit is None else min(slider.maximum, limit)
    return gr.Slider(
        slider.minimum, maximum, value=min(_slider_value(name, value), maximum), step=slider.step, label=slider.label,
        info=slider.info or SamplingOptions.model_fields[name].description,
    )  # fmt: skip


def option_of(name: str, value: float | None) -> float | None:
    """The option of a slider's value; None where the slider switches it off."""
    if value is None:
        return None
    slider = _SLIDERS[name]
    number = int(value) if slider.step == 1 else float(value)
    return None if number == slider.off else number


def _slider_value(name: str, value: Any) -> Any:
    return _SLIDERS[name].off if value is None else value


def _seed() -> gr.Number:
    with gr.Row(equal_height=True, elem_classes="knobs"):
        seed = gr.Number(
            1, precision=0, minimum=0, maximum=2**53, label="Seed", scale=3, min_width=90,
            info="The same seed gives the same text.",
        )  # fmt: skip
        dice = gr.Button("⚄ Roll", size="md", scale=1, min_width=80)
    dice.click(None, outputs=seed, js="() => Math.floor(Math.random() * 2147483648)", api_visibility="private")
    return seed


def model_picker(page: Page, name: str, label: str = "Model", *, rank: int = 0, **settings: Any) -> gr.Dropdown:
    """A dropdown of the offered models. The browser stores the last choice.

    Args:
        page: updates the choices.
        name: unique on the page.
        label: of the component.
        rank: before a visitor picks a model, the dropdown shows the one of this rank; 0 is the best.
        settings: of the component.
    """
    found = page.model_choices()
    picker = gr.Dropdown(found.choices, value=found.default(rank), label=label, **settings)
    store_at(picker.input, name, picker)
    page.model_pickers[name] = ModelPicker(picker, rank)
    return picker
