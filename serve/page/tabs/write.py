"""Write: a text that the model continues, four views of it, and the chart of the next token.

serve/page/text_editor.py describes each button, sheet_views.py the views, next_token.py the chart.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from lm.errors import LMError
from lm.generation.distribution import uniforms
from lm.html_parts import escape
from lm.html_parts.token_marks import SURPRISE_SCALE, Mark, marks_html, score_note, surprise_strength
from serve.http_errors import RequestError
from serve.page.assets import read_asset
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.context import Page
from serve.page.controls import MAX_SAMPLES, SamplingControls, model_picker
from serve.page.messages import attach, page_error, without_commands
from serve.page.next_token import Chart, Place, settings_js
from serve.page.reproduce import FORMS, TextRequest, reproduce
from serve.page.sheet_views import (
    ALTERNATIVES,
    FIRST_UNIT,
    NEURON,
    PLAIN,
    SURPRISE,
    VIEWS,
    SheetTokens,
    Views,
    place_at,
    plain_html,
    sheet_tokens,
)
from serve.page.tabs import Tab
from serve.page.text_editor import (
    FAILED_JS,
    TAKE_JS,
    EditorCommand,
    EditorSession,
    command_js,
    editor_script,
    unused_seed,
)
from serve.page.text_generation import GeneratedText, generate, next_logits
from serve.page.token_marks import SCALE_CSS, Marks

_ENDS = {"length": "ended at the length limit", "stop": "ended at a stop text"}
SPEEDS = (0.5, 8.0)
"""Tokens per second of slow motion, from and to."""


def build(page: Page) -> None:
    """Add the components and handlers."""
    views = Views(page)
    with gr.Row(elem_id="sheet"):
        with gr.Column(scale=6, min_width=320, elem_id="sheet-text-side"):
            gr.HTML(read_asset("sheet_bar.html"), elem_id="sheet-bar", apply_default_css=False)
            with gr.Row(elem_classes="knobs", elem_id="sheet-model"):
                picker = model_picker(page, "write-model", show_label=False, container=False, scale=3)
                slow = gr.Checkbox(
                    False, label="Slow motion", container=False, scale=1, min_width=120, elem_id="slow-motion"
                )
            with gr.Row(elem_classes="knobs", elem_id="sheet-views"):
                view = gr.Radio(list(VIEWS), value=PLAIN, label="View", show_label=False, container=False,
                                elem_id="sheet-view", min_width=260)  # fmt: skip
                unit = gr.Dropdown(
                    [FIRST_UNIT], value=FIRST_UNIT, allow_custom_value=True, label="Unit: layer.number",
                    show_label=False, container=False, elem_id="sheet-unit", min_width=80,
                )  # fmt: skip
            paper = gr.Textbox(
                label="Text", show_label=False, container=False, lines=12, max_lines=12, elem_id="paper",
                elem_classes=["paper", STORED_CLASS],
                placeholder="Type a beginning, then press Write. It also works without one.",
            )  # fmt: skip
            shown = Marks("", elem_id="sheet-text")
            with gr.Row(elem_classes="knobs", elem_id="sheet-buttons"):
                go = gr.Button("Write", variant="primary", size="md", min_width=96, elem_id="write-go")
                stop = gr.Button("Stop", variant="primary", size="md", min_width=96, elem_id="write-stop")
                again = gr.Button("Regenerate", size="md", min_width=96, elem_id="write-again")
                undo = gr.Button("Undo", size="md", min_width=64, elem_id="write-undo")
                download = gr.Button("Download", size="md", min_width=88, elem_id="write-download")
            speed = gr.Slider(*SPEEDS, value=2.0, step=0.5, label="Tokens per second", elem_id="slow-speed")
            status = gr.Markdown("", elem_classes="note", elem_id="write-status")
            legend = gr.HTML("", elem_id="sheet-legend", css_template=SCALE_CSS, apply_default_css=False)
        with gr.Column(scale=5, min_width=300, elem_id="sheet-side"):
            chart = Chart(None, elem_id="next-token")
            with gr.Column(elem_id="write-knobs"):
                controls = SamplingControls(
                    page, first=("temperature", "top_k", "seed"),
                    folded=("max_tokens", "n", "stop", "top_p", "min_p", "typical_p"),
                    own=page.sampling_of(picker.value),
                )  # fmt: skip
    store(page, "paper", paper)
    store(page, "write-view", view)
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
        recipe = gr.Textbox(
            "", lines=3, max_lines=12, show_label=False, interactive=False, buttons=["copy"], elem_id="recipe",
            elem_classes="recipe", placeholder="After the model has written: the same request with the same seed.",
        )  # fmt: skip
    pieces = editor_script(text="#paper textarea", samples="#sample-1 textarea")
    # The `js` of each button sets it.
    sent = gr.JSON(None, visible=False)
    editor: gr.State = gr.State(EditorSession())
    tokens_state: gr.State = gr.State(None)
    # The model whose own options the sliders had last.
    followed: gr.State = gr.State(picker.value)

    def recipe_of(editor: EditorSession, command: EditorCommand, form: str, request: gr.Request) -> str:
        """How to make the last piece of a text, and that of a command that starts one."""
        new = () if command.new_piece is None else (command.new_piece,)
        last = editor.last_request((*command.pieces, *new))
        return reproduce(form, last, server=page.options, url=_url(request)) if last else ""

    async def on_write(
        sent: Any, editor: EditorSession, model: str, form: str, view: str, slow: bool, speed: float,
        request: gr.Request, *values: Any,
    ) -> AsyncIterator[dict[Any, Any]]:  # fmt: skip
        command = EditorCommand.parse(sent)
        if not command.is_possible:
            raise page_error("No generated text to replace. Press Write.")
        live = view == SURPRISE
        options = controls.options(values, **({"logprobs": ALTERNATIVES} if live else {}))
        async with editor.acquire() as stop:
            seed = secrets.randbelow(2**31) if command.is_retry else unused_seed(options.seed, command.seeds)
            options = options.model_copy(update={"seed": seed})
            name = page.models.resolve(model)
            own = await asyncio.to_thread(page.sampling_of, name)
            made_by = TextRequest(name, command.text, options, tuple(own))
            several, slow = options.n > 1, slow and options.n == 1
            marks = await _LiveMarks.begin(page, views, made_by.model, command) if live and not several else None
            result = None
            try:
                async with contextlib.aclosing(
                    generate(page, made_by.model, command.text, options, stop=stop)
                ) as results:
                    paced = _slowly(page, made_by, results, stop, pause=1 / float(speed)) if slow else results
                    async for result in paced:
                        text = "" if several else result.texts[0]
                        update: dict[Any, Any] = {
                            status: _status(result, seed),
                            pieces: {"piece": command.new_piece, "text": text, "ended": result.ended, "seed": seed},
                        }
                        if isinstance(result, _SlowText) and result.place is not None:
                            update[chart] = result.place.to_json()
                        if marks is not None:
                            update |= {shown: marks.html(result), legend: SURPRISE_SCALE}
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
                            update[recipe] = recipe_of(editor, command, form, request)
                        yield update
            except Exception:
                # The text so far stays.
                if result is None:
                    yield {status: ""}
                else:
                    editor.set_request(command.new_piece, made_by.with_max_tokens(result.max_length))
                    yield {status: _status(result, seed, "failed"), recipe: recipe_of(editor, command, form, request)}
                editor.after_undo = None
                raise
            while editor.after_undo is not None:
                undone, editor.after_undo = editor.after_undo, None
                yield after_undo(editor, undone, form, request)

    def after_undo(editor: EditorSession, command: EditorCommand, form: str, request: gr.Request) -> dict[Any, Any]:
        return {
            status: "",
            side_by_side: gr.update(visible=False),
            recipe: recipe_of(editor, command, form, request),
        }

    async def on_undo(sent: Any, editor: EditorSession, form: str, request: gr.Request) -> Any:
        command = EditorCommand.parse(sent)
        if not command.is_possible:
            raise page_error("Nothing to undo.")
        if editor.is_busy:
            # A browser may show the updates of two handlers in the wrong order: `on_write` sends this one as its last.
            editor.after_undo = command
            editor.stop()
            return gr.skip()
        return after_undo(editor, command, form, request)

    async def on_take(sent: Any, sample: str, editor: EditorSession) -> dict[Any, Any]:
        await editor.stop_and_wait()
        return {side_by_side: gr.update(visible=False)}

    async def on_stop(editor: EditorSession) -> None:
        editor.stop()

    async def on_form(sent: Any, editor: EditorSession, form: str, request: gr.Request) -> Any:
        return recipe_of(editor, EditorCommand.parse(sent), form, request)

    async def on_refresh(
        sent: Any, editor: EditorSession, model: str | None, form: str, view: str, unit: str | None,
        request: gr.Request,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """The view and the chart of the text as it is now."""
        command = EditorCommand.parse(sent)
        if editor.is_busy:
            yield gr.skip()
            return
        yield {recipe: recipe_of(editor, command, form, request), shown: plain_html(command), legend: ""}
        try:
            async for update in looks_of(command, model, view, unit):
                # A chart or view of an older text must not replace what is written now.
                yield gr.skip() if editor.is_busy else update
        except (LMError, RequestError) as error:
            yield {legend: escape(_said(error))}

    async def looks_of(
        command: EditorCommand, model: str | None, view: str, unit: str | None
    ) -> AsyncIterator[dict[Any, Any]]:
        """The chart at the end of a text, then its view."""
        if not command.text:
            yield {tokens_state: None, chart: None}
            return
        try:
            tokens = await sheet_tokens(page, model, command)
            place = await place_at(page, tokens, len(tokens.ends))
        except (LMError, RequestError) as error:
            yield {tokens_state: None, chart: {"error": _said(error)}}
            return
        yield {tokens_state: tokens, chart: place.to_json()}
        if view == PLAIN:
            return
        html, note = await views.html(view, tokens, unit)
        yield {shown: html, legend: note}
        if view == NEURON:
            yield {unit_box: gr.update(choices=[*await views.units(tokens), (unit or FIRST_UNIT,) * 2])}

    async def on_model(model: str | None, before: str | None, *values: Any) -> list[Any]:
        """Sliders that nobody moved take the options of the new model's source."""
        own, old = await asyncio.to_thread(lambda: (page.sampling_of(model), page.sampling_of(before)))
        if own == old or list(values) != controls.filter_values(old):
            return [model, *(gr.skip() for _ in values)]
        return [model, *controls.filter_values(own)]

    async def on_mark(tokens: SheetTokens | None, event: gr.EventData) -> Any:
        index = int(event.index)
        if tokens is None or not 0 <= index < len(tokens.ends):
            return gr.skip()
        return (await place_at(page, tokens, index)).to_json()

    unit_box = unit
    outputs = [pieces, status, recipe, shown, legend, chart, side_by_side, *columns, *samples]
    inputs = [sent, editor, picker, form, view, slow, speed, *controls.inputs]
    views_of_text = [recipe, tokens_state, chart, shown, legend, unit]
    for event in (pieces.refresh, picker.input, unit.input):
        attach(
            event,
            on_refresh,
            [sent, editor, picker, form, view, unit],
            views_of_text,
            js=command_js("current"),
            trigger_mode="always_last",
        )
    for writing in (
        attach([go.click, paper.submit], on_write, inputs, outputs, js=command_js("begin")),
        attach(again.click, on_write, inputs, outputs, js=command_js("again"), trigger_mode="multiple"),
        attach(chart.pick, on_write, inputs, outputs, js=command_js("pick"), trigger_mode="multiple"),
    ):
        writing.failure(None, js=FAILED_JS, api_visibility="private")
    attach(stop.click, on_stop, editor, None)
    attach(pieces.halt, on_stop, editor, None)
    attach(
        undo.click, on_undo, [sent, editor, form], [status, side_by_side, recipe], js=command_js("undo"),
        trigger_mode="multiple",
    )  # fmt: skip
    for sample, take in zip(samples, takes, strict=True):
        attach(take.click, on_take, [sent, sample, editor], side_by_side, js=TAKE_JS)
    attach(form.change, on_form, [sent, editor, form], recipe, js=command_js("current"))
    attach(shown.pick, on_mark, tokens_state, chart)
    view.change(
        None,
        view,
        None,
        js="(view) => { document.documentElement.dataset.sheet = view; window.inklingEditor?.view(view); }",
        api_visibility="private",
    )
    paper.change(None, None, None, js="() => { window.inklingEditor?.sync(); }", api_visibility="private")
    filters = list(controls.filters.values())
    attach(picker.change, on_model, [picker, followed, *filters], [followed, *filters])
    gr.on(
        [component.change for component in filters], None, filters, None, js=settings_js(list(controls.filters)),
        api_visibility="private",
    )  # fmt: skip
    download.click(None, paper, js=read_asset("download.js"), api_visibility="private")


# -- surprise, while the model writes --------------------------------------------------------------------


class _LiveMarks:
    """A text that grows as marks; each mark is made once."""

    def __init__(self, tokens: SheetTokens, before: str) -> None:
        self._parts = [before] if tokens.command.text else []
        self._stream = tokens.model.tokenizer.stream(after=tokens.ids)
        self._text_of = tokens.model.tokens.text
        self._first, self._count = len(tokens.ends), 0

    @classmethod
    async def begin(cls, page: Page, views: Views, model: str, command: EditorCommand) -> _LiveMarks:
        """The marks of the text that is continued."""
        tokens = await sheet_tokens(page, model, command)
        before, _ = await views.html(SURPRISE, tokens, None)
        return cls(tokens, before)

    def html(self, result: GeneratedText) -> str:
        """All marks so far."""
        scores = result.scores[0][self._count :]
        marks = [
            Mark(self._stream.feed(each.token), surprise_strength(each.logprob), score_note(each, self._text_of))
            for each in scores
        ]
        self._parts.append(marks_html(marks, first=self._first + self._count))
        self._count += len(scores)
        return "".join(self._parts)


# -- slow motion -----------------------------------------------------------------------------------------


class _SlowText(GeneratedText):
    """The first tokens of a text, and the draw of the next one."""

    place: Place | None = None


async def _slowly(
    page: Page, request: TextRequest, results: AsyncIterator[GeneratedText], stop: asyncio.Event, *, pause: float
) -> AsyncIterator[_SlowText]:
    """The same text token by token: first the chart with the number that is drawn, then the token.

    Args:
        page: for its models.
        request: of the text.
        results: of `generate`.
        stop: ends the text after the tokens that were shown.
        pause: seconds between two tokens.
    """
    shown, stream, text = 0, None, request.prompt
    ids: tuple[int, ...] = ()
    async for result in results:
        while shown < len(result.tokens[0]) and not stop.is_set():
            if stream is None:
                tokens = await sheet_tokens(page, request.model, EditorCommand.parse({"text": request.prompt}))
                ids, stream = tokens.ids, tokens.model.tokenizer.stream(after=tokens.ids)
            token = result.tokens[0][shown]
            model, logits = await next_logits(page, request.model, ids)
            number = uniforms(request.options.seed, 0, shown, 1)[0] if request.options.temperature else None
            place = Place(model, ids, shown, logits, text, token, number)
            yield _part(result, shown, text[len(request.prompt) :], place)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
            if stop.is_set():
                break
            shown, ids, text = shown + 1, (*ids, token), text + stream.feed(token)
            yield _part(result, shown, text[len(request.prompt) :], None)
        if stop.is_set():
            last = _part(result, shown, text[len(request.prompt) :], None)
            last.stopped = True
            yield last
            return
        if result.ended:
            whole = _part(result, shown, result.texts[0], None)
            whole.finish_reasons, whole.stopped = result.finish_reasons, result.stopped
            yield whole


def _part(result: GeneratedText, count: int, text: str, place: Place | None) -> _SlowText:
    # A stop text holds back what may belong to it.
    part = _SlowText(
        result.model, [text[: len(result.texts[0])]], [result.tokens[0][:count]], [result.scores[0][:count]], [None],
        result.seconds,
    )  # fmt: skip
    part.place = place
    return part


# -- words -----------------------------------------------------------------------------------------------


def _said(error: LMError | RequestError) -> str:
    """An error as one sentence for a visitor."""
    return without_commands(error.detail if isinstance(error, RequestError) else str(error))


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
