"""Perplexity: how well a model predicts a text: the figures of `lm eval`, and a map of the surprising tokens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lm.comparison import comparison_html
from lm.comparison.result import Comparison
from lm.corpora import open_text
from lm.corpora.text import decode_file
from lm.evaluation.report import Report
from lm.html_parts import escape
from lm.html_parts.token_marks import SURPRISE_SCALE, Mark, marks_html, scale_html, score_note, surprise_strength
from lm.runs.card import MEANINGS, figure, figures_of
from lm.runs.run import Run
from serve.http_errors import RequestError
from serve.page import token_marks
from serve.page.assets import read_asset
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.comparisons import ComparisonPart, compare_runs
from serve.page.context import Page
from serve.page.controls import model_picker
from serve.page.line_chart import ChartLine, LineChart, chart
from serve.page.messages import attach, page_error
from serve.page.tabs import Tab
from serve.page.text_analysis import TOP, Difference, TextAnalysis, analyze, compare, smoothed, surprising_words
from serve.page.text_generation import longest_text, score
from serve.training_queue import text_suffix

MAX_WORDS = 10
MAX_UNKNOWN_SYMBOLS = 8
"""Unknown symbols that a note lists."""
_FULL_COLOUR_NATS = {True: 3.0, False: 6.0}
"""Difference at which a token (True) or a word (False) has its full colour."""
_WARM, _COOL = "#f97316", "#0ea5e9"

# The server refuses longer texts anyway, and they may exceed the size limit of a request.
_CUT_JS = "(text, ...others) => [text.slice(0, LIMIT), ...others]"

_START = (
    "<p class='hint'>Paste a text or drop a file, and press Measure. Try a page of the training text, a newspaper, or "
    "your own writing. The page shows how well the model predicts the text, and which parts surprise it.</p>"
)


_CONVERSATIONS = (
    "This file holds conversations. Measure takes them as one text: all tokens count, questions and answers alike. The "
    "figures of a training on conversations are of the answers alone: see Measure side by side in the tab Compare."
)


def build(page: Page) -> None:
    """Add the components and handlers."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            paper = gr.Textbox(
                label="Text to measure", lines=11, max_lines=16, elem_classes=["paper", STORED_CLASS],
                elem_id="measured-text", placeholder="Paste a text here, or drop a file.",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            first = model_picker(page, "measure-model")
            two = gr.Checkbox(False, label="Compare with a second model", elem_id="measure-two")
            second = model_picker(page, "measure-other", label="Second model", rank=1, visible=False)
            dropped = gr.File(label="Or drop a text file", height=150, elem_id="measure-file")
            go = gr.Button("Measure", variant="primary", elem_id="measure")
    store(page, "measured-text", paper)
    report: dict[str, Any] = {"css_template": read_asset("perplexity.css"), "apply_default_css": False}
    note = gr.HTML(_START, elem_id="measure-note", **report)
    with gr.Column(visible=False) as results:
        compared = ComparisonPart(visible=False, elem_id="measure-comparison")
        verdict = gr.HTML("", elem_id="measure-verdict", **report)
        which = gr.Radio([], show_label=False, container=False, visible=False, elem_id="measure-map-choice")
        scale = gr.HTML("", elem_id="measure-scale", css_template=token_marks.SCALE_CSS, apply_default_css=False)
        shown = token_marks.Marks("", elem_id="measure-map")
        plot = LineChart(elem_id="measure-plot")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                figures = gr.HTML("", elem_id="measure-figures", **report)
            with gr.Column(scale=2, min_width=300):
                words = gr.HTML("", elem_id="measure-words", **report)
        details = ComparisonPart(visible=False, elem_id="measure-differences")
    maps: gr.State = gr.State({})

    options = page.options
    limit = longest_text(page)

    async def on_drop(path: str | None) -> AsyncIterator[dict[Any, Any]]:
        if path is None:
            return
        # The next file can be dropped even if this one fails.
        yield {dropped: None}
        text, has_conversations = await asyncio.to_thread(_read_upload, path, int(options.max_upload))
        check_characters(text)
        said = {note: gr.update(value=f"<p class='hint'>{_CONVERSATIONS}</p>", visible=True)}
        yield {paper: text, **(said if has_conversations else {})}

    def check_characters(text: str) -> None:
        if len(text) > limit:
            raise page_error(_too_long(f"{limit:,} characters"))

    async def analysis_of(text: str, name: str | None) -> TextAnalysis:
        started = time.monotonic()
        try:
            scored = await score(page, name, text, top=TOP)
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            raise page_error(_too_long(f"{options.max_prompt_tokens:,} tokens")) from None
        seconds = time.monotonic() - started
        offer = page.models.available_runs.get(scored.model.name)
        run, checkpoint = (Run(offer.folder, offer.checkpoint), offer.checkpoint) if offer else (None, "best")
        return await asyncio.to_thread(
            analyze, scored, run=run, checkpoint=checkpoint, precision=options.precision, seconds=seconds
        )

    async def on_measure(text: str, name: str | None, both: bool, other: str | None) -> AsyncIterator[dict[Any, Any]]:
        check_characters(text)
        if both and name == other:
            raise page_error("Select two different models.")
        analyses, found = [], None
        try:
            for each in (name, other) if both else (name,):
                yield progress(f"Measuring {len(text):,} characters with {each} …")
                analyses.append(await analysis_of(text, each))
            if both:
                async with contextlib.aclosing(compare_runs(page, [str(name), str(other)], text=text)) as updates:
                    async for now in updates:
                        if isinstance(now, str):
                            yield progress(now)
                        else:
                            found = now
        except Exception:
            yield {note: gr.update(visible=False)}
            raise
        update = await asyncio.to_thread(show, analyses, found)
        yield {note: gr.update(visible=False), results: gr.update(visible=True), **update}

    def progress(sentence: str) -> dict[Any, Any]:
        return {note: gr.update(value=f"<p class='hint'>{escape(sentence)}</p>", visible=True)}

    def show(analyses: list[TextAnalysis], found: Comparison | None) -> dict[Any, Any]:
        names = [each.scored.model.name for each in analyses]
        drawn = {name: (SURPRISE_SCALE, _map(each)) for name, each in zip(names, analyses, strict=True)}
        if found is None:
            head = _verdict(analyses[0], names[0])
            parts = [gr.update(value="", visible=False)] * 2
        else:
            head = ""
            shown_parts = (_results(found), comparison_html.details_html(found) + comparison_html.notes_html(found))
            parts = [gr.update(value=part, visible=True) for part in shown_parts]
            legend = f"More surprised: {scale_html(names[1], names[0], 'both')}"
            drawn = {"Difference": (legend, _difference_map(compare(*analyses), analyses, names)), **drawn}
        chosen = next(iter(drawn))
        return {
            figures: figures_html([each.report for each in analyses], names), words: _words_html(analyses, names),
            plot: _plot(analyses, names), verdict: head + _cautions(analyses, names), maps: drawn,
            compared: parts[0], details: parts[1], scale: drawn[chosen][0], shown: drawn[chosen][1],
            which: gr.update(choices=list(drawn), value=chosen, visible=len(drawn) > 1),
        }  # fmt: skip

    async def on_two(is_on: bool) -> Any:
        return gr.update(visible=is_on)

    async def on_map(drawn: dict[str, tuple[str, str]], choice: str) -> Any:
        return drawn.get(choice, gr.skip())

    outputs = [note, results, compared, verdict, which, scale, shown, plot, figures, words, details, maps]
    cut = _CUT_JS.replace("LIMIT", str(limit + 1))
    attach([go.click, paper.submit], on_measure, [paper, first, two, second], outputs, js=cut)
    attach(dropped.upload, on_drop, dropped, [paper, dropped, note])
    attach(two.change, on_two, two, second)
    attach(which.input, on_map, [maps, which], [scale, shown])


def _read_upload(path: str, max_bytes: int) -> tuple[str, bool]:
    """The text of an uploaded file, and whether it holds conversations."""
    name = Path(path).name
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise page_error(f"{name} is too long. The limit of this server is {max_bytes:,} bytes.")
    if text_suffix(name) == ".txt":
        return decode_file(data, name), False
    opened = open_text(path, where=name)
    return "".join(opened.chunks()), opened.conversations is not None


def _too_long(limit: str) -> str:
    return f"The text has more than {limit}, the limit of this server. Measure a part of it."


# -- sentences ----------------------------------------------------------------------------------------


def _verdict(analysis: TextAnalysis, name: str) -> str:
    report = analysis.report
    kind = f" ({escape(report.kind)})" if report.kind else ""
    score = "" if report.bits_per_byte is None else f" scores <b>{report.bits_per_byte:.3f} bits per byte</b> and"
    perplexity = f" (perplexity {report.perplexity:,.1f})" if report.perplexity else ""
    return (
        f"<p class='verdict'><b>{escape(name)}</b>{kind}{score} has an average loss of {report.loss:.2f} nats per "
        f"token{perplexity}. Its first choice was right for {report.accuracy:.0%} of {report.tokens:,} tokens.</p>"
    )


def _results(found: Comparison) -> str:
    """The verdict of two models, the sentence of their difference, and the ranking."""
    parts = (comparison_html.verdict_html, comparison_html.results_html, comparison_html.ranking_html)
    return "".join(part(found) for part in parts)


def _cautions(analyses: Sequence[TextAnalysis], names: Sequence[str]) -> str:
    """Limits of the figures, each with the models that it concerns."""
    lines: dict[str, list[str]] = {}
    for analysis, name in zip(analyses, names, strict=True):
        report, symbols = analysis.report, analysis.unknown_symbols
        cautions = []
        if symbols:
            listed = ", ".join(f"“{symbol}”" + (f" ({count:,}×)" if count > 1 else "")
                               for symbol, count in symbols.most_common(MAX_UNKNOWN_SYMBOLS))  # fmt: skip
            if len(symbols) > MAX_UNKNOWN_SYMBOLS:
                listed += f" and {len(symbols) - MAX_UNKNOWN_SYMBOLS:,} more"
            policy = {"skip": "skipped", "byte": "read as bytes"}.get(
                analysis.scored.model.tokenizer.options.unknown, "read as the unknown token, underlined in the map"
            )
            caution = f"does not know {listed}: {policy}."
            if report.bits_per_byte is not None:
                caution += " Bits per byte and per character include the cost of their spelling; other figures do not."
            cautions.append(caution)
        if report.precision != "fp32":
            cautions.append(f"computes with {report.precision} weights: a setting of this server.")
        if report.remembered and len(analyses) == 1:
            # Of several models, the verdict says so.
            cautions.append(
                f"was trained on about {report.training_overlap or 0:.0%} of this text: the figures show memory, not "
                "prediction of new text."
            )
        if report.misses_floor:
            floor = figure(report.floor_bits_per_byte, ".3f")
            cautions.append(f"is worse than n-gram counts of its training text: they reach {floor} bits per byte.")
        for caution in cautions:
            lines.setdefault(caution, []).append(name)
    tokens = max(len(analysis.ends) for analysis in analyses)
    if tokens > token_marks.MAX_MARKS:
        lines[f"shows the first {token_marks.MAX_MARKS:,} tokens; the figures are of all {tokens:,}."] = ["The map"]
    return "".join(f"<p class='caution'>{escape(' and '.join(who) + ' ' + what)}</p>" for what, who in lines.items())


# -- maps ---------------------------------------------------------------------------------------------


def _map(analysis: TextAnalysis) -> str:
    """A mark a token."""
    model = analysis.scored.model

    def marks() -> Iterator[Mark]:
        for text, token_score in zip(analysis.parts(token_marks.MAX_MARKS), analysis.scored.scores, strict=False):
            is_unknown = token_score.token == model.tokenizer.unknown_id
            note = score_note(token_score, model.tokens.text)
            note = f"outside the vocabulary, read as {note}" if is_unknown else note
            yield Mark(text, surprise_strength(token_score.logprob), note, unknown=is_unknown)

    return marks_html(marks())


def _difference_map(difference: Difference, analyses: Sequence[TextAnalysis], names: Sequence[str]) -> str:
    """A mark a token, or a word; orange where the first model was more surprised."""
    text = analyses[0].scored.text
    full = _FULL_COLOUR_NATS[difference.by_token]
    bounds = difference.bounds.tolist()

    def marks() -> Iterator[Mark]:
        for index, nats in enumerate(difference.nats[: token_marks.MAX_MARKS].tolist()):
            excess = nats[0] - nats[1]
            note = ", ".join(f"{name} {value:.2f} nats" for name, value in zip(names, nats, strict=True))
            is_unknown = difference.by_token and any(
                each.scored.tokens[index] == each.scored.model.tokenizer.unknown_id for each in analyses
            )
            part, tone = text[bounds[index] : bounds[index + 1]], "surprise" if excess > 0 else "less"
            yield Mark(part, abs(excess) / full, note, tone, unknown=is_unknown)

    return marks_html(marks())


def _plot(analyses: Sequence[TextAnalysis], names: Sequence[str]) -> dict[str, Any] | None:
    lines = [
        ChartLine(name, *smoothed(analysis.cumulative), colour)
        for analysis, name, colour in zip(analyses, names, (_WARM, _COOL), strict=False)
    ]
    return chart(lines, x_title="character of the text", y_title="nats per character, smoothed", file="perplexity")


# -- tables -------------------------------------------------------------------------------------------


def figures_html(reports: Sequence[Report], names: Sequence[str]) -> str:
    """The figures of `lm eval`, each with its denominator and meaning."""
    rows = []
    for field, (name, unit, form) in figures_of([report.model_dump() for report in reports]).items():
        meaning, denominator = MEANINGS[field]
        cells = ""
        for report in reports:
            count = getattr(report, denominator)
            if field == "perplexity_without_unknown":
                count -= report.unknown_tokens
            over = f"of {count:,} {denominator.removesuffix('s') if count == 1 else denominator}"
            if field == "loss":
                over = f"± {report.standard_error:.4f}, {over}"
            cells += _cell(figure(getattr(report, field), f",{form}"), over)
        rows.append(_row(f"{name}, {unit}" if field == "loss" else name, meaning, cells))
    if any(report.floor_bits_per_byte is not None for report in reports):
        cells = "".join(
            _cell(figure(report.floor_bits_per_byte, ".4f"), f"{figure(report.floor_loss, '.4f')} nats per token")
            for report in reports
        )
        meaning = "Score of n-gram counts of the training text. A useful model is below it."
        rows.append(_row("floor, bits per byte", meaning, cells))
    cells = "".join(_cell(f"{report.unknown_tokens:,}", f"{report.unknown_rate:.2%}") for report in reports)
    rows.append(_row("unknown tokens", "Symbols outside the vocabulary.", cells))
    rules = "".join(
        f"<p class='caution'>Context of {escape(name)}: {escape(report.context)}.</p>"
        for name, report in zip(names, reports, strict=True)
    )
    return _table("figures", ["Figure", *names], rows) + rules


def _words_html(analyses: Sequence[TextAnalysis], names: Sequence[str]) -> str:
    rows = [
        f"<tr><th scope='row'>{escape(_shorten(word.text))}</th><td>{word.line:,}</td>"
        + "".join(f"<td>{nats:.1f}</td>" for nats in word.nats) + "</tr>"
        for word in surprising_words(analyses, MAX_WORDS)
    ]  # fmt: skip
    return _table("figures words", ["Most surprising words", "line", *(names if len(names) > 1 else ["nats"])], rows)


def _table(classes: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th scope='col'>{escape(head)}</th>" for head in heads)
    return f"<table class='{classes}'><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(name: str, meaning: str, cells: str) -> str:
    return f"<tr><th scope='row'>{escape(name)}<small>{escape(meaning)}</small></th>{cells}</tr>"


def _cell(value: str, detail: str) -> str:
    return f"<td>{value}<small>{detail}</small></td>"


def _shorten(word: str, limit: int = 28) -> str:
    return word if len(word) <= limit else word[: limit - 1] + "…"


TAB = Tab("Perplexity", 30, build)
