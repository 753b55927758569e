"""Runs: all runs with their reports and learning curves; a visitor may delete runs."""

from __future__ import annotations

import asyncio
import html
import math
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from lm.errors import LMError, RunError
from lm.evaluation.report import Report
from lm.html_parts import escape
from lm.html_parts.line_chart import COLOURS, Line, line_chart_html
from lm.runs.card import figure, figures_of
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder, list_runs
from serve.page.assets import read_asset
from serve.page.context import Page
from serve.page.line_chart import LineChart
from serve.page.messages import attach, page_error, without_commands
from serve.page.tabs import Tab

NOT_ALLOWED = (
    "Deleting is switched off for visitors from other machines. The operator of this server can allow it: "
    "lm serve --allow-training"
)
MAX_SELECTED = len(COLOURS)
"""Runs in one comparison."""
MAX_POINTS = 400
"""Points of a line."""
AXES = {"step": "by steps", "seconds": "by time"}
COUNTS = ("kind", "tokens", "characters", "bytes", "unknown_tokens", "context")
"""Fields of a report about the measured text."""


def build(page: Page) -> None:
    """Add the components and handlers."""
    runs_dir = page.options.runs_dir
    plain: dict[str, Any] = {"css_template": read_asset("runs.css"), "apply_default_css": False}
    table = gr.HTML("", js_on_load=read_asset("runs_table.js"), elem_id="runs-table", **plain)
    # Only the table in the browser knows which runs are selected. _SELECTED_JS reads it at each event: an event that
    # waits for another one loses its data.
    selected = gr.JSON([], visible=False)
    # Exactly the runs in the question are deleted when the visitor confirms.
    in_question: gr.State = gr.State([])
    with gr.Row(visible=False) as tools:
        delete = gr.Button("Delete …", size="sm", min_width=120, elem_id="runs-delete", scale=0)
        question = gr.HTML("", visible=False, elem_id="runs-question", **plain)
        yes = gr.Button(
            "Delete permanently", variant="stop", size="sm", min_width=120, visible=False, scale=0, elem_id="runs-yes"
        )
        no = gr.Button("Keep", size="sm", min_width=90, visible=False, scale=0, elem_id="runs-no")
    details = gr.HTML("", elem_id="runs-report", **plain)
    with gr.Column(visible=False) as chart:
        axis = gr.Radio(
            [(name, key) for key, name in AXES.items()], value="step", label="Learning curves",
            info="Validation during training, in bits per byte with the spelling of unknown words; in nats per token "
            "if an older run has no bits per byte (lower is better). Compare only runs with the same text.",
        )  # fmt: skip
        plot = LineChart(elem_id="runs-plot")
    with gr.Accordion("Model card", open=False, visible=False) as card_box:
        shown_card = gr.Markdown("", sanitize_html=True, latex_delimiters=[], elem_id="runs-card")

    dialog = [in_question, question, yes, no, delete]

    def close_dialog(found: list[RunFolder], request: gr.Request) -> dict[Any, Any]:
        can_delete = page.may_train(request) and any(not folder.shipped for folder in found)
        return {
            in_question: [], question: gr.update(visible=False), yes: gr.update(visible=False),
            no: gr.update(visible=False), delete: gr.update(visible=True), tools: gr.update(visible=can_delete),
        }  # fmt: skip

    async def on_select(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        found = await asyncio.to_thread(_find, runs_dir, names)
        validations, report, text = await asyncio.to_thread(_details, found)
        return {
            details: report, chart: gr.update(visible=bool(validations)), plot: _plot(validations, by),
            card_box: gr.update(visible=text is not None), shown_card: text or "", **close_dialog(found, request),
        }  # fmt: skip

    async def on_open(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        return {table: await asyncio.to_thread(_table, runs_dir), **await on_select(by, names, request)}

    async def on_delete(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        if not page.may_train(request):
            raise page_error(NOT_ALLOWED)
        found = [folder for folder in await asyncio.to_thread(_find, runs_dir, names) if not folder.shipped]
        if not found:
            raise page_error("Select a run of your own. The runs that come with Inkling cannot be deleted.")
        what = ", ".join(f"<b>{escape(folder.name)}</b>" for folder in found)
        return {
            in_question: [folder.name for folder in found],
            question: gr.update(value=f"<p class='ask'>Delete {what}? This cannot be undone.</p>", visible=True),
            yes: gr.update(visible=True), no: gr.update(visible=True), delete: gr.update(visible=False),
        }  # fmt: skip

    async def on_no(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        return close_dialog(await asyncio.to_thread(_find, runs_dir, names), request)

    async def on_yes(by: str, names: Any, confirmed: list[str], request: gr.Request) -> dict[Any, Any]:
        if not page.may_train(request):
            raise page_error(NOT_ALLOWED)
        for folder in await asyncio.to_thread(_find, runs_dir, confirmed):
            try:
                await asyncio.to_thread(delete_run, folder, runs_dir)
                gr.Info(f"Deleted {escape(folder.name)}.")
            except LMError as error:
                gr.Warning(escape(without_commands(str(error))), title="Not deleted")
        # A loaded engine of a deleted run is removed after its last request.
        await page.models.reload()
        return await on_open(by, names, request)

    views = [details, chart, plot, card_box, shown_card, tools, *dialog]
    tab = Context.block
    assert isinstance(tab, gr.Tab), "the caller opens a gr.Tab"
    inputs = [axis, selected]
    attach(tab.select, on_open, inputs, [table, *views], js=_SELECTED_JS)
    # Of several quick selections, the last one must win.
    attach(table.choose, on_select, inputs, views, js=_SELECTED_JS, trigger_mode="always_last")
    attach(axis.input, on_select, inputs, views, js=_SELECTED_JS, trigger_mode="always_last")
    attach(delete.click, on_delete, inputs, dialog, js=_SELECTED_JS)
    attach(no.click, on_no, inputs, [tools, *dialog], js=_SELECTED_JS)
    attach(yes.click, on_yes, [*inputs, in_question], [table, *views], js=_SELECTED_JS)


# -- runs ---------------------------------------------------------------------------------------------


def _find(runs_dir: Path, names: Any) -> list[RunFolder]:
    """The listed runs of these names: a visitor's input never becomes part of a path."""
    known = {folder.name: folder for folder in list_runs(runs_dir)}
    wanted = dict.fromkeys(map(str, names)) if isinstance(names, list) else {}
    return [known[name] for name in wanted if name in known][:MAX_SELECTED]


def delete_run(folder: RunFolder, runs_dir: Path) -> None:
    """Delete a run of the runs folder.

    Raises:
        LMError: the run is shipped, is being trained, or is stored elsewhere.
    """
    if folder.path.parent != runs_dir and not folder.shipped:
        raise RunError(f"{folder.name} is not stored in {runs_dir}. Delete it by hand.")
    folder.delete()


def _details(folders: list[RunFolder]) -> tuple[dict[str, list[dict[str, Any]]], str, str | None]:
    """Validation rows by run, the reports as HTML, and the card if one run is selected."""
    validations: dict[str, list[dict[str, Any]]] = {}
    columns: list[tuple[str, str, dict[str, Any]]] = []
    notes: list[str] = []
    text = None
    for folder in folders:
        run = Run(folder)
        try:
            folder.read_record()
            rows = [row for row in folder.read_metrics() if _is_number(row.get("valid_loss"))]
            if rows:
                validations[folder.name] = rows[:: 1 + len(rows) // MAX_POINTS]
            else:
                notes.append(f"{folder.name} has no learning curve.")
            reports = run.reports()
            columns += [(folder.name, key, report) for key, report in reports.items()]
            if not reports:
                notes.append(f"{folder.name} has no report yet. Measure it on a text in the tab Perplexity.")
            if len(folders) == 1:
                text = _plain(run.card())
        except (LMError, OSError, KeyError, TypeError, AttributeError) as error:
            message = without_commands(str(error).replace(str(folder.path), folder.name))
            notes.append(f"{folder.name} cannot be read: {message}")
    return validations, _report(columns, notes), text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(markdown: str) -> str:
    """Markdown without HTML, links and pictures."""
    return html.escape(markdown, quote=False).replace("[", "&#91;")


# -- how it looks -------------------------------------------------------------------------------------


_SELECTED_JS = """(by, _, ...others) => [
  by, [...document.querySelectorAll('#runs-table input:checked')].map((box) => box.value), ...others
]"""
_HEADS = ("", "run", "model", "text", "step", "bits per byte", "size", "date")


def _table(runs_dir: Path) -> str:
    rows = [Run(folder).summary() for folder in list_runs(runs_dir)]
    if not rows:
        return "<p class='hint'>There are no runs yet. Train one in the tab <b>Train</b>.</p>"
    heads = "".join(
        f"<th scope='col' class='c{number}'>{head}</th>" if head else f"<td class='c{number}'></td>"
        for number, head in enumerate(_HEADS)
    )
    return (
        "<p class='hint'>Select a run to see its report and card, or several runs to compare them. Bits per byte are "
        "measured on held-out text and include the spelling of unknown words (lower is better).</p>"
        f"<div class='scroll'><table class='runs'><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(map(_row, rows))}</tbody></table></div>"
    )


def _row(row: dict[str, Any]) -> str:
    name = escape(row["name"])
    box = f"<td class='c0'><input type='checkbox' value=\"{name}\" aria-label=\"Select {name}\"></td>"
    if row["problem"]:
        # Do not show paths of this machine to visitors.
        problem = escape(without_commands(row["problem"].replace(row["path"], row["name"])))
        return f"<tr>{box}<th scope='row'>{name}</th><td colspan='6' class='problem'>{problem}</td></tr>"
    bits, tokens_alone = figure(row["bits_per_byte"], ".3f"), figure(row["token_bits_per_byte"], ".3f")
    step = f"{row['step']:,}" if row["step"] is not None else "–"
    cells = (row["model_name"], row["corpus"], step, bits, _size(row["size_bytes"]), row["created"][:10])
    # Both figures, if the spelling of unknown words and white space matters.
    below = {5: f"<small>tokens alone {tokens_alone}</small>"} if tokens_alone != bits else {}
    shown = "".join(
        f"<td class='c{number}'>{escape(str(cell))}{below.get(number, '')}</td>" for number, cell in enumerate(cells, 2)
    )
    shipped = "<small>comes with Inkling</small>" if row["shipped"] else ""
    return f"<tr>{box}<th scope='row'>{name}{shipped}</th>{shown}</tr>"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:,.1f} kB"


def _report(columns: list[tuple[str, str, dict[str, Any]]], notes: list[str]) -> str:
    """The figures of reports side by side, each with its meaning, and notes."""
    notes += dict.fromkeys(f"Note: {note}" for _, _, report in columns for note in report["notes"])
    hints = "".join(f"<p class='hint'>{escape(note)}</p>" for note in notes)
    if not columns:
        return hints
    heads = "".join(f"<th scope='col'>{escape(name)}<small>{escape(key)}</small></th>" for name, key, _ in columns)
    shown = figures_of([report for _, _, report in columns])
    fields = [(field, name, form) for field, (name, _, form) in shown.items()]
    fields.append(("floor_bits_per_byte", "floor", ".4f"))
    fields += [(field, field.replace("_", " "), ",") for field in COUNTS]
    body = ""
    for field, name, form in fields:
        meaning = escape(Report.model_fields[field].description or "")
        values = "".join(f"<td>{escape(_value(report.get(field), form))}</td>" for _, _, report in columns)
        body += f"<tr><th scope='row'>{escape(name)}<small>{meaning}</small></th>{values}</tr>"
    return (
        "<h3>Scores</h3><div class='scroll'><table class='report'>"
        f"<thead><tr><th scope='col'>figure</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>{hints}"
    )


def _value(value: Any, form: str) -> str:
    return value if isinstance(value, str) else figure(value, form)


def _plot(validations: dict[str, list[dict[str, Any]]], by: str) -> str:
    # Bits per byte compare tokenizers; older runs have the loss alone.
    has_bits = all(_is_number(row.get("valid_bits_per_byte")) for rows in validations.values() for row in rows)
    field, title = ("valid_bits_per_byte", "bits per byte") if has_bits else ("valid_loss", "validation loss")
    lines = [
        Line(name, [(row[by], row[field]) for row in rows if _is_number(row.get(by))], colour)
        for (name, rows), colour in zip(validations.items(), COLOURS, strict=False)
    ]
    return line_chart_html(lines, x_title=by, y_title=title)


TAB = Tab("Runs", 60, build)
