"""Perplexity: how well a model reads a text, in the figures of `lm eval` and on a map of what surprised it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lm.corpora import open_text
from lm.corpora.text import decode_file
from lm.evaluation.report import REMEMBERED, Report
from lm.runs.card import figure, figures_of
from lm.runs.run import Run
from serve.http_errors import RequestError
from serve.page.controls import model_picker
from serve.page.curves import CURVES_CSS, Curve, curves_html
from serve.page.drawing import LONGEST_TOKEN, read
from serve.page.keeping import KEPT, keep
from serve.page.marks import (
    MOST_MARKS,
    SCALE_CSS,
    Mark,
    Marks,
    marks_html,
    scale_html,
    score_note,
    surprise_strength,
)
from serve.page.site import QUIET, Page, refusal, safe, told
from serve.page.surprise import TOP, Difference, Study, compare, smoothed, study, surprising_words
from serve.training_queue import text_suffix

MOST_WORDS = 10
MOST_NAMED = 8
"""Unknown symbols."""
_STRONG = {True: 3.0, False: 6.0}
"""Nats of difference at which a token, or else a word, has its full colour."""
_WARM, _COOL = "#f97316", "#0ea5e9"

# Longer texts are refused in any case, and would be too much for a request.
_CUT = "(text, ...others) => [text.slice(0, MOST), ...others]"

MEANINGS = {
    "loss": "How surprised the model was by a token, on average. Less is better.",
    "perplexity_without_unknown": "The same without the tokens that stand for unknown symbols.",
    "perplexity": "It wavered as if between so many tokens. Compare only models that cut text into the same tokens.",
    "word_perplexity": "The same for a whole word, whatever the tokens.",
    "bits_per_char": "Bits it would need to write down a character.",
    "bits_per_byte": "Bits it would need for a byte of the file: fair between all models.",
    "token_bits_per_byte": "The same where unknown words and the white space between words cost nothing.",
    "accuracy": "How often the next token was its first choice.",
    "top5_accuracy": "How often it was among its first five.",
}
_OVER = {
    "loss": ("tokens", "token"), "perplexity": ("tokens", "token"), "word_perplexity": ("words", "word"),
    "bits_per_char": ("characters", "character"), "bits_per_byte": ("bytes", "byte"),
    "token_bits_per_byte": ("bytes", "byte"), "perplexity_without_unknown": ("tokens", "token"),
    "accuracy": ("tokens", "token"), "top5_accuracy": ("tokens", "token"),
}  # fmt: skip
_NOTHING = (
    "<p class='hint'>Paste a text or drop a file, and press Measure: a page of a book that the model learned from, a "
    "newspaper, your own writing. You will see how well the model expects it, and where it is taken by surprise.</p>"
)


def build(page: Page) -> None:
    """The tab."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            paper = gr.Textbox(
                label="Text to read", lines=11, max_lines=16, elem_classes=["paper", KEPT],
                elem_id="measured-text",
                placeholder="Paste a text here, or drop a file beside.",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            first = model_picker(page, "measure-model")
            two = gr.Checkbox(False, label="Compare with a second model", elem_id="measure-two")
            second = model_picker(page, "measure-other", label="Second model", place=1, visible=False)
            dropped = gr.File(label="Or drop a text file", height=150, elem_id="measure-file")
            go = gr.Button("Measure", variant="primary", elem_id="measure")
    keep(page, "measured-text", paper)
    note = gr.HTML(_NOTHING, elem_id="measure-note", css_template=_REPORT_CSS, apply_default_css=False)
    with gr.Column(visible=False) as results:
        verdict = gr.HTML("", elem_id="measure-verdict", css_template=_REPORT_CSS, apply_default_css=False)
        which = gr.Radio([], show_label=False, container=False, visible=False, elem_id="measure-map-choice")
        scale = gr.HTML("", elem_id="measure-scale", css_template=SCALE_CSS, apply_default_css=False)
        shown = Marks("", elem_id="measure-map")
        plot = gr.HTML("", css_template=CURVES_CSS, apply_default_css=False, elem_id="measure-plot")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                figures = gr.HTML("", elem_id="measure-figures", css_template=_REPORT_CSS, apply_default_css=False)
            with gr.Column(scale=2, min_width=300):
                words = gr.HTML("", elem_id="measure-words", css_template=_REPORT_CSS, apply_default_css=False)
    maps: gr.State = gr.State({})

    options = page.options
    # What the page sends is no file but the body of a request.
    most = min(LONGEST_TOKEN * options.max_prompt_tokens, int(options.max_body) // 4)

    async def on_drop(path: str | None) -> AsyncIterator[dict[Any, Any]]:
        if path is None:
            return
        # Another file can be dropped, whatever becomes of this one.
        yield {dropped: None}
        text = await asyncio.to_thread(_text_of, path, int(options.max_upload))
        check_characters(text)
        yield {paper: text}

    def check_characters(text: str) -> None:
        if len(text) > most:
            raise refusal(_too_long(f"has more than {most:,} characters"))

    async def studied(text: str, name: str | None) -> Study:
        begun = time.monotonic()
        try:
            reading = await read(page, name, text, top=TOP)
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            raise refusal(_too_long(f"has more than {options.max_prompt_tokens:,} tokens")) from None
        seconds = time.monotonic() - begun
        offer = page.models.available_runs.get(reading.model.name)
        return await asyncio.to_thread(
            study,
            reading,
            run=Run(offer.folder, offer.state) if offer else None,
            state=offer.state if offer else "best",
            precision=options.precision,
            seconds=seconds,
        )

    async def on_measure(text: str, name: str | None, both: bool, other: str | None) -> AsyncIterator[dict[Any, Any]]:
        check_characters(text)
        studies = []
        for each in (name, other) if both else (name,):
            now = f"<p class='hint'>Reading {len(text):,} characters with {safe(str(each))} …</p>"
            yield {note: gr.update(value=now, visible=True)}
            try:
                studies.append(await studied(text, each))
            except Exception:
                yield {note: gr.update(visible=False)}
                raise
        yield {
            note: gr.update(visible=False),
            results: gr.update(visible=True),
            **await asyncio.to_thread(view, studies),
        }

    def view(studies: list[Study]) -> dict[Any, Any]:
        names = _names(studies)
        own = {name: (_SCALE, _map(each)) for name, each in zip(names, studies, strict=True)}
        news: dict[Any, Any] = {
            figures: figures_html([each.report for each in studies], names),
            words: _words_html(studies, names),
            plot: _plot(studies, names),
        }
        if len(studies) == 1:
            drawn = own
            head = _verdict(studies[0], names[0])
        else:
            difference = compare(*studies)
            both = f"More surprised: {scale_html(names[1], names[0], 'both')}"
            drawn = {"Difference": (both, _difference_map(difference, studies, names)), **own}
            head = _comparison(difference, [each.report for each in studies], names)
        chosen = next(iter(drawn))
        return news | {
            verdict: head + _cautions(studies, names), maps: drawn, scale: drawn[chosen][0], shown: drawn[chosen][1],
            which: gr.update(choices=list(drawn), value=chosen, visible=len(drawn) > 1),
        }  # fmt: skip

    async def on_choice(drawn: dict[str, tuple[str, str]], choice: str) -> Any:
        return drawn.get(choice, gr.skip())

    outputs = [note, results, verdict, which, scale, shown, plot, figures, words, maps]
    gr.on(
        [go.click, paper.submit], told(on_measure), [paper, first, two, second], outputs,
        js=_CUT.replace("MOST", str(most + 1)), **QUIET,
    )  # fmt: skip
    dropped.upload(told(on_drop), dropped, [paper, dropped], **QUIET)
    two.change(lambda on: gr.update(visible=on), two, second, **QUIET)
    which.input(told(on_choice), [maps, which], [scale, shown], **QUIET)


def _text_of(path: str, most_bytes: int) -> str:
    """The text of an uploaded file."""
    shown = Path(path).name
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise refusal(f"{shown} is longer than the {most_bytes:,} bytes that this server takes.")
    if text_suffix(shown) == ".txt":
        return decode_file(data, shown)
    return "".join(open_text(path, where=shown).chunks())


def _too_long(what: str) -> str:
    return f"The text {what}, and this server reads no more at once: measure a part of it."


def _names(studies: Sequence[Study]) -> list[str]:
    names = [each.name for each in studies]
    return names if len(set(names)) == len(names) else [f"{name} ({number})" for number, name in enumerate(names, 1)]


# -- sentences ----------------------------------------------------------------------------------------


def _verdict(known: Study, name: str) -> str:
    report = known.report
    kind = f" ({safe(report.kind)})" if report.kind else ""
    wavered = f", as if it wavered between {report.perplexity:,.1f} equally likely ones" if report.perplexity else ""
    at = "" if report.bits_per_byte is None else f" at <b>{report.bits_per_byte:.3f} bits per byte</b>"
    return (
        f"<p class='verdict'><b>{safe(name)}</b>{kind} reads this text{at}. "
        f"Of {report.tokens:,} tokens it had {report.accuracy:.0%} as its first choice; on average it "
        f"gave the next one {report.loss:.2f} nats of surprise{wavered}.</p>"
    )


def _comparison(difference: Difference, reports: Sequence[Report], names: Sequence[str]) -> str:
    bits = [report.bits_per_byte for report in reports]
    if None in bits:
        left_out = safe(names[bits.index(None)])
        return (
            f"<p class='verdict'>These two cannot be compared: <b>{left_out}</b> leaves symbols out that it does not "
            "know, so that its tokens do not determine the text.</p>"
        )
    (least, better), (most, worse) = sorted((each, number) for number, each in enumerate(bits) if each is not None)
    if most - least < 5e-5:
        return f"<p class='verdict'>Both read this text equally well, at <b>{least:.3f} bits per byte</b>.</p>"
    chance = (
        " On a text of this length a difference so small may be chance: measure a longer one."
        if difference.may_be_chance else ""
    )  # fmt: skip
    return (
        f"<p class='verdict'><b>{safe(names[better])}</b> read this text better, by <b>{most - least:.3f} bits per "
        f"byte</b>: {least:.3f} against {most:.3f} of {safe(names[worse])}, {1 - least / most:.0%} less.{chance}</p>"
    )


def _cautions(studies: Sequence[Study], names: Sequence[str]) -> str:
    """What to know before believing the figures."""
    lines: dict[str, list[str]] = {}
    for known, name in zip(studies, names, strict=True):
        if known.strange:
            listed = ", ".join(f"“{symbol}”" + (f" ({count:,}×)" if count > 1 else "")
                               for symbol, count in known.strange.most_common(MOST_NAMED))  # fmt: skip
            if len(known.strange) > MOST_NAMED:
                listed += f" and {len(known.strange) - MOST_NAMED:,} more"
            done = {"skip": "left out", "byte": "read as bytes"}.get(
                known.reading.model.tokenizer.options.unknown, "read as the unknown token, underlined in the map"
            )
            told_so = f"never saw {listed}: {done}."
            if known.report.bits_per_byte is not None:
                told_so += " Bits per byte and per character include what their spelling costs; other figures do not."
            lines.setdefault(told_so, []).append(name)
        if known.report.precision != "fp32":
            told_so = f"computes with {known.report.precision} weights, as this server was told to."
            lines.setdefault(told_so, []).append(name)
        if known.report.remembered:
            told_so = (
                f"learned from about {100 * (known.report.training_overlap or 0):.0f} % of this text: it {REMEMBERED}"
            )
            lines.setdefault(told_so, []).append(name)
        if known.report.misses_floor:
            reached = figure(known.report.floor_bits_per_byte, ".3f")
            told_so = f"does not beat the floor: n-gram counts of its training text reach {reached} bits per byte."
            lines.setdefault(told_so, []).append(name)
    parts = max(len(known.ends) for known in studies)
    if parts > MOST_MARKS:
        lines[f"shows the first {MOST_MARKS:,} tokens; the figures are of all {parts:,}."] = ["The map"]
    return "".join(f"<p class='caution'>{safe(' and '.join(who) + ' ' + what)}</p>" for what, who in lines.items())


# -- maps ---------------------------------------------------------------------------------------------


_SCALE = scale_html("expected", "surprising (1 in 400)")


def _map(known: Study) -> str:
    """A mark a token."""
    model = known.reading.model
    unknown = model.tokenizer.unknown_id

    def marks() -> Iterator[Mark]:
        for text, score in zip(known.parts(MOST_MARKS), known.reading.scores, strict=False):
            strange = score.token == unknown
            note = score_note(score, model.tokens.text)
            yield Mark(
                text, surprise_strength(score.logprob), f"never seen: read as {note}" if strange else note,
                unknown=strange,
            )  # fmt: skip

    return marks_html(marks())


def _difference_map(difference: Difference, studies: Sequence[Study], names: Sequence[str]) -> str:
    """A mark a token, or a word; warm where the first model was more surprised."""
    text = studies[0].reading.text
    strong = _STRONG[difference.by_token]
    bounds = difference.bounds.tolist()
    unknown = [each.reading.model.tokenizer.unknown_id for each in studies]

    def marks() -> Iterator[Mark]:
        for place, (nats, more) in enumerate(
            zip(difference.nats[:MOST_MARKS].tolist(), difference.more[:MOST_MARKS].tolist(), strict=True)
        ):
            told_nats = ", ".join(f"{name} {value:.2f} nats" for name, value in zip(names, nats, strict=True))
            strange = difference.by_token and any(
                each.reading.tokens[place] == token for each, token in zip(studies, unknown, strict=True)
            )
            yield Mark(
                text[bounds[place] : bounds[place + 1]], abs(more) / strong, told_nats,
                "surprise" if more > 0 else "less", unknown=strange,
            )  # fmt: skip

    return marks_html(marks())


def _plot(studies: Sequence[Study], names: Sequence[str]) -> str:
    curves = [
        Curve(name, list(zip(*smoothed(known.running), strict=True)), colour)
        for known, name, colour in zip(studies, names, (_WARM, _COOL), strict=False)
    ]
    return curves_html(curves, x_title="character of the text", y_title="nats per character, smoothed")


# -- tables -------------------------------------------------------------------------------------------


def figures_html(reports: Sequence[Report], names: Sequence[str]) -> str:
    """The figures of `lm eval`, each with its denominator and what it means."""
    head = "".join(f"<th scope='col'>{safe(name)}</th>" for name in names)
    rows = []
    for field, (name, unit, form) in figures_of([report.model_dump() for report in reports]).items():
        plural, single = _OVER[field]
        cells = ""
        for report in reports:
            count = getattr(report, plural)
            if field == "perplexity_without_unknown":
                count -= report.unknown_tokens
            over = f"of {count:,} {single if count == 1 else plural}"
            if field == "loss":
                over = f"± {report.standard_error:.4f}, {over}"
            cells += f"<td>{figure(getattr(report, field), f',{form}')}<small>{over}</small></td>"
        title = f"{name}, {unit}" if field == "loss" else name
        rows.append(_row(title, MEANINGS[field], cells))
    if any(report.floor_bits_per_byte is not None for report in reports):
        cells = "".join(
            f"<td>{figure(report.floor_bits_per_byte, '.4f')}<small>{figure(report.floor_loss, '.4f')} nats of a token"
            "</small></td>"
            for report in reports
        )
        rows.append(_row("floor, bits per byte", "What counting n-grams of its training text reaches: a model must "
                         "be below it to be worth its time.", cells))  # fmt: skip
    cells = "".join(f"<td>{report.unknown_tokens:,}<small>{report.unknown_rate:.2%}</small></td>" for report in reports)
    rows.append(_row("unknown tokens", "Symbols that the model never saw while it learned.", cells))
    rules = "".join(
        f"<p class='caution'>{safe(name)} looked back on {safe(report.context)}.</p>"
        for name, report in zip(names, reports, strict=True)
    )
    return (
        f"<table class='figures'><thead><tr><th scope='col'>Figure</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{rules}"
    )


def _row(name: str, meaning: str, cells: str) -> str:
    return f"<tr><th scope='row'>{safe(name)}<small>{safe(meaning)}</small></th>{cells}</tr>"


def _words_html(studies: Sequence[Study], names: Sequence[str]) -> str:
    head = "".join(f"<th scope='col'>{safe(name) if len(names) > 1 else 'nats'}</th>" for name in names)
    rows = "".join(
        f"<tr><th scope='row'>{safe(_short(word.text))}</th><td>{word.line:,}</td>"
        + "".join(f"<td>{nats:.1f}</td>" for nats in word.nats) + "</tr>"
        for word in surprising_words(studies, MOST_WORDS)
    )  # fmt: skip
    return (
        "<table class='figures words'><thead><tr><th scope='col'>Most surprising words</th>"
        f"<th scope='col'>line</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _short(word: str, most: int = 28) -> str:
    return word if len(word) <= most else word[: most - 1] + "…"


_REPORT_CSS = """
.hint, .caution { color: var(--body-text-color-subdued); margin: .2rem 0; font-size: .95rem; overflow-wrap: anywhere; }
.verdict { font-size: 1.08rem; line-height: 1.5; margin: .4rem 0; overflow-wrap: anywhere; }
.verdict, .figures { color: var(--body-text-color); }
.figures { width: 100%; border-collapse: collapse; font-size: .95rem; table-layout: fixed; }
.figures th:first-child { width: 48%; }
.words th:nth-child(2) { width: 3rem; }
.figures th { text-align: left; font-weight: 600; vertical-align: top; padding: .45rem .6rem .45rem 0;
  overflow-wrap: break-word; }
.figures thead th { font-size: .88em; }
.figures td, .figures thead th + th { text-align: right; vertical-align: top; padding: .45rem 0 .45rem .6rem;
  font-variant-numeric: tabular-nums; }
.figures tr { border-top: 1px solid var(--border-color-primary); }
.figures thead tr { border-top: 0; color: var(--body-text-color-subdued); }
.figures small { display: block; font-weight: 400; font-size: .84em; color: var(--body-text-color-subdued); }
.words tbody th { font-family: Georgia, "Times New Roman", serif; font-weight: 400; }
@media (max-width: 600px) {
  .figures { font-size: .85rem; }
  .figures th:first-child { width: 40%; }
}
.words td, .words tbody th { padding-top: .3rem; padding-bottom: .3rem; }
"""
