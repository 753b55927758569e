"""Runs: learning curves and reports of all runs; a visitor may rename and delete runs, and write notes on them."""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from gradio.context import Context

from lm.comparison.seeds import seed_groups
from lm.errors import LMError, RunError
from lm.evaluation.report import Report
from lm.html_parts import escape
from lm.html_parts.line_chart import COLOURS
from lm.runs.card import MEANINGS, figure, figures_of
from lm.runs.curves import AXES, BANDS, UNITS, Axis, Curve, curves, with_bands
from lm.runs.run import Run
from lm.runs.run_folder import MAX_NOTE_CHARACTERS, RunFolder, list_runs
from serve.page.assets import read_asset
from serve.page.context import Page
from serve.page.line_chart import ChartLine, LineChart, chart
from serve.page.messages import attach, page_error, without_commands
from serve.page.tabs import Tab

NOT_ALLOWED = (
    "Changing and deleting runs is switched off for visitors from other machines. The operator of this server can "
    "allow it: lm serve --allow-training"
)
MAX_SELECTED = len(COLOURS)
"""Runs in one comparison."""
MAX_POINTS = 400
"""Points of a line."""
METRICS = {"bits_per_byte": "bits per byte", "loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy"}
AXIS_NAMES: dict[Axis, str] = {"step": "by steps", "tokens": "by tokens", "time": "by time"}
COUNTS = ("kind", "tokens", "characters", "bytes", "unknown_tokens", "context")
"""Fields of a report about the measured text."""
NOTE_LINE = 80
"""Characters of a note in the table."""
WRITER = "write-model"
"""The model picker of the tab Write."""
_NO_CURVE = "<p class='hint'>Select runs in the table to see their learning curves.</p>"


def build(page: Page) -> None:
    """Add the components and handlers."""
    runs_dir = page.options.runs_dir
    plain: dict[str, Any] = {"css_template": read_asset("runs.css"), "apply_default_css": False}
    # Only the table in the browser knows which runs are selected. _SELECTED_JS reads it at each event: an event that
    # waits for another one loses its data.
    selected = gr.JSON([], visible=False)
    # Exactly the runs in the question are changed when the visitor confirms.
    in_question: gr.State = gr.State([])
    with gr.Row(visible=False) as views:
        metric = gr.Radio(
            [(name, key) for key, name in METRICS.items()], value="bits_per_byte", label="Learning curves",
            info="Bits per byte compare models with different tokens; they include the spelling of unknown words. "
            "Compare only runs with the same text.", elem_id="runs-metric", scale=3, min_width=320,
        )  # fmt: skip
        axis = gr.Radio(
            [(name, key) for key, name in AXIS_NAMES.items()], value="step", label="Axis", elem_id="runs-axis",
            scale=2, min_width=320,
        )  # fmt: skip
        band = gr.Checkbox(
            False, label="Seeds as a band", elem_id="runs-band", min_width=320, scale=1,
            info="Runs that differ by their seed alone: their mean, the lowest and the highest.",
        )  # fmt: skip
    plot = LineChart(elem_id="runs-plot")
    no_curve = gr.HTML(_NO_CURVE, **plain)
    with gr.Row(visible=False, elem_classes="knobs") as tools:
        write = gr.Button("Write with it", variant="primary", size="sm", min_width=120, elem_id="runs-write", scale=0)
        rename = gr.Button("Rename …", size="sm", min_width=120, elem_id="runs-rename", scale=0)
        delete = gr.Button("Delete …", size="sm", min_width=120, elem_id="runs-delete", scale=0)
        question = gr.HTML("", visible=False, elem_id="runs-question", **plain)
        new_name = gr.Textbox(
            label="New name", visible=False, elem_id="runs-new-name", scale=0, min_width=240, max_length=200
        )
        yes = gr.Button(
            "Delete permanently", variant="stop", size="sm", min_width=120, visible=False, scale=0, elem_id="runs-yes"
        )
        give = gr.Button("Rename", variant="primary", size="sm", min_width=120, visible=False, scale=0,
                         elem_id="runs-give-name")  # fmt: skip
        no = gr.Button("Cancel", size="sm", min_width=90, visible=False, scale=0, elem_id="runs-no")
    table = gr.HTML("", js_on_load=read_asset("runs_table.js"), elem_id="runs-table", **plain)
    with gr.Row(visible=False) as note_box:
        note = gr.Textbox(
            label="Note", lines=2, max_lines=6, elem_id="runs-note", max_length=MAX_NOTE_CHARACTERS, scale=5,
            placeholder="What this run is for. The note is stored with the run.",
        )  # fmt: skip
        keep = gr.Button("Save note", size="sm", min_width=110, scale=0, elem_id="runs-keep-note")
    details = gr.HTML("", elem_id="runs-report", **plain)
    with gr.Accordion("Model card", open=False, visible=False) as card_box:
        shown_card = gr.Markdown("", sanitize_html=True, latex_delimiters=[], elem_id="runs-card")

    dialog = [in_question, question, new_name, yes, give, no, write, rename, delete, tools]

    def close_dialog(found: list[RunFolder], request: gr.Request) -> dict[Any, Any]:
        may = page.may_train(request)
        is_one = len(found) == 1
        can = {
            write: is_one and found[0].name in page.models.available_runs and WRITER in page.model_pickers,
            rename: is_one and may and not found[0].shipped,
            delete: may and any(not folder.shipped for folder in found),
        }
        asked = {each: gr.update(visible=False) for each in (question, new_name, yes, give, no)}
        shown = {each: gr.update(visible=visible) for each, visible in can.items()}
        return {in_question: [], tools: gr.update(visible=any(can.values())), **asked, **shown}

    def check_permission(request: gr.Request) -> None:
        if not page.may_train(request):
            raise page_error(NOT_ALLOWED)

    def own(found: list[RunFolder], what: str) -> list[RunFolder]:
        kept = [folder for folder in found if not folder.shipped]
        if not kept:
            raise page_error(f"Select a run of your own. The runs that come with Inkling cannot be {what}.")
        return kept

    async def on_select(names: Any, of: str, by: str, banded: bool, request: gr.Request) -> dict[Any, Any]:
        found = await asyncio.to_thread(_find, runs_dir, names)
        drawn, report, text = await asyncio.to_thread(_details, found, of, by, banded)
        one = found[0] if len(found) == 1 else None
        written = one.read_note() if one else ""
        may_note = one is not None and not one.shipped and page.may_train(request)
        return {
            details: report, plot: _plot(drawn, of, by), views: gr.update(visible=bool(found)),
            no_curve: gr.update(visible=not found), card_box: gr.update(visible=text is not None),
            shown_card: text or "", note_box: gr.update(visible=may_note or bool(written)),
            note: gr.update(value=written.strip(), interactive=may_note), keep: gr.update(visible=may_note),
            **close_dialog(found, request),
        }  # fmt: skip

    async def on_open(names: Any, of: str, by: str, banded: bool, request: gr.Request) -> dict[Any, Any]:
        return {
            table: await asyncio.to_thread(_table, runs_dir), **await on_select(names, of, by, banded, request)
        }  # fmt: skip

    async def on_delete(names: Any, request: gr.Request) -> dict[Any, Any]:
        check_permission(request)
        found = own(await asyncio.to_thread(_find, runs_dir, names), "deleted")
        what = ", ".join(f"<b>{escape(folder.name)}</b>" for folder in found)
        return {
            in_question: [folder.name for folder in found],
            question: gr.update(value=f"<p class='ask'>Delete {what}? This cannot be undone.</p>", visible=True),
            yes: gr.update(visible=True), no: gr.update(visible=True), **_hidden(write, rename, delete),
        }  # fmt: skip

    async def on_rename(names: Any, request: gr.Request) -> dict[Any, Any]:
        check_permission(request)
        folder = own(await asyncio.to_thread(_find, runs_dir, names), "renamed")[0]
        return {
            in_question: [folder.name], new_name: gr.update(value=folder.name, visible=True),
            give: gr.update(visible=True), no: gr.update(visible=True), **_hidden(write, rename, delete),
        }  # fmt: skip

    async def on_no(names: Any, request: gr.Request) -> dict[Any, Any]:
        return close_dialog(await asyncio.to_thread(_find, runs_dir, names), request)

    async def on_yes(
        names: Any, of: str, by: str, banded: bool, confirmed: list[str], request: gr.Request
    ) -> dict[Any, Any]:
        check_permission(request)
        for folder in await asyncio.to_thread(_find, runs_dir, confirmed):
            try:
                await asyncio.to_thread(delete_run, folder, runs_dir)
                gr.Info(f"Deleted {escape(folder.name)}.")
            except LMError as error:
                gr.Warning(escape(without_commands(str(error))), title="Not deleted")
        # A loaded engine of a deleted run is removed after its last request.
        await page.models.reload()
        return await on_open(names, of, by, banded, request)

    async def on_give_name(
        names: Any, of: str, by: str, banded: bool, confirmed: list[str], name: str, request: gr.Request
    ) -> dict[Any, Any]:
        check_permission(request)
        folder = own(await asyncio.to_thread(_find, runs_dir, confirmed), "renamed")[0]
        await asyncio.to_thread(rename_run, folder, name.strip(), runs_dir)
        gr.Info(f"{escape(folder.name)} is now {escape(name.strip())}.")
        await page.models.reload()
        return await on_open(names, of, by, banded, request)

    async def on_keep_note(names: Any, written: str, request: gr.Request) -> str:
        check_permission(request)
        folder = own(await asyncio.to_thread(_find, runs_dir, names), "given a note")[0]
        await asyncio.to_thread(folder.write_note, written)
        gr.Info("The note is saved.")
        return await asyncio.to_thread(_table, runs_dir)

    shown = [details, plot, views, no_curve, card_box, shown_card, note_box, note, keep, *dialog]
    tab = Context.block
    assert isinstance(tab, gr.Tab), "the caller opens a gr.Tab"
    inputs = [selected, metric, axis, band]
    attach(tab.select, on_open, inputs, [table, *shown], js=_SELECTED_JS)
    # Of several quick selections, the last one must win.
    for event in (table.choose, metric.input, axis.input, band.input):
        attach(event, on_select, inputs, shown, js=_SELECTED_JS, trigger_mode="always_last")
    attach(delete.click, on_delete, selected, dialog, js=_SELECTED_JS)
    attach(rename.click, on_rename, selected, dialog, js=_SELECTED_JS)
    attach(no.click, on_no, selected, dialog, js=_SELECTED_JS)
    attach(yes.click, on_yes, [*inputs, in_question], [table, *shown], js=_SELECTED_JS)
    attach(
        [give.click, new_name.submit], on_give_name, [*inputs, in_question, new_name], [table, *shown],
        js=_SELECTED_JS,
    )  # fmt: skip
    attach(keep.click, on_keep_note, [selected, note], table, js=_SELECTED_JS)
    if WRITER in page.model_pickers:
        picker = page.model_pickers[WRITER].component
        write.click(None, selected, picker, js=_WRITE_JS, api_visibility="private")


def _hidden(*components: Any) -> dict[Any, Any]:
    return {each: gr.update(visible=False) for each in components}


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


def rename_run(folder: RunFolder, name: str, runs_dir: Path) -> None:
    """Rename a run of the runs folder, in its card too.

    Raises:
        LMError: the name is not valid or is taken; or the run is shipped, is being trained, or is stored elsewhere.
    """
    if folder.path.parent != runs_dir and not folder.shipped:
        raise RunError(f"{folder.name} is not stored in {runs_dir}. Rename it by hand.")
    if name in {each.name for each in list_runs(runs_dir)}:
        raise RunError(f"There is already a run named {name!r}: choose another name.")
    renamed = folder.rename(name)
    try:
        Run(renamed).save_card()
    except (LMError, OSError, KeyError, TypeError, AttributeError):
        # A run that cannot be read has no card.
        return


def _details(folders: list[RunFolder], metric: str, by: str, banded: bool) -> tuple[list[Curve], str, str | None]:
    """The curves, the reports and options as HTML, and the card if one run is selected."""
    drawn: list[Curve] = []
    readable: list[Run] = []
    columns: list[tuple[str, str, dict[str, Any]]] = []
    notes: list[str] = []
    text = None
    for folder in folders:
        run = Run(folder)
        try:
            reports, _ = run.reports(), run.config
            readable.append(run)
            found = _curves(folder, metric, by)
            drawn += found
            if not folder.read_metrics():
                notes.append(f"{folder.name} has no learning curve.")
            elif not found:
                notes.append(f"{folder.name} has no curve of {METRICS.get(metric, metric)}: an older Inkling made it.")
            columns += [(folder.name, key, report) for key, report in reports.items()]
            if not reports:
                notes.append(f"{folder.name} has no report yet. Measure it on a text in the tab Perplexity.")
            if len(folders) == 1:
                text = _plain(run.card())
        except (LMError, OSError, KeyError, TypeError, AttributeError) as error:
            message = without_commands(str(error).replace(str(folder.path), folder.name))
            notes.append(f"{folder.name} cannot be read: {message}")
    if banded and drawn:
        drawn = with_bands(drawn, seed_groups(readable), "min-max")
    return drawn, _report(columns, notes) + _options(readable), text


def _curves(folder: RunFolder, metric: str, by: str) -> list[Curve]:
    try:
        return curves([folder], metric if metric in METRICS else "loss", by if by in get_args(Axis) else "step")
    except LMError:
        return []


def _plain(markdown: str) -> str:
    """Markdown without HTML, links and pictures."""
    return html.escape(markdown, quote=False).replace("[", "&#91;")


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options that differ between runs, by their full names, with the value of each run; None: not an option."""
    flat = [dict(_flat(run.config.model_dump(mode="json"), "")) for run in runs]
    names = dict.fromkeys(name for options in flat for name in options)
    values = {name: [options.get(name) for options in flat] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _flat(options: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in options.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


# -- how it looks -------------------------------------------------------------------------------------


_SELECTED_JS = """(_, ...others) => [
  [...document.querySelectorAll('#runs-table input:checked')].map((box) => box.value), ...others
]"""
_WRITE_JS = """() => {
  const name = document.querySelector('#runs-table input:checked')?.value;
  window.inklingStorage.store(WRITER, name);
  [...document.querySelectorAll('[role=tab]')].find((tab) => tab.textContent.trim() === 'Write')?.click();
  return name;
}""".replace("WRITER", json.dumps(WRITER))
_HEADS = ("", "run", "model", "text", "step", "bits per byte", "size", "date")


def _table(runs_dir: Path) -> str:
    folders = list_runs(runs_dir)
    rows = [(Run(folder).summary(), folder.read_note()) for folder in folders]
    if not rows:
        return "<p class='hint'>There are no runs yet. Train one in the tab <b>Train</b>.</p>"
    heads = "".join(
        f"<th scope='col' class='c{number}' aria-sort='none'><button type='button'>{head}</button></th>" if head
        else "<th scope='col' class='c0'><span class='away'>Select</span></th>"
        for number, head in enumerate(_HEADS)
    )  # fmt: skip
    return (
        "<p class='hint'>Select a run to see its curve, report and card, or several runs to compare them. Press a "
        "heading to sort. Bits per byte are measured on held-out text and include the spelling of unknown words "
        "(lower is better).</p>"
        f"<div class='scroll'><table class='runs'><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(_row(row, note) for row, note in rows)}</tbody></table></div>"
    )


def _row(row: dict[str, Any], note: str) -> str:
    name = escape(row["name"])
    line = " ".join(note.split())
    line = line if len(line) <= NOTE_LINE else line[: NOTE_LINE - 1] + "…"
    written = f"<small class='note'>{escape(line)}</small>" if line else ""
    box = f"<td class='c0'><input type='checkbox' value=\"{name}\" aria-label=\"Select {name}\"></td>"
    if row["problem"]:
        # Do not show paths of this machine to visitors.
        problem = escape(without_commands(row["problem"].replace(row["path"], row["name"])))
        return f"<tr>{box}<th scope='row'>{name}{written}</th><td colspan='6' class='problem'>{problem}</td></tr>"
    bits, tokens_alone = figure(row["bits_per_byte"], ".3f"), figure(row["token_bits_per_byte"], ".3f")
    step = f"{row['step']:,}" if row["step"] is not None else "–"
    cells = (row["model_name"], row["corpus"], step, bits, _size(row["size_bytes"]), row["created"][:10])
    # Both figures, if the spelling of unknown words and white space matters.
    below = {5: f"<small>tokens alone {tokens_alone}</small>"} if tokens_alone != bits else {}
    # The numbers that a column is sorted by.
    keys = {4: row["step"], 5: row["bits_per_byte"], 6: row["size_bytes"]}
    shown = "".join(
        f"<td class='c{number}' data-key='{escape(str(keys.get(number, cell)))}'>"
        f"{escape(str(cell))}{below.get(number, '')}</td>"
        for number, cell in enumerate(cells, 2)
    )
    shipped = "<small>comes with Inkling</small>" if row["shipped"] else ""
    return f"<tr>{box}<th scope='row'>{name}{shipped}{written}</th>{shown}</tr>"


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
        meaning = escape(MEANINGS[field][0] if field in MEANINGS else Report.model_fields[field].description or "")
        values = "".join(f"<td>{escape(_value(report.get(field), form))}</td>" for _, _, report in columns)
        body += f"<tr><th scope='row'>{escape(name)}<small>{meaning}</small></th>{values}</tr>"
    return (
        "<h3>Scores</h3><div class='scroll'><table class='report'>"
        f"<thead><tr><th scope='col'>figure</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>{hints}"
    )


def _value(value: Any, form: str) -> str:
    return value if isinstance(value, str) else figure(value, form)


def _options(runs: Sequence[Run]) -> str:
    """The options that differ between two or more runs."""
    if len(runs) < 2:
        return ""
    differing = differing_options(runs)
    if not differing:
        return "<h3>Options</h3><p class='hint'>These runs have the same options.</p>"
    heads = "".join(f"<th scope='col'>{escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>"
        + "".join(f"<td>{escape('–' if value is None else str(value))}</td>" for value in values)
        + "</tr>"
        for name, values in differing.items()
    )
    return (
        "<h3>Options that differ</h3><div class='scroll'><table class='report options'>"
        f"<thead><tr><th scope='col'>option</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _plot(drawn: Sequence[Curve], metric: str, by: str) -> dict[str, Any] | None:
    colours = dict(zip(dict.fromkeys(curve.run for curve in drawn), COLOURS, strict=False))
    title = UNITS.get(metric, metric.replace("_", " ")) + (" (lower is better)" if metric != "accuracy" else "")
    if any(curve.band for curve in drawn):
        title += f"; band: {BANDS['min-max']} of the seeds"
    lines = [_line(curve, colours[curve.run], best=max if metric == "accuracy" else min) for curve in drawn]
    return chart(lines, x_title=AXES[by if by in AXES else "step"][1], y_title=title, file=f"runs-{metric}")


def _line(curve: Curve, colour: str, *, best: Any) -> ChartLine:
    place = curve.y.index(best(curve.y)) if curve.split == "valid" else None
    every = 1 + len(curve.y) // MAX_POINTS
    kept = sorted({*range(0, len(curve.y), every), len(curve.y) - 1, *([] if place is None else [place])})

    def thinned(values: list[float]) -> list[float]:
        return [values[index] for index in kept]

    low, high = (thinned(ends) for ends in curve.ends) if curve.band else (None, None)
    return ChartLine(
        curve.label, thinned(curve.x), thinned(curve.y), colour, thin=curve.split == "train", low=low, high=high,
        best=None if place is None else kept.index(place),
    )  # fmt: skip


TAB = Tab("Runs", 60, build)
