"""Write: a text that the model continues; serve/page/text_editor.py describes each button."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable
from typing import Any

import gradio as gr

from serve.page.assets import read_asset
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.context import Page
from serve.page.controls import MAX_SAMPLES, SamplingControls, model_picker
from serve.page.messages import attach, page_error
from serve.page.reproduce import FORMS, TextRequest, reproduce
from serve.page.tabs import Tab
from serve.page.text_editor import FAILED_JS, TAKE_JS, EditorCommand, EditorSession, command_js, editor_script
from serve.page.text_generation import GeneratedText, generate

_ENDS = {"length": "ended at the length limit", "stop": "ended at a stop text"}


def build(page: Page) -> None:
    """Add the components and handlers."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            paper = gr.Textbox(
                label="Text", lines=14, max_lines=24, elem_classes=["paper", STORED_CLASS], elem_id="paper",
                buttons=["copy"], placeholder="Type a beginning, then press Write. It also works without one.",
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
            controls = SamplingControls(
                page, first=("temperature", "top_k", "seed"),
                folded=("max_tokens", "n", "stop", "top_p", "min_p", "typical_p"),
            )  # fmt: skip
    store(page, "paper", paper)
    for name, component in controls.components.items():
        store(page, f"write-{name}", component)
    columns, samples, takes = [], [], []
    with gr.Row(visible=False) as side_by_side:
        for number in range(1, MAX_SAMPLES + 1):
            with gr.Column(min_width=240, visible=False) as column:
                samples.append(gr.Textbox(
                    label=f"Sample {number}", lines=8, max_lines=16, interactive=False, elem_classes="paper",
                    elem_id=f"sample-{number}",
                ))  # fmt: skip
                takes.append(gr.Button("Take this one", size="sm"))
            columns.append(column)
    with gr.Accordion("Reproduce this text", open=False):
        form = gr.Radio(FORMS, value=FORMS[0], show_label=False, container=False)
        shown = gr.Textbox(
            "", lines=3, max_lines=12, show_label=False, interactive=False, buttons=["copy"], elem_id="recipe",
            elem_classes="recipe", placeholder="After the model has written: the same request with the same seed.",
        )  # fmt: skip
    pieces = editor_script(text="#paper textarea", samples="#sample-1 textarea")
    # The `js` of each button sets it.
    sent = gr.JSON(None, visible=False)
    editor: gr.State = gr.State(EditorSession())

    def last_piece(editor: EditorSession, form: str, request: gr.Request) -> dict[Any, Any]:
        """Updates that depend on the last piece in the text."""
        last = editor.last_request()
        return {
            go: gr.update(value="Continue" if last else "Write"),
            shown: reproduce(form, last, server=page.options, url=_url(request)) if last else "",
        }

    async def on_write(
        sent: Any, editor: EditorSession, model: str, form: str, request: gr.Request, *values: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        command, options = EditorCommand.parse(sent), controls.options(values)
        if not command.is_possible:
            raise page_error("No generated text to replace. Press Write.")
        async with editor.acquire() as stop:
            editor.keep_pieces(command.pieces)
            seed = secrets.randbelow(2**31) if command.is_retry else editor.unused_seed(options.seed)
            options = options.model_copy(update={"seed": seed})
            made_by = TextRequest(page.models.resolve(model), command.text, options)
            result, several = None, options.n > 1
            try:
                async with contextlib.aclosing(
                    generate(page, made_by.model, command.text, options, stop=stop)
                ) as results:
                    async for result in results:
                        text = "" if several else result.texts[0]
                        update: dict[Any, Any] = {
                            status: _status(result, seed),
                            pieces: {"piece": command.new_piece, "text": text, "ended": result.ended},
                        }
                        if several:
                            update |= dict(zip(samples, result.texts, strict=False))
                        is_first = command.new_piece not in editor
                        if is_first:
                            editor.set_request(command.new_piece, made_by)
                            update[side_by_side] = gr.update(visible=several)
                            update |= {column: gr.update(visible=several and index < options.n)
                                       for index, column in enumerate(columns)}  # fmt: skip
                        if result.stopped:
                            editor.set_request(command.new_piece, made_by.with_max_tokens(result.max_length))
                        if is_first or result.ended:
                            update |= last_piece(editor, form, request)
                        yield update
            except Exception:
                # The text so far stays.
                if result is None:
                    yield {status: ""}
                else:
                    editor.set_request(command.new_piece, made_by.with_max_tokens(result.max_length))
                    yield {status: _status(result, seed, "failed"), **last_piece(editor, form, request)}
                editor.left_after_undo = None
                raise
            while editor.left_after_undo is not None:
                left, editor.left_after_undo = editor.left_after_undo, None
                yield after_undo(editor, left, form, request)

    def after_undo(editor: EditorSession, left: Iterable[int], form: str, request: gr.Request) -> dict[Any, Any]:
        editor.keep_pieces(left)
        return {status: "", side_by_side: gr.update(visible=False), **last_piece(editor, form, request)}

    async def on_undo(sent: Any, editor: EditorSession, form: str, request: gr.Request) -> Any:
        command = EditorCommand.parse(sent)
        if not command.is_possible:
            raise page_error("Nothing to undo.")
        if editor.is_busy:
            # A browser may show the updates of two handlers in the wrong order: `on_write` sends this one as its last.
            editor.left_after_undo = command.pieces
            editor.stop()
            return gr.skip()
        return after_undo(editor, command.pieces, form, request)

    async def on_take(sent: Any, sample: str, editor: EditorSession) -> dict[Any, Any]:
        await editor.stop_and_wait()
        return {side_by_side: gr.update(visible=False)}

    async def on_stop(editor: EditorSession) -> None:
        editor.stop()

    async def on_form(editor: EditorSession, form: str, request: gr.Request) -> Any:
        return last_piece(editor, form, request)[shown]

    outputs = [pieces, status, go, shown, side_by_side, *columns, *samples]
    inputs = [sent, editor, picker, form, *controls.inputs]
    for writing in (
        attach([go.click, paper.submit], on_write, inputs, outputs, js=command_js("begin")),
        attach(again.click, on_write, inputs, outputs, js=command_js("again"), trigger_mode="multiple"),
    ):
        writing.failure(None, js=FAILED_JS, api_visibility="private")
    attach(stop.click, on_stop, editor, None)
    attach(pieces.halt, on_stop, editor, None)
    attach(
        undo.click, on_undo, [sent, editor, form], [status, side_by_side, go, shown], js=command_js("undo"),
        trigger_mode="multiple",
    )  # fmt: skip
    for sample, take in zip(samples, takes, strict=True):
        attach(take.click, on_take, [sent, sample, editor], side_by_side, js=TAKE_JS)
    attach(form.change, on_form, [editor, form], shown)
    download.click(None, paper, js=read_asset("download.js"), api_visibility="private")


def _url(request: gr.Request) -> str:
    scheme = request.headers.get("x-forwarded-proto", "http").split(",")[0]
    return f"{scheme}://{request.headers.get('host', '127.0.0.1:8000')}"


def _status(result: GeneratedText, seed: int, end: str = "") -> str:
    count = sum(map(len, result.tokens))
    parts = [f"{count:,} tokens", f"{result.tokens_per_second:,.0f} tokens/s", f"seed {seed}"]
    if end:
        parts.append(end)
    elif result.done:
        parts += [_ENDS[reason] for reason in dict.fromkeys(result.finish_reasons) if reason in _ENDS]
    else:
        parts.append("stopped" if result.stopped else "writing …")
    return " · ".join(parts)


TAB = Tab("Write", 10, build)
