"""Write: a sheet of paper that the model continues; serve/page/sheet.py says what each button does when."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable
from typing import Any

import gradio as gr

from serve.page.controls import MOST_SAMPLES, Knobs, model_picker
from serve.page.drawing import Written, write
from serve.page.keeping import KEPT, keep
from serve.page.sharing import WAYS, Recipe, tell
from serve.page.sheet import FAILED, TAKE, Desk, Order, order_by, stream
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
                label="Text", lines=14, max_lines=24, elem_classes=["paper", KEPT], elem_id="paper",
                buttons=["copy"], placeholder="Begin something, then press Write. An empty sheet works too.",
            )  # fmt: skip
            with gr.Row(elem_classes="knobs"):
                go = gr.Button("Write", variant="primary", size="md", min_width=90)
                stop = gr.Button("Stop", size="md", min_width=70)
                again = gr.Button("Regenerate", size="md", min_width=110)
                undo = gr.Button("Undo", size="md", min_width=70)
                download = gr.Button("Download", size="md", min_width=100)
            status = gr.Markdown("", elem_classes="note", elem_id="write-status")
        with gr.Column(scale=2, min_width=300):
            picker = model_picker(page, "write-model")
            knobs = Knobs(
                page, first=("temperature", "top_k", "seed"),
                folded=("max_tokens", "n", "stop", "top_p", "min_p", "typical_p", "repetition_penalty",
                        "presence_penalty", "frequency_penalty"),
            )  # fmt: skip
    keep(page, "paper", paper)
    for name in knobs.names:
        keep(page, f"write-{name}", knobs.component(name))
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
    pieces = stream(sheet="#paper textarea", samples="#sample-1 textarea")
    # Filled by the `js` of each button.
    sent = gr.JSON(None, visible=False)
    desk: gr.State = gr.State(Desk())

    def known(desk: Desk, wanted: str, request: gr.Request) -> dict[Any, Any]:
        """What is shown of the pieces on the sheet."""
        last = desk.last()
        return {
            go: gr.update(value="Continue" if last else "Write"),
            shown: tell(wanted, last, server=page.options, url=_url(request)) if last else "",
        }

    async def on_write(
        sent: Any, desk: Desk, model: str, wanted: str, request: gr.Request, *values: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        order, options = Order.read(sent), knobs.options(values)
        if not order.done:
            raise refusal("There is nothing to write again yet: press Write.")
        async with desk.writing() as stop:
            desk.stands(order.standing)
            seed = secrets.randbelow(2**31) if order.again else desk.fresh(options.seed)
            options = options.model_copy(update={"seed": seed})
            recipe = Recipe(page.models.resolve(model), order.sheet, options)
            written, several = None, options.n > 1
            try:
                async with contextlib.aclosing(write(page, recipe.model, order.sheet, options, stop=stop)) as writing:
                    async for written in writing:
                        piece = "" if several else written.texts[0]
                        news: dict[Any, Any] = {
                            status: _status(written, seed),
                            pieces: {"number": order.number, "text": piece, "done": written.ended},
                        }
                        if several:
                            news |= dict(zip(samples, written.texts, strict=False))
                        if not desk.has(order.number):
                            desk.keep(order.number, recipe)
                            news[side_by_side] = gr.update(visible=several)
                            news |= {column: gr.update(visible=several and place < options.n)
                                     for place, column in enumerate(columns)}  # fmt: skip
                            news |= known(desk, wanted, request)
                        if written.stopped:
                            desk.keep(order.number, recipe.cut(written.longest))
                        if written.ended:
                            news |= known(desk, wanted, request)
                        yield news
            except Exception:
                # Nothing more comes, and what came stays.
                if written is None:
                    yield {status: ""}
                else:
                    desk.keep(order.number, recipe.cut(written.longest))
                    yield {status: _status(written, seed, "broke off"), **known(desk, wanted, request)}
                desk.left = None
                raise
            while desk.left is not None:
                left, desk.left = desk.left, None
                yield at_rest(desk, left, wanted, request)

    def at_rest(desk: Desk, standing: Iterable[int], wanted: str, request: gr.Request) -> dict[Any, Any]:
        """What is shown after Undo."""
        desk.stands(standing)
        return {status: "", side_by_side: gr.update(visible=False), **known(desk, wanted, request)}

    async def on_undo(sent: Any, desk: Desk, wanted: str, request: gr.Request) -> Any:
        order = Order.read(sent)
        if not order.done:
            raise refusal("There is nothing to take back.")
        if desk.busy:
            # A browser may show news of two handlers in another order than they were sent: the writing itself ends with
            # what is left.
            desk.left = order.standing
            desk.stop()
            return gr.skip()
        return at_rest(desk, order.standing, wanted, request)

    async def on_take(sent: Any, sample: str, desk: Desk) -> dict[Any, Any]:
        await desk.rest()
        return {side_by_side: gr.update(visible=False)}

    async def on_stop(desk: Desk) -> None:
        desk.stop()

    async def on_way(desk: Desk, wanted: str, request: gr.Request) -> Any:
        return known(desk, wanted, request)[shown]

    outputs = [pieces, status, go, shown, side_by_side, *columns, *samples]
    inputs = [sent, desk, picker, way, *knobs.inputs]
    for writing in (
        gr.on([go.click, paper.submit], told(on_write), inputs, outputs, js=order_by("begin"), **QUIET),
        again.click(told(on_write), inputs, outputs, js=order_by("again"), trigger_mode="multiple", **QUIET),
    ):
        writing.failure(None, js=FAILED, api_visibility="private")
    stop.click(told(on_stop), desk, None, **QUIET)
    pieces.halt(told(on_stop), desk, None, **QUIET)
    undo.click(
        told(on_undo), [sent, desk, way], [status, side_by_side, go, shown], js=order_by("undo"),
        trigger_mode="multiple", **QUIET,
    )  # fmt: skip
    for sample, take in zip(samples, takes, strict=True):
        take.click(told(on_take), [sent, sample, desk], side_by_side, js=TAKE, **QUIET)
    way.change(told(on_way), [desk, way], shown, **QUIET)
    download.click(None, paper, js=_DOWNLOAD, api_visibility="private")


def _url(request: gr.Request) -> str:
    scheme = request.headers.get("x-forwarded-proto", "http").split(",")[0]
    return f"{scheme}://{request.headers.get('host', '127.0.0.1:8000')}"


def _status(written: Written, seed: int, end: str = "") -> str:
    count = sum(map(len, written.tokens))
    parts = [f"{count:,} tokens", f"{written.tokens_per_second:,.0f} tokens/s", f"seed {seed}"]
    if end:
        parts.append(end)
    elif written.done:
        why = {"length": "ended at the length", "stop": "ended before the stop text"}
        parts += [why[reason] for reason in dict.fromkeys(written.reasons) if reason in why]
    else:
        parts.append("stopped" if written.stopped else "writing …")
    return " · ".join(parts)
