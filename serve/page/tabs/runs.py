"""Runs: what has been trained, how it learned and how good it became, and the way to be rid of it."""

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
from lm.runs.card import card, figure, figures_of, summary
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder, list_runs
from serve.page.curves import COLOURS, CURVES_CSS, Curve, curves_html
from serve.page.site import QUIET, Page, for_page, refusal, safe, told

HOW = (
    "Deleting is switched off for visitors from other machines. Whoever runs this server can switch it on: "
    "lm serve --allow-training"
)
MOST_CHOSEN = len(COLOURS)
"""Runs that are looked at together."""
MOST_POINTS = 400
"""Of one curve."""
AXES = {"step": "by steps", "seconds": "by time"}
COUNTS = ("kind", "tokens", "characters", "bytes", "unknown_tokens", "context")
"""What a report's figures were measured on."""


def build(page: Page) -> None:
    """The tab."""
    runs_dir = page.options.runs_dir
    table = gr.HTML("", css_template=_CSS, js_on_load=_TABLE_JS, apply_default_css=False, elem_id="runs-table")
    # Which runs are ticked only the table knows. _TICKED asks it each time: an event that has to wait for another one
    # arrives without its data.
    ticked = gr.JSON([], visible=False)
    # Those that the question names, and no others, are deleted when it is answered.
    asked: gr.State = gr.State([])
    with gr.Row(visible=False) as tools:
        delete = gr.Button("Delete …", size="sm", min_width=120, elem_id="runs-delete", scale=0)
        question = gr.HTML("", visible=False, elem_id="runs-question", apply_default_css=False, css_template=_CSS)
        yes = gr.Button(
            "Delete for good", variant="stop", size="sm", min_width=120, visible=False, scale=0, elem_id="runs-yes"
        )
        no = gr.Button("Keep", size="sm", min_width=90, visible=False, scale=0, elem_id="runs-no")
    details = gr.HTML("", elem_id="runs-report", apply_default_css=False, css_template=_CSS)
    with gr.Column(visible=False) as curves:
        axis = gr.Radio(
            [(name, key) for key, name in AXES.items()], value="step", label="How they learned",
            info="Validation loss while training, in nats per token: lower is better. Compare curves only where text "
            "and tokenizer are the same.",
        )  # fmt: skip
        plot = gr.HTML("", elem_id="runs-plot", apply_default_css=False, css_template=CURVES_CSS)
    with gr.Accordion("The whole card", open=False, visible=False) as card_box:
        shown_card = gr.Markdown("", sanitize_html=True, latex_delimiters=[], elem_id="runs-card")

    asking = [asked, question, yes, no, delete]

    def at_rest(found: list[RunFolder], request: gr.Request) -> dict[Any, Any]:
        """Nothing is asked."""
        offered = page.may_change(request) and any(not folder.shipped for folder in found)
        return {
            asked: [], question: gr.update(visible=False), yes: gr.update(visible=False), no: gr.update(visible=False),
            delete: gr.update(visible=True), tools: gr.update(visible=offered),
        }  # fmt: skip

    async def look(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        """All that is said about the ticked runs."""
        found = await asyncio.to_thread(_find, runs_dir, names)
        validations, report, text = await asyncio.to_thread(_details, found)
        return {
            details: report,
            curves: gr.update(visible=bool(validations)),
            plot: _plot(validations, by),
            card_box: gr.update(visible=text is not None),
            shown_card: text or "",
            **at_rest(found, request),
        }

    async def on_open(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        return {table: await asyncio.to_thread(_table, runs_dir), **await look(by, names, request)}

    async def on_ask(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        if not page.may_change(request):
            raise refusal(HOW)
        found = [folder for folder in await asyncio.to_thread(_find, runs_dir, names) if not folder.shipped]
        if not found:
            raise refusal("Tick a run of your own: those that are shipped with Inkling stay.")
        what = ", ".join(f"<b>{safe(folder.name)}</b>" for folder in found)
        return {
            asked: [folder.name for folder in found],
            question: gr.update(value=f"<p class='ask'>Delete {what}? Nothing brings it back.</p>", visible=True),
            yes: gr.update(visible=True), no: gr.update(visible=True), delete: gr.update(visible=False),
        }  # fmt: skip

    async def on_keep(by: str, names: Any, request: gr.Request) -> dict[Any, Any]:
        return at_rest(await asyncio.to_thread(_find, runs_dir, names), request)

    async def on_delete(by: str, names: Any, confirmed: list[str], request: gr.Request) -> dict[Any, Any]:
        if not page.may_change(request):
            raise refusal(HOW)
        for folder in await asyncio.to_thread(_find, runs_dir, confirmed):
            try:
                await asyncio.to_thread(delete_run, folder, runs_dir)
                gr.Info(f"Deleted {safe(folder.name)}.")
            except LMError as error:
                gr.Warning(safe(for_page(str(error))), title="That did not work")
        # An engine that has it loaded goes once nobody uses it.
        await page.models.reload()
        return await on_open(by, names, request)

    views = [details, curves, plot, card_box, shown_card, tools, *asking]
    tab = Context.block
    assert isinstance(tab, gr.Tab), "a tab is built inside of one"
    seen = [axis, ticked]
    tab.select(told(on_open), seen, [table, *views], js=_TICKED, **QUIET)
    # Of several ticks in a row none may be lost, nor overtaken by the answer to an earlier one.
    table.choose(told(look), seen, views, js=_TICKED, trigger_mode="always_last", **QUIET)
    axis.input(told(look), seen, views, js=_TICKED, trigger_mode="always_last", **QUIET)
    delete.click(told(on_ask), seen, asking, js=_TICKED, **QUIET)
    no.click(told(on_keep), seen, [tools, *asking], js=_TICKED, **QUIET)
    yes.click(told(on_delete), [*seen, asked], [table, *views], js=_TICKED, **QUIET)


# -- runs ---------------------------------------------------------------------------------------------


def _find(runs_dir: Path, names: Any) -> list[RunFolder]:
    """The listed runs of these names: what a visitor sends never becomes part of a path."""
    known = {folder.name: folder for folder in list_runs(runs_dir)}
    wanted = dict.fromkeys(map(str, names)) if isinstance(names, list) else {}
    return [known[name] for name in wanted if name in known][:MOST_CHOSEN]


def delete_run(folder: RunFolder, runs_dir: Path) -> None:
    """Delete a run of the runs folder.

    Raises:
        LMError: it is shipped, being trained, or lies elsewhere.
    """
    if folder.path.parent != runs_dir and not folder.shipped:
        raise RunError(f"{folder.name} does not lie in {runs_dir}: delete it by hand.")
    folder.delete()


def _details(folders: list[RunFolder]) -> tuple[dict[str, list[dict[str, Any]]], str, str | None]:
    """Validations by run, the reports as HTML, and the card where one run is chosen."""
    validations: dict[str, list[dict[str, Any]]] = {}
    columns: list[tuple[str, str, dict[str, Any]]] = []
    remarks: list[str] = []
    text = None
    for folder in folders:
        run = Run(folder)
        try:
            folder.read_record()
            rows = [row for row in folder.read_metrics() if _is_number(row.get("valid_loss"))]
            if rows:
                validations[folder.name] = rows[:: 1 + len(rows) // MOST_POINTS]
            else:
                remarks.append(f"{folder.name} keeps no learning curve.")
            reports = run.reports()
            columns += [(folder.name, key, report) for key, report in reports.items()]
            if not reports:
                remarks.append(f"{folder.name} has no report yet. The tab Perplexity measures it on a text of yours.")
            if len(folders) == 1:
                text = _plain(card(run))
        except (LMError, OSError, KeyError, TypeError, AttributeError) as error:
            said = for_page(str(error).replace(str(folder.path), folder.name))
            remarks.append(f"{folder.name} cannot be read: {said}")
    return validations, _report(columns, remarks, bool(folders)), text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(markdown: str) -> str:
    """Markdown in which nothing is HTML, a link or a picture."""
    return html.escape(markdown, quote=False).replace("[", "&#91;")


# -- how it looks -------------------------------------------------------------------------------------


_TABLE_JS = """
// Rows come and go, and a browser leaves a tick in the place where it was: it belongs to the name.
let ticked = new Set();
const boxes = () => [...element.querySelectorAll('input')];
const remember = () => { ticked = new Set(boxes().filter((box) => box.checked).map((box) => box.value)); };
element.addEventListener('change', () => { remember(); trigger('choose'); });
watch('value', () => {
  boxes().forEach((box) => { box.checked = ticked.has(box.value); });
  remember();
});
"""
_TICKED = """(by, _, ...others) => [
  by, [...document.querySelectorAll('#runs-table input:checked')].map((box) => box.value), ...others
]"""
_HEADS = ("", "run", "model", "text", "step", "bits per byte", "size", "date")


def _table(runs_dir: Path) -> str:
    rows = [summary(Run(folder)) for folder in list_runs(runs_dir)]
    if not rows:
        return "<p class='hint'>There is no run yet: train one in the tab <b>Train</b>.</p>"
    heads = "".join(f"<th scope='col' class='c{number}'>{head}</th>" for number, head in enumerate(_HEADS))
    body = "".join(map(_row, rows))
    return (
        "<p class='hint'>Tick one run for its report and card, several to compare them. Bits per byte are of text that "
        "the model never saw, spelling of unknown words included: lower is better.</p>"
        f"<div class='scroll'><table class='runs'><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: dict[str, Any]) -> str:
    name = safe(row["name"])
    box = f"<td class='c0'><input type='checkbox' value=\"{name}\" aria-label=\"Look at {name}\"></td>"
    if row["problem"]:
        # A visitor has no need to know where on this machine it lies.
        problem = safe(for_page(row["problem"].replace(row["path"], row["name"])))
        return f"<tr>{box}<th scope='row'>{name}</th><td colspan='6' class='problem'>{problem}</td></tr>"
    bits, alone = figure(row["bits_per_byte"], ".3f"), figure(row["token_bits_per_byte"], ".3f")
    cells = (
        row["model_name"], row["corpus"],
        f"{row['step']:,}" if row["step"] is not None else "–",
        bits,
        _size(row["size_bytes"]),
        row["created"][:10],
    )  # fmt: skip
    # Unknown words and white space are charged for; where that counts, the customary figure stands below.
    below = {5: f"<small>tokens alone {alone}</small>"} if alone != bits else {}
    shown = "".join(
        f"<td class='c{number}'>{safe(str(cell))}{below.get(number, '')}</td>" for number, cell in enumerate(cells, 2)
    )
    shipped = "<small>shipped with Inkling</small>" if row["shipped"] else ""
    return f"<tr>{box}<th scope='row'>{name}{shipped}</th>{shown}</tr>"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:,.1f} kB"


def _report(columns: list[tuple[str, str, dict[str, Any]]], remarks: list[str], some: bool) -> str:
    """The figures of reports side by side, each with what it means."""
    if not some:
        return ""
    said = "".join(f"<p class='hint'>{safe(remark)}</p>" for remark in remarks)
    if not columns:
        return said
    heads = "".join(f"<th scope='col'>{safe(name)}<small>{safe(key)}</small></th>" for name, key, _ in columns)
    shown = figures_of([report for _, _, report in columns])
    fields = [(field, name, form) for field, (name, _, form) in shown.items()]
    fields.append(("floor_bits_per_byte", "floor", ".4f"))
    fields += [(field, field.replace("_", " "), ",") for field in COUNTS]
    body = ""
    for field, name, form in fields:
        meaning = safe(Report.model_fields[field].description or "")
        values = "".join(f"<td>{safe(_value(report.get(field), form))}</td>" for _, _, report in columns)
        body += f"<tr><th scope='row'>{safe(name)}<small>{meaning}</small></th>{values}</tr>"
    notes = dict.fromkeys(note for _, _, report in columns for note in report["notes"])
    said += "".join(f"<p class='hint'>Note: {safe(str(note))}</p>" for note in notes)
    return (
        "<h3>How good it is</h3><div class='scroll'><table class='report'>"
        f"<thead><tr><th scope='col'>figure</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>{said}"
    )


def _value(value: Any, form: str) -> str:
    return value if isinstance(value, str) else figure(value, form)


def _plot(validations: dict[str, list[dict[str, Any]]], by: str) -> str:
    curves = [
        Curve(name, [(row[by], row["valid_loss"]) for row in rows if _is_number(row.get(by))], colour)
        for (name, rows), colour in zip(validations.items(), COLOURS, strict=False)
    ]
    return curves_html(curves, x_title=by, y_title="validation loss")


_CSS = """
.hint { color: var(--body-text-color-subdued); font-size: .9rem; margin: .2rem 0 .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; color: var(--body-text-color); font-size: .94rem; }
th, td { padding: .4rem .6rem; text-align: left; border-bottom: 1px solid var(--border-color-primary);
  vertical-align: top; }
thead th { color: var(--body-text-color-subdued); font-weight: 600; font-size: .82rem; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8.5rem; }
.runs .c4, .runs .c5, .runs .c6, .runs .c7, .report td { text-align: right; font-variant-numeric: tabular-nums; }
.report thead th + th { text-align: right; }
.runs td { white-space: nowrap; }
.runs td.c3, .problem { white-space: normal !important; overflow-wrap: anywhere; }
.runs input { all: revert; width: 1.05rem; height: 1.05rem; margin: .2rem 0 0; cursor: pointer;
  accent-color: var(--primary-500); }
.runs tr:has(input:checked) { background: var(--background-fill-secondary); }
small { display: block; font-weight: 400; color: var(--body-text-color-subdued); font-size: .8rem; }
.problem { color: var(--error-text-color, #dc2626) !important; }
h3 { margin: .4rem 0; font-size: 1rem; font-weight: 600; color: var(--body-text-color); }
.ask { margin: .3rem 0; color: var(--body-text-color); overflow-wrap: anywhere; }
@media (max-width: 640px) {
  .runs .c2, .runs .c3, .runs .c4, .runs .c6 { display: none; }
  th, td { padding: .35rem .35rem; }
}
"""
