"""Compare: models or settings continue one prompt side by side; models are measured on one text side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import gradio as gr
from gradio.context import Context

from lm.comparison import comparison_html
from lm.comparison.result import Comparison
from lm.comparison.sentences import size_of
from lm.config import validate
from lm.generation.options import SamplingOptions
from lm.html_parts import escape
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.comparisons import MAX_COMPARED, ComparisonPart, compare_runs
from serve.page.context import Page
from serve.page.controls import MAX_SAMPLES, SamplingControls, model_picker, option_of, slider_of
from serve.page.messages import attach, page_error
from serve.page.tabs import Tab
from serve.page.text_generation import GeneratedText, generate, longest_text

MIN_COLUMNS = 2
_OF_COLUMN = "temperature", "top_k"
"""Options that each column has."""
_TEMPERATURES = (0.4, 0.8, 1.2, 0.0)
"""Default of each column."""
SPLITS = {"a split of the first model: test, else validation": "split", "a text": "text"}
_MEASURE = (
    "<h2>Measure side by side</h2><p>Which model predicts a text better, by how much, and where? The models are ranked "
    "by bits per byte, with the cost of spelling unknown words, so models with different tokens are comparable.</p>"
)


def build(page: Page) -> None:
    """Add the components and handlers."""
    ComparisonPart("<h2>Write side by side</h2>")
    _build_writing(page)
    _build_measuring(page)


def _build_writing(page: Page) -> None:
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
        stop = gr.Button("Stop", size="md", min_width=70, interactive=False)
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
                sliders = [slider_of(name, first) for name, first in zip(_OF_COLUMN, (default, None), strict=True)]
                texts.append(gr.Textbox(
                    label=f"Text {number}", lines=12, max_lines=20, interactive=False, elem_classes="paper",
                    elem_id=f"compare-{number}", placeholder="Press Write side by side.",
                ))  # fmt: skip
                notes.append(gr.Markdown("", elem_classes="note"))
                settings += [model, *sliders]
            columns.append(column)

    async def on_count(wanted: int) -> list[Any]:
        return [gr.update(visible=number < wanted) for number in range(MAX_SAMPLES)]

    async def on_write(text: str, wanted: int, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        shared = controls.options(values[len(settings) :]).model_dump()
        results = []
        size = 1 + len(_OF_COLUMN)
        for start in range(0, size * wanted, size):
            model, *own = values[start : start + size]
            options = shared | {name: option_of(name, value) for name, value in zip(_OF_COLUMN, own, strict=True)}
            results.append(generate(page, model, text, validate(SamplingOptions, options, where="sampling")))
        idle = {stop: gr.update(interactive=False)}
        yield {stop: gr.update(interactive=True)}
        try:
            async for updated in _merge(results):
                update: dict[Any, Any] = {}
                for number, result in updated.items():
                    update[texts[number]] = result.texts[0]
                    speed = f"{result.tokens_per_second:,.0f} tokens/s"
                    update[notes[number]] = f"{len(result.tokens[0]):,} tokens · {speed}"
                yield update
        except Exception:
            yield idle
            raise
        yield idle

    inputs = [prompt, count, *settings, *controls.inputs]
    writing = attach([go.click, prompt.submit], on_write, inputs, [*texts, *notes, stop])
    attach(stop.click, _on_write_stop, None, stop, cancels=[writing])
    attach(count.change, on_count, count, columns)


def _build_measuring(page: Page) -> None:
    ComparisonPart(_MEASURE)
    first = page.model_choices()
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            models = gr.Dropdown(
                first.choices, value=first.ranked[:MIN_COLUMNS], multiselect=True, max_choices=MAX_COMPARED,
                label="Models, two or more", elem_id="compare-models",
                # A run may be deleted while its name is here: the handler says so.
                allow_custom_value=True,
            )  # fmt: skip
            text = gr.Textbox(
                label="Text to measure", lines=6, max_lines=12, elem_classes=["paper", STORED_CLASS], visible=False,
                elem_id="compare-text", placeholder="Paste a text that is new to all models.",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            source = gr.Radio(list(SPLITS.items()), value="split", label="Measure on", elem_id="compare-source")
            with gr.Row(elem_classes="knobs"):
                go = gr.Button("Measure", variant="primary", elem_id="compare-measure", min_width=160)
                stop = gr.Button("Stop", min_width=70, elem_id="compare-measure-stop", interactive=False)
    store(page, "compare-text", text)
    note = ComparisonPart(visible=False, elem_id="compare-note")
    result = ComparisonPart(elem_id="compare-result")
    limit = longest_text(page)

    async def on_open() -> Any:
        found = await asyncio.to_thread(page.model_choices)
        return gr.update(choices=found.choices)

    async def on_source(chosen: str) -> Any:
        return gr.update(visible=chosen == "text")

    async def on_measure(names: list[str], chosen: str, given: str | None) -> AsyncIterator[dict[Any, Any]]:
        given = given or ""
        if chosen == "text" and not given.strip():
            raise page_error("The text is empty. Paste a text first.")
        if len(given) > limit:
            raise page_error(f"The text has more than {limit:,} characters, the limit of this server.")
        yield {stop: gr.update(interactive=True)}
        idle = {note: gr.update(visible=False), stop: gr.update(interactive=False)}
        try:
            compared = compare_runs(page, names, text=given if chosen == "text" else None)
            async with contextlib.aclosing(compared) as updates:
                async for now in updates:
                    if isinstance(now, str):
                        yield {note: gr.update(value=f"<p>{escape(now)}</p>", visible=True)}
                    else:
                        yield {result: await asyncio.to_thread(_comparison, now), **idle}
        except Exception:
            yield idle
            raise

    tab = Context.block
    assert isinstance(tab, gr.Tab), "the caller opens a gr.Tab"
    attach([tab.select, models.focus], on_open, None, models)
    attach(source.change, on_source, source, text)
    measuring = attach(go.click, on_measure, [models, source, text], [note, result, stop])
    attach(stop.click, _on_stop, None, [note, stop], cancels=[measuring])


async def _on_write_stop() -> Any:
    return gr.update(interactive=False)


async def _on_stop() -> list[Any]:
    return [gr.update(visible=False), gr.update(interactive=False)]


def _comparison(found: Comparison) -> str:
    where = "the pasted text" if found.split == "text" else f"the {found.split} split of {found.candidates[0].name}"
    return (
        f"{comparison_html.verdict_html(found)}{comparison_html.results_html(found)}"
        f"{comparison_html.ranking_html(found)}<p>Measured on {escape(where)}: {size_of(found)}.</p>"
        f"{comparison_html.details_html(found)}{comparison_html.notes_html(found)}"
    )


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
