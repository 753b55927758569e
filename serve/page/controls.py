"""The knobs of a tab: made from the fields of `SamplingOptions`, which say what each is for.

knobs = Knobs(page, first=("temperature", "top_k"), folded=("top_p", "max_tokens"))
button.click(handler, inputs=[picker, prompt, *knobs.inputs])
options = knobs.options(values)                     # in the handler
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from lm.config import validate
from lm.generation.filters import FILTERS, Slider
from lm.generation.options import FILTER_FIELDS, SamplingOptions
from serve.page.keeping import keep_choice
from serve.page.site import Page, Picker

DEFAULTS = SamplingOptions()
MOST_SAMPLES = 4
"""Side by side."""
MOST_TOKENS = 4000

PRESETS: dict[str, dict[str, Any]] = {
    "Careful": {"temperature": 0.5, "top_k": 20, "top_p": 0.9},
    "Balanced": {"temperature": 0.8},
    "Lively": {"temperature": 1.1, "min_p": 0.03},
    "Greedy": {"temperature": 0.0},
}
"""Values that go well together; the knobs of `FILTER_SLIDERS` that one does not name go back to their default."""


_FOUND = {name: slider for each in FILTERS for name, slider in each.controls.items() if slider is not None}
FILTER_SLIDERS = {name: _FOUND[name] for name in FILTER_FIELDS if name in _FOUND}
"""Every option of a filter that has a slider, in the order of the options."""
_SLIDERS: dict[str, Slider] = {
    **FILTER_SLIDERS,
    "max_tokens": Slider(1, MOST_TOKENS, 1, "Length", info="Tokens to write at most."),
    "n": Slider(1, MOST_SAMPLES, 1, "Samples side by side", info="Several ways to go on, each with its own luck."),
}


class Knobs:
    """The sampling options of one tab."""

    def __init__(self, page: Page, *, first: Sequence[str], folded: Sequence[str], presets: bool = True) -> None:
        """Draw them: `first` in plain view, the others under "More"; with presets, every filter has its slider."""
        self._names: list[str] = []
        self.inputs: list[Any] = []
        """The components, for the inputs of a handler."""
        self._page = page
        row = self._preset_row() if presets else []
        for name in first:
            self._add(name)
        with gr.Accordion("More", open=False):
            for name in folded:
                self._add(name)
            for name in FILTER_SLIDERS if presets else ():
                if name not in self._names:
                    self._add(name)
        for name, button in row:
            values = self._preset(PRESETS[name])
            shaping = [
                component for own, component in zip(self._names, self.inputs, strict=True) if own in FILTER_SLIDERS
            ]
            button.click(None, outputs=shaping, js=f"() => {json.dumps(values)}", api_visibility="private")

    def _preset_row(self) -> list[tuple[str, gr.Button]]:
        with gr.Row(elem_classes="knobs"):
            return [(name, gr.Button(name, size="sm", min_width=60)) for name in PRESETS]

    def _preset(self, values: Mapping[str, Any]) -> list[Any]:
        return [
            self._shown(name, values.get(name, getattr(DEFAULTS, name)))
            for name in self._names
            if name in FILTER_SLIDERS
        ]

    def _shown(self, name: str, value: Any) -> Any:
        return _SLIDERS[name].off if value is None else value

    def _add(self, name: str) -> None:
        self._names.append(name)
        self.inputs.append(self._widget(name))

    def _widget(self, name: str) -> Any:
        info = SamplingOptions.model_fields[name].description
        if name == "stop":
            return gr.Textbox(label="Stop before", info="A text that ends the writing; several: one a line.", lines=1)
        if name == "seed":
            return _seed()
        slider = _SLIDERS[name]
        most = min(slider.maximum, self._most(name))
        return gr.Slider(
            slider.minimum, most, value=min(self._shown(name, getattr(DEFAULTS, name)), most), step=slider.step,
            label=slider.label, info=slider.info or info,
        )  # fmt: skip

    def _most(self, name: str) -> float:
        limits = {"max_tokens": self._page.options.max_completion_tokens, "n": self._page.options.max_n}
        return limits.get(name, float("inf"))

    @property
    def names(self) -> tuple[str, ...]:
        """The options, in the order of the components."""
        return tuple(self._names)

    def component(self, name: str) -> Any:
        """The component of an option."""
        return self.inputs[self._names.index(name)]

    def options(self, values: Sequence[Any], **more: Any) -> SamplingOptions:
        """The options that the components' values stand for.

        Raises:
            ConfigError: one of them does not do.
        """
        given: dict[str, Any] = {}
        for name, value in zip(self._names, values, strict=True):
            if name == "stop":
                given[name] = tuple(part for part in str(value or "").split("\n") if part)
            elif name == "seed":
                given[name] = 1 if value is None else int(value)
            elif value is not None:
                slider = _SLIDERS[name]
                number = int(value) if slider.step == 1 else float(value)
                given[name] = None if number == slider.off else number
        given = {name: value for name, value in given.items() if value is not None}
        return validate(SamplingOptions, {**given, **more}, where="sampling")


def _seed() -> gr.Number:
    with gr.Row(equal_height=True, elem_classes="knobs"):
        seed = gr.Number(
            1, precision=0, minimum=0, maximum=2**53, label="Seed", scale=3, min_width=90,
            info="The same seed writes the same text.",
        )  # fmt: skip
        dice = gr.Button("⚄ Roll", size="md", scale=1, min_width=80)
    dice.click(None, outputs=seed, js="() => Math.floor(Math.random() * 2147483648)", api_visibility="private")
    return seed


def model_picker(page: Page, name: str, label: str = "Model", *, place: int = 0, **settings: Any) -> gr.Dropdown:
    """A picker of the models on offer. What was picked last is kept in the browser.

    Args:
        page: which keeps it up to date.
        name: of its own on the page.
        label: what stands above it.
        place: where nothing was picked yet, it shows the model of this place among the best, from 0.
        settings: of the component.
    """
    shelf = page.shelf()
    picker = gr.Dropdown(shelf.choices, value=shelf.usual(place), label=label, **settings)
    keep_choice(name, picker.input, picker)
    page.model_pickers[name] = Picker(picker, place)
    return picker
