"""The knobs of a tab: made from the fields of `SamplingOptions`, which say what each is for.

knobs = Knobs(page, first=("temperature", "top_k"), folded=("top_p", "max_tokens"))
button.click(handler, inputs=[picker, prompt, *knobs.inputs])
options = knobs.options(values)                     # in the handler
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lm.config import validate
from lm.generation.options import SamplingOptions
from serve.page.browser_storage import store_at
from serve.page.context import ModelPicker, Page

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
"""Values that go well together; the knobs of `_SHAPING` that one does not name go back to their default."""


@dataclass(frozen=True)
class _Slider:
    """How a number is set on the page."""

    least: float
    most: float
    step: float
    label: str
    off: float | None = None
    """Where the slider stands for "not at all"."""
    info: str | None = None
    """Where the field's own description would be too long or too technical."""


_SLIDERS: dict[str, _Slider] = {
    "temperature": _Slider(0, 2, 0.05, "Temperature", info="Low: safe and repetitive. High: daring, then nonsense."),
    "top_k": _Slider(0, 100, 1, "Top-k", off=0, info="Draw from the k likeliest tokens only; 0: from all."),
    "top_p": _Slider(0.01, 1, 0.01, "Top-p", off=1),
    "min_p": _Slider(0, 0.5, 0.01, "Min-p", off=0),
    "typical_p": _Slider(0.05, 1, 0.05, "Typical-p", off=1),
    "repetition_penalty": _Slider(1, 2, 0.05, "Repetition penalty", off=1),
    "presence_penalty": _Slider(-2, 2, 0.1, "Presence penalty"),
    "frequency_penalty": _Slider(-2, 2, 0.1, "Frequency penalty"),
    "max_tokens": _Slider(1, MOST_TOKENS, 1, "Length", info="Tokens to write at most."),
    "n": _Slider(1, MOST_SAMPLES, 1, "Samples side by side", info="Several ways to go on, each with its own luck."),
}
_SHAPING = tuple(name for name in _SLIDERS if name not in ("max_tokens", "n"))


class Knobs:
    """The sampling options of one tab."""

    def __init__(self, page: Page, *, first: Sequence[str], folded: Sequence[str], presets: bool = True) -> None:
        """Draw them: `first` in plain view, the others under "More"."""
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
        for name, button in row:
            values = self._preset(PRESETS[name])
            shaping = [component for own, component in zip(self._names, self.inputs, strict=True) if own in _SHAPING]
            button.click(None, outputs=shaping, js=f"() => {json.dumps(values)}", api_visibility="private")

    def _preset_row(self) -> list[tuple[str, gr.Button]]:
        with gr.Row(elem_classes="knobs"):
            return [(name, gr.Button(name, size="sm", min_width=60)) for name in PRESETS]

    def _preset(self, values: Mapping[str, Any]) -> list[Any]:
        return [
            self._shown(name, values.get(name, getattr(DEFAULTS, name))) for name in self._names if name in _SHAPING
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
        most = min(slider.most, self._most(name))
        return gr.Slider(
            slider.least, most, value=min(self._shown(name, getattr(DEFAULTS, name)), most), step=slider.step,
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
