"""Write: a sheet of paper that the model goes on writing on."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from serve.page.controls import MOST_SAMPLES, Knobs, model_picker
from serve.page.drawing import Written, write
from serve.page.sharing import WAYS, Recipe, tell
from serve.page.site import QUIET, Page, refusal, told

_DOWNLOAD = """(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'text/plain' }));
  link.download = 'inkling.txt';
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build(page: Page) -> None:
    """The tab."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            paper = gr.Textbox(
                label="Text", lines=14, max_lines=24, elem_classes="paper", elem_id="paper", buttons=["copy"],
                placeholder="Begin something, then press Write. An empty sheet works too.",
            )  # fmt: skip
            with gr.Row(elem_classes="knobs"):
                go = gr.Button("Write", variant="primary", size="md", min_width=90)
                stop = gr.Button("Stop", size="md", min_width=70)
                again = gr.Button("Regenerate", size="md", min_width=110)
                undo = gr.Button("Undo", size="md", min_width=70)
                download = gr.Button("Download", size="md", min_width=100)
            status = gr.Markdown("", elem_classes="note", elem_id="write-status")
        with gr.Column(scale=2, min_width=300):
            picker = model_picker(page)
            knobs = Knobs(
                page, first=("temperature", "top_k", "seed"),
                folded=("max_tokens", "n", "stop", "top_p", "min_p", "typical_p", "repetition_penalty",
                        "presence_penalty", "frequency_penalty"),
            )  # fmt: skip
    columns, samples, takes = [], [], []
    with gr.Row(visible=False) as side_by_side:
        for number in range(MOST_SAMPLES):
            with gr.Column(min_width=240, visible=False) as column:
                samples.append(gr.Textbox(
                    label=f"Sample {number + 1}", lines=8, max_lines=16, interactive=False, elem_classes="paper",
                    elem_id=f"sample-{number + 1}",
                ))  # fmt: skip
                takes.append(gr.Button("Take this one", size="sm"))
            columns.append(column)
    with gr.Accordion("Exactly this text again", open=False):
        way = gr.Radio(WAYS, value=WAYS[0], show_label=False, container=False)
        shown = gr.Textbox(
            "", lines=3, max_lines=12, show_label=False, interactive=False, buttons=["copy"], elem_id="recipe",
            elem_classes="recipe",
            placeholder="Once something is written, this tells how to make it again: the same request, the same seed.",
        )  # fmt: skip
    steps: gr.State = gr.State([])

    def recipe_text(done: list[Recipe], wanted: str, request: gr.Request) -> str:
        return tell(wanted, done[-1], server=page.options, url=_url(request)) if done else ""

    async def on_write(
        text: str, model: str, done: list[Recipe], wanted: str, request: gr.Request, *values: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        options = knobs.options(values)
        if done and done[-1].options.seed == options.seed:
            # The same luck again would write much the same.
            options = options.model_copy(update={"seed": options.seed + 1})
        async for news in go_on(text, model, done, wanted, request, options):
            yield news

    async def on_again(
        text: str, model: str, done: list[Recipe], wanted: str, request: gr.Request, *values: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        if not done:
            raise refusal("There is nothing to write again yet: press Write.")
        options = knobs.options(values, seed=secrets.randbelow(2**31))
        async for news in go_on(done[-1].prompt, model, done[:-1], wanted, request, options):
            yield news

    async def go_on(
        text: str, model: str, done: list[Recipe], wanted: str, request: gr.Request, options: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        done = [*done, Recipe(model, text, options)]
        first, several = True, options.n > 1
        async for written in write(page, model, text, options):
            news: dict[Any, Any] = {status: _status(written, options.seed)}
            if first:
                news |= {
                    steps: done, go: gr.update(value="Continue"), knobs.seed: options.seed,
                    shown: recipe_text(done, wanted, request), side_by_side: gr.update(visible=several),
                }  # fmt: skip
                news |= {column: gr.update(visible=several and number < options.n)
                         for number, column in enumerate(columns)}  # fmt: skip
                first = False
            if several:
                news[paper] = text
                news |= dict(zip(samples, written.texts, strict=False))
            else:
                news[paper] = text + written.texts[0]
            yield news

    async def on_undo(done: list[Recipe], wanted: str, request: gr.Request) -> dict[Any, Any]:
        if not done:
            raise refusal("There is nothing to take back.")
        left = done[:-1]
        return {
            paper: done[-1].prompt, steps: left, status: "", side_by_side: gr.update(visible=False),
            go: gr.update(value="Continue" if left else "Write"), shown: recipe_text(left, wanted, request),
        }  # fmt: skip

    async def on_take(done: list[Recipe], sample: str) -> dict[Any, Any]:
        return {paper: done[-1].prompt + sample, side_by_side: gr.update(visible=False)}

    outputs = [paper, status, steps, go, knobs.seed, shown, side_by_side, *columns, *samples]
    inputs = [paper, picker, steps, way, *knobs.inputs]
    writing = gr.on([go.click, paper.submit], told(on_write), inputs, outputs, **QUIET)
    rewriting = again.click(told(on_again), inputs, outputs, **QUIET)
    stop.click(None, cancels=[writing, rewriting], api_visibility="private")
    undo.click(told(on_undo), [steps, way], [paper, steps, status, side_by_side, go, shown], **QUIET)
    for sample, take in zip(samples, takes, strict=True):
        take.click(told(on_take), [steps, sample], [paper, side_by_side], **QUIET)
    way.change(recipe_text, [steps, way], shown, **QUIET)
    download.click(None, paper, js=_DOWNLOAD, api_visibility="private")


def _url(request: gr.Request) -> str:
    scheme = request.headers.get("x-forwarded-proto", "http").split(",")[0]
    return f"{scheme}://{request.headers.get('host', '127.0.0.1:8000')}"


def _status(written: Written, seed: int) -> str:
    count = sum(map(len, written.tokens))
    parts = [f"{count:,} tokens", f"{written.tokens_per_second:,.0f} tokens/s", f"seed {seed}"]
    if written.done:
        why = {"length": "ended at the length", "stop": "ended before the stop text"}
        parts += [why[reason] for reason in dict.fromkeys(written.reasons) if reason in why]
    else:
        parts.append("writing …")
    return " · ".join(parts)
