"""Inside: the learning film, gradients, attention, neurons, and the sources of each prediction, of one model.

A view is computed when a visitor opens it: one at a time on the server, in a thread, on a text of limited length.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from gradio.context import Context

from lm.errors import LMError
from lm.html_parts import escape
from lm.runs.film import loss_curve, require_film
from lm.runs.film_page import SCRIPT, STYLE, film_html, film_page
from lm.runs.run import Run
from serve.engines.available_runs import AvailableRun
from serve.page import inside_views as views
from serve.page import token_marks
from serve.page.assets import read_asset
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.context import Page
from serve.page.controls import model_picker
from serve.page.inside_views import VIEWS, Computed, ViewError, ViewName
from serve.page.line_chart import LineChart
from serve.page.messages import attach, page_error, without_commands
from serve.page.tabs import Tab

FILM = "film"
LABELS = {
    FILM: "Film", "gradients": "Gradients", "attention": "Attention", "neurons": "Neurons",
    "why": "Who said this letter",
}  # fmt: skip
MAX_WAITING = 4
"""Views that wait for the one that is computed."""
_LIVE = "<div aria-live='polite'>${value}</div>"
"""A screen reader says what changes."""
_DOWNLOAD_JS = """(found) => {
  if (!found) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([found.page], { type: 'text/html' }));
  link.download = found.name;
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build(page: Page) -> None:
    """Add the components and handlers."""
    plain: dict[str, Any] = {
        "css_template": read_asset("inside.css"), "apply_default_css": False
    }  # fmt: skip
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picker = model_picker(page, "inside-model", elem_id="inside-model")
        with gr.Column(scale=3, min_width=320):
            paper = gr.Textbox(
                label="Text", lines=2, max_lines=6, elem_classes=["paper", STORED_CLASS], elem_id="inside-text",
                placeholder="Empty: a part of the text that the model was validated on.",
            )  # fmt: skip
    with gr.Row(elem_classes="knobs"):
        which = gr.Radio(
            [(label, key) for key, label in LABELS.items()], value=FILM, label="View", show_label=False,
            container=False, elem_id="inside-view", scale=4, min_width=320,
        )  # fmt: skip
        go = gr.Button("Look again", size="md", min_width=140, scale=0, elem_id="inside-look")
    store(page, "inside-text", paper)
    said = gr.HTML("", elem_id="inside-said", html_template=_LIVE, **plain)
    choice = gr.Dropdown([], label="Head", visible=False, allow_custom_value=True, elem_id="inside-choice")
    plot = LineChart(elem_id="inside-plot")
    drawn = gr.HTML(
        "", elem_id="inside-drawn", css_template=f"{read_asset('inside.css')}{STYLE}"
        ".film { --film-paper: var(--background-fill-secondary); }",
        apply_default_css=False, js_on_load=f"{SCRIPT}film(element);",
    )  # fmt: skip
    scale = gr.HTML("", css_template=token_marks.SCALE_CSS, apply_default_css=False, visible=False)
    with gr.Row():
        with gr.Column(scale=3, min_width=320, visible=False) as text_column:
            marks = token_marks.Marks("", elem_id="inside-marks")
        with gr.Column(scale=2, min_width=300, visible=False) as details_column:
            details = gr.HTML("", elem_id="inside-details", html_template=_LIVE, **plain)
    download = gr.Button("Download as HTML", size="sm", visible=False, scale=0, elem_id="inside-download")
    downloaded = gr.JSON(None, visible=False)
    computed_state: gr.State = gr.State(None)
    results = [said, choice, plot, drawn, scale, text_column, marks, details_column, details, download, computed_state]
    turn = asyncio.Lock()
    waiting = [0]

    def empty(sentence: str) -> dict[Any, Any]:
        hidden = gr.update(visible=False)
        return {
            said: sentence, choice: hidden, plot: None, drawn: "", scale: hidden, text_column: hidden, marks: "",
            details_column: hidden, details: "", download: hidden, computed_state: None,
        }  # fmt: skip

    async def on_look(view: str, name: str | None, text: str) -> AsyncIterator[dict[Any, Any]]:
        offer = page.models.available_runs.get(name or "")
        if offer is None:
            yield empty(_hint("Choose a model."))
            return
        if view not in VIEWS:
            yield empty("") | await asyncio.to_thread(show_film, offer)
            return
        yield empty(_hint(f"{_progress(turn.locked())} {LABELS[view]} of {offer.name} …"))
        try:
            computed = await compute(offer, view, text, None)
        except ViewError as error:
            yield empty(_hint(str(error)))
            return
        except Exception:
            yield empty("")
            raise
        yield empty("") | show(computed, computed.choices[0][1] if computed.choices else None)

    async def compute(offer: AvailableRun, view: ViewName, text: str, unit: str | None) -> Computed:
        if waiting[0] >= MAX_WAITING:
            raise page_error("The server computes views for other visitors. Try again in a minute.")
        waiting[0] += 1
        try:
            async with turn:
                return await asyncio.to_thread(look_inside, offer, view, text, unit)
        finally:
            waiting[0] -= 1

    def look_inside(offer: AvailableRun, view: ViewName, text: str, unit: str | None) -> Computed:
        limit = page.options.max_memory
        if limit is not None and page.models.memory_bytes + offer.memory_bytes(page.options) > limit:
            raise ViewError("The memory that this server has for models is in use. Try again later.")
        run = Run(offer.folder, offer.checkpoint, device=page.options.device)
        return views.compute(run, view, text, unit)

    def show_film(offer: AvailableRun) -> dict[Any, Any]:
        try:
            frames = require_film(offer.folder)
        except LMError as error:
            return {said: _hint(without_commands(str(error)))}
        sentence = (
            "One prompt and one seed along the training; only the weights differ. Move the slider, or press Play."
        )
        return {
            said: _hint(sentence), drawn: film_html(frames, *loss_curve(offer.folder)),
            download: gr.update(visible=True),
        }  # fmt: skip

    def show(computed: Computed, chosen: str | None) -> dict[Any, Any]:
        """A computed view, with the chosen head or unit."""
        view, read = computed.view, f" The text is {computed.text}."
        update: dict[Any, Any] = {computed_state: computed}
        if computed.choices:
            label = "Head" if computed.name == "attention" else "Unit (LAYER.UNIT)"
            update[choice] = gr.update(choices=computed.choices, value=chosen, label=label, visible=True)
        if computed.name == "gradients":
            return update | {
                said: _said(views.gradients_sentence(view) + read), plot: views.gradients_chart(view),
                drawn: views.gates_html(view),
            }  # fmt: skip
        if computed.name == "attention":
            sentence = f"Where each head looks: a row is a token, a column a token that it looks at.{read}"
            return update | {said: _said(sentence), drawn: views.attention_html(view, chosen or "")}
        if computed.name == "neurons":
            unit = views.unit_of(view, chosen)
            sentence = "Single units that track a feature of the text. "
            sentence += "No unit does so clearly." if unit is None else "Orange: the unit is high; blue: it is low."
            if unit is not None:
                update |= {
                    scale: gr.update(value=views.unit_scale(), visible=True),
                    text_column: gr.update(visible=True),
                    marks: views.unit_marks(view, unit),
                }
            return update | {
                said: _said(sentence + read),
                details_column: gr.update(visible=True),
                details: views.units_html(view),
            }
        return update | {
            said: _said(views.why_sentence(view) + read), drawn: views.why_legend(view),
            text_column: gr.update(visible=True), marks: views.why_marks(view), details_column: gr.update(visible=True),
            details: _hint("Pick a token: its terms are shown here."),
        }  # fmt: skip

    async def on_choice(computed: Computed | None, chosen: str | None, name: str | None, text: str) -> Any:
        offer = page.models.available_runs.get(name or "")
        if computed is None or not chosen or offer is None:
            return gr.skip()
        if computed.name == "neurons" and chosen not in [unit.name for unit in computed.view.shown]:
            try:
                found = await compute(offer, "neurons", text, str(chosen))
            except ViewError as error:
                raise page_error(str(error)) from None
            known = {value: label for label, value in (*computed.choices, *found.choices)}
            found = Computed(**{**vars(found), "choices": [(label, value) for value, label in known.items()]})
            return show(found, str(chosen))
        return show(computed, str(chosen))

    async def on_pick(computed: Computed | None, event: gr.EventData) -> Any:
        if computed is None or computed.name != "why":
            return gr.skip()
        return views.terms_html(computed.view, int(event.index))

    async def on_download(name: str | None) -> Any:
        offer = page.models.available_runs.get(name or "")
        if offer is None:
            return None
        return {"page": await asyncio.to_thread(film_page, offer.folder), "name": f"{offer.folder.name}-film.html"}

    tab = Context.block
    assert isinstance(tab, gr.Tab), "the caller opens a gr.Tab"
    inputs = [which, picker, paper]
    # Of several quick choices, the last one must win.
    events = [which.input, picker.input, go.click, paper.submit]
    attach(events, on_look, inputs, results, trigger_mode="always_last")
    attach(tab.select, on_look, inputs, results, trigger_mode="once")
    attach(choice.input, on_choice, [computed_state, choice, picker, paper], results)
    attach(marks.pick, on_pick, computed_state, details)
    fetched = attach(download.click, on_download, picker, downloaded)
    fetched.then(None, downloaded, None, js=_DOWNLOAD_JS, api_visibility="private")


def _progress(is_waiting: bool) -> str:
    return "Another view is being computed. Then comes this one:" if is_waiting else "Computing:"


def _hint(sentence: str) -> str:
    return f"<p class='hint'>{escape(sentence)}</p>" if sentence else ""


def _said(sentence: str) -> str:
    return f"<p class='said'>{escape(sentence)}</p>"


TAB = Tab("Inside", 45, build)
