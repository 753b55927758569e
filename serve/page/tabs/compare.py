"""Compare: one prompt and one seed, several models or settings side by side, written together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from lm.config import validate
from lm.generation.options import SamplingOptions
from serve.page.controls import MOST_SAMPLES, Knobs, model_picker
from serve.page.drawing import Written, write
from serve.page.keeping import KEPT, keep
from serve.page.site import QUIET, Page, told

FEWEST = 2
_TEMPERATURES = (0.4, 0.8, 1.2, 0.0)
"""To begin with: the same model, made bolder from left to right."""


def build(page: Page) -> None:
    """The tab."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", lines=3, max_lines=8, elem_classes=["paper", KEPT], elem_id="compare-prompt",
                placeholder="What all of them go on from.",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            knobs = Knobs(page, first=("seed",), folded=("max_tokens", "top_p", "min_p"), presets=False)
    keep(page, "compare-prompt", prompt)
    with gr.Row(elem_classes="knobs"):
        go = gr.Button("Write side by side", variant="primary", size="md", min_width=160)
        stop = gr.Button("Stop", size="md", min_width=70)
        count = gr.Radio(
            [(f"{number} columns", number) for number in range(FEWEST, MOST_SAMPLES + 1)], value=FEWEST,
            show_label=False, container=False,
            min_width=340, scale=3,
        )  # fmt: skip
    columns: list[gr.Column] = []
    settings: list[Any] = []
    texts: list[gr.Textbox] = []
    notes: list[gr.Markdown] = []
    with gr.Row():
        for number in range(MOST_SAMPLES):
            with gr.Column(min_width=250, visible=number < FEWEST) as column:
                model = model_picker(page, f"compare-model-{number + 1}", label=f"Model {number + 1}")
                temperature = gr.Slider(0, 2, value=_TEMPERATURES[number], step=0.05, label="Temperature")
                top_k = gr.Slider(0, 100, value=0, step=1, label="Top-k (0: all)")
                texts.append(gr.Textbox(
                    label=f"Text {number + 1}", lines=12, max_lines=20, interactive=False, elem_classes="paper",
                    elem_id=f"compare-{number + 1}", placeholder="Press Write side by side.",
                ))  # fmt: skip
                notes.append(gr.Markdown("", elem_classes="note"))
                settings += [model, temperature, top_k]
            columns.append(column)

    def show(wanted: int) -> list[Any]:
        return [gr.update(visible=number < wanted) for number in range(MOST_SAMPLES)]

    async def on_write(text: str, wanted: int, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        own, shared = values[: len(settings)], knobs.options(values[len(settings) :])
        asked = []
        for number in range(wanted):
            model, temperature, top_k = own[3 * number : 3 * number + 3]
            options = {**shared.model_dump(), "temperature": temperature, "top_k": int(top_k) or None}
            asked.append((model, validate(SamplingOptions, options, where="sampling")))
        async for written in _together([write(page, model, text, options) for model, options in asked]):
            news: dict[Any, Any] = {}
            for number, each in written.items():
                news[texts[number]] = each.texts[0]
                news[notes[number]] = f"{len(each.tokens[0]):,} tokens · {each.tokens_per_second:,.0f} tokens/s"
            yield news

    writing = gr.on(
        [go.click, prompt.submit], told(on_write), [prompt, count, *settings, *knobs.inputs], [*texts, *notes], **QUIET
    )
    stop.click(None, cancels=[writing], api_visibility="private")
    count.change(show, count, columns, **QUIET)


async def _together(writers: list[AsyncIterator[Written]]) -> AsyncIterator[dict[int, Written]]:
    """What is new of several texts, as they are written at the same time."""
    pending = {asyncio.ensure_future(anext(writer)): number for number, writer in enumerate(writers)}
    try:
        while pending:
            ready, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            news = {}
            for task in ready:
                number = pending.pop(task)
                try:
                    news[number] = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(writers[number]))] = number
            if news:
                yield news
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for writer in writers:
            await writer.aclose()  # type: ignore[attr-defined]
