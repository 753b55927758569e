"""Compare: several models or settings continue one prompt side by side, with one seed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import gradio as gr

from lm.config import validate
from lm.generation.options import SamplingOptions
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.context import Page
from serve.page.controls import MAX_SAMPLES, SamplingControls, model_picker
from serve.page.messages import attach
from serve.page.tabs import Tab
from serve.page.text_generation import GeneratedText, generate

MIN_COLUMNS = 2
_TEMPERATURES = (0.4, 0.8, 1.2, 0.0)
"""Default of each column."""


def build(page: Page) -> None:
    """Add the components and handlers."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", lines=3, max_lines=8, elem_classes=["paper", STORED_CLASS], elem_id="compare-prompt",
                placeholder="All models continue this text.",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            folded = ("max_tokens", "top_p", "min_p")
            controls = SamplingControls(page, first=("seed",), folded=folded, presets=False)
    store(page, "compare-prompt", prompt)
    with gr.Row(elem_classes="knobs"):
        go = gr.Button("Write side by side", variant="primary", size="md", min_width=160)
        stop = gr.Button("Stop", size="md", min_width=70)
        count = gr.Radio(
            [(f"{number} columns", number) for number in range(MIN_COLUMNS, MAX_SAMPLES + 1)], value=MIN_COLUMNS,
            show_label=False, container=False, min_width=340, scale=3,
        )  # fmt: skip
    columns: list[gr.Column] = []
    settings: list[Any] = []
    texts: list[gr.Textbox] = []
    notes: list[gr.Markdown] = []
    with gr.Row():
        for number, default in enumerate(_TEMPERATURES[:MAX_SAMPLES], 1):
            with gr.Column(min_width=250, visible=number <= MIN_COLUMNS) as column:
                model = model_picker(page, f"compare-model-{number}", label=f"Model {number}")
                temperature = gr.Slider(0, 2, value=default, step=0.05, label="Temperature")
                top_k = gr.Slider(0, 100, value=0, step=1, label="Top-k (0: all)")
                texts.append(gr.Textbox(
                    label=f"Text {number}", lines=12, max_lines=20, interactive=False, elem_classes="paper",
                    elem_id=f"compare-{number}", placeholder="Press Write side by side.",
                ))  # fmt: skip
                notes.append(gr.Markdown("", elem_classes="note"))
                settings += [model, temperature, top_k]
            columns.append(column)

    async def on_count(wanted: int) -> list[Any]:
        return [gr.update(visible=number < wanted) for number in range(MAX_SAMPLES)]

    async def on_write(text: str, wanted: int, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        shared = controls.options(values[len(settings) :]).model_dump()
        results = []
        for start in range(0, 3 * wanted, 3):
            model, temperature, top_k = values[start : start + 3]
            options = {**shared, "temperature": temperature, "top_k": int(top_k) or None}
            results.append(generate(page, model, text, validate(SamplingOptions, options, where="sampling")))
        async for updated in _merge(results):
            update: dict[Any, Any] = {}
            for number, result in updated.items():
                update[texts[number]] = result.texts[0]
                update[notes[number]] = f"{len(result.tokens[0]):,} tokens · {result.tokens_per_second:,.0f} tokens/s"
            yield update

    inputs = [prompt, count, *settings, *controls.inputs]
    writing = attach([go.click, prompt.submit], on_write, inputs, [*texts, *notes])
    stop.click(None, cancels=[writing], api_visibility="private")
    attach(count.change, on_count, count, columns)


async def _merge(generators: list[AsyncGenerator[GeneratedText, None]]) -> AsyncIterator[dict[int, GeneratedText]]:
    """Run the generators at the same time, and give the new values by index."""
    pending = {asyncio.ensure_future(anext(generator)): index for index, generator in enumerate(generators)}
    try:
        while pending:
            ready, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            updated = {}
            for task in ready:
                index = pending.pop(task)
                try:
                    updated[index] = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(generators[index]))] = index
            if updated:
                yield updated
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for generator in generators:
            await generator.aclose()


TAB = Tab("Compare", 40, build)
