"""A run's report as one HTML page: no other file, no network, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.copies import Copies
from lm.evaluation.calibration import Calibration
from lm.evaluation.report import Report
from lm.html_parts import escape, read_style
from lm.html_parts.line_chart import COLOURS, Line, line_chart_html
from lm.html_parts.page import whole_page
from lm.html_parts.token_marks import SURPRISE_SCALE, Mark, marks_html, percent, surprise_strength, visible
from lm.report_page.collect import FromText, RunReport
from lm.runs.card import MEANINGS, figure, figures_of, numbers, origin, source_rows
from lm.version import __version__

MAX_CURVE_POINTS = 300
"""Points of a curve."""
COPIED = 20
"""Characters of a copy that is underlined."""

STYLE = """
:root { --body-text-color: var(--ink); --body-text-color-subdued: var(--soft); --border-color-primary: var(--line);
  --primary-500: #6366f1; --card: #fafbfc; }
@media (prefers-color-scheme: dark) { :root { --card: #1b1e22; } }
body { max-width: 62rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 { font: 600 2rem/1.2 Georgia, "Times New Roman", serif; margin: 0; overflow-wrap: anywhere; }
h2 { font: 600 1.35rem/1.3 Georgia, "Times New Roman", serif; margin: 2.6rem 0 .6rem; }
.lead { font-size: 1.15rem; color: var(--ink); max-width: 60ch; margin: .8rem 0; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0 0; }
.numbers div { flex: 1 1 9rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .7rem 1rem; }
.numbers b { display: block; font: 600 1.7rem/1.2 Georgia, serif; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: .85rem; }
.figures td, .figures th { white-space: normal; vertical-align: top; }
.figures th[scope=row] { text-align: left; color: var(--ink); }
.figures small { display: block; color: var(--soft); font-weight: 400; }
.figures td b { font-variant-numeric: tabular-nums; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem;
  margin: .8rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 1rem/1.6 Georgia, serif; }
.quote { font-family: Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--ink); }
.sample .prompt { color: var(--soft); }
.sample u { text-decoration: underline 2px #f97316; text-underline-offset: 3px; }
.frame { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem; }
.marks .mark { cursor: default; }
.note { border-left: 3px solid #f59e0b; padding-left: .7rem; margin: .5rem 0; }
code { overflow-wrap: anywhere; font-size: .85em; }
details summary { cursor: pointer; color: var(--soft); }
@media print { .marks { max-height: none; } }
"""


def page(report: RunReport) -> str:
    """The whole page."""
    facts = report.facts
    sections = [
        _head(facts, report.main),
        _section("How good it is", _figures(report.reports) + _notes(report.main)),
        _section("How it learned", _curves(report.rows)),
        _section("Are its probabilities right?", _calibration(report.from_text)),
        _section("What it writes", _samples(report)),
        _section("Learned or copied?", _copying(report.from_text)),
        _section("What surprises it", _surprise(report)),
        _section("What it was made from", _corpus(facts)),
    ]
    style = STYLE + read_style("line_chart") + read_style("token_marks") + f".legend-scale {{ {read_style('scale')} }}"
    return whole_page(f"Report of {facts['name']}", "".join(sections), style)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


# -- the first lines -------------------------------------------------------------------------------------


def _head(facts: Mapping[str, Any], report: Report) -> str:
    kind = f", {facts['kind']}" if facts["kind"] else ""
    about = (
        f"A {facts['model']} language model{kind}, with {numbers(dict(facts))} over {facts['vocab_size']:,} "
        f"{facts['tokenizer']} tokens, {origin(facts['imported'], facts['corpus'])}."
    )
    boxes = "".join(
        f"<div><b>{value}</b><span>{escape(meaning)}</span></div>" for value, meaning in _boxes(report) if value != "–"
    )
    return (
        f"<header><h1>{escape(facts['name'])}</h1><p>{escape(about)} Inkling {__version__}.</p>"
        f'<p class="lead">{escape(verdict(report))}</p><div class="numbers">{boxes}</div></header>'
    )


def _boxes(report: Report) -> Iterator[tuple[str, str]]:
    yield figure(report.bits_per_byte, ".3f"), "bits per byte, comparable between all models"
    yield figure(report.perplexity, ",.2f"), "perplexity of a token"
    yield f"{report.accuracy:.0%}", "of the tokens were its first choice"
    yield figure(report.floor_bits_per_byte, ".3f"), "bits per byte of n-gram counts: the floor"


def verdict(report: Report) -> str:
    """The main figure in sentences: what it means, and how it stands to the floor."""
    where = f"the {report.split} split" if report.split != "text" else report.corpus
    if report.bits_per_byte is None:
        sentence = f"On {where} it needs {report.loss:.3f} nats for each token."
    else:
        sentence = (
            f"On {where} it needs {report.bits_per_byte:.3f} bits for each byte: text of 8 bits a byte becomes "
            f"{8 / report.bits_per_byte:.1f} times shorter."
        )
    if report.remembered:
        return f"{sentence} Part of this text is in the training text, so this figure shows memory."
    if report.floor_loss is None:
        return sentence
    gain = report.floor_loss - report.loss
    floor = f"n-gram counts of the training text ({(report.floor or '').partition(' of ')[0]})"
    if report.misses_floor:
        return f"{sentence} That is worse than {floor}, by {-gain:.3f} nats per token."
    if gain <= 0:
        return f"{sentence} That is as good as {floor}."
    return f"{sentence} That is better than {floor}, by {gain:.3f} nats per token."


# -- figures ---------------------------------------------------------------------------------------------


def _figures(reports: Sequence[Report]) -> str:
    rows = []
    for field, (name, unit, form) in figures_of([report.model_dump() for report in reports]).items():
        meaning, denominator = MEANINGS[field]
        cells = []
        for report in reports:
            count = getattr(report, denominator)
            if field == "perplexity_without_unknown":
                count -= report.unknown_tokens
            over = f"± {report.standard_error:.4f}, over" if field == "loss" else "over"
            cells.append(
                f"<td><b>{figure(getattr(report, field), f',{form}')}</b>"
                f"<small>{over} {count:,} {denominator}</small></td>"
            )
        title = f"{name}, {unit}" if field == "loss" else name
        rows.append(f'<tr><th scope="row">{escape(title)}<small>{escape(meaning)}</small></th>{"".join(cells)}</tr>')
    heads = "".join(f"<th>{escape(report.split)}</th>" for report in reports)
    measured = "".join(
        f"<p>{escape(report.split)}: {escape(report.context)}; {escape(report.precision)}; text sha256 "
        f"<code>{report.text_sha256}</code>.</p>"
        + (f"<p><code>{escape(report.signature)}</code></p>" if report.signature else "")
        for report in reports
    )
    return (
        f'<div class="scroll"><table class="figures"><thead><tr><th>Figure</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{measured}"
    )


def _notes(report: Report) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)


# -- curves ----------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        Line(name, thinned(points), colour)
        for name, field, colour in (
            ("training", "train_loss", "#94a3b8"), ("validation", "valid_loss", COLOURS[0]),
        )
        if (points := [(row["step"], row[field]) for row in rows if _is_finite(row.get(field))])
    ]  # fmt: skip
    chart = line_chart_html(lines, x_title="step", y_title="loss, nats per token (lower is better)")
    if not chart:
        return ""
    validations = [(row["step"], row["valid_loss"]) for row in rows if _is_finite(row.get("valid_loss"))]
    sentence = ""
    if validations:
        best, last = min(validations, key=lambda each: each[1]), validations[-1]
        sentence = f"<p>The validation loss was lowest at step {best[0]:,} ({best[1]:.4f}); step {last[0]:,} was last."
        sentence += " The weights of the lowest one are the model.</p>"
    return f'<div class="frame">{chart}</div>{sentence}'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_CURVE_POINTS points, each the mean of its part; the last point stays."""
    size = math.ceil(len(points) / MAX_CURVE_POINTS)
    if size <= 1:
        return list(points)
    parts = [points[begin : begin + size] for begin in range(0, len(points), size)]
    means = [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]
    return [*means[:-1], points[-1]]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# -- texts -----------------------------------------------------------------------------------------------


def _samples(report: RunReport) -> str:
    options = report.sampling
    prompts = [prompt for prompt, _ in report.samples]
    given = "answers to the first held-out questions" if any(prompts) else "without a prompt"
    how = f"Temperature {options['temperature']:g}, seed {options['seed']}, {given}."
    marked, texts = "", [escape(text) for _, text in report.samples]
    if report.from_text is not None and report.from_text.copies is not None:
        found = zip(report.samples, report.from_text.copies, strict=True)
        texts = [_underlined(text, copies) for (_, text), copies in found]
        marked = f" Underlined: {COPIED} characters or more that stand word for word in the training text."
    texts = [
        (f'<span class="prompt">{escape(prompt)}</span>' if prompt else "") + text
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    boxes = "".join(f'<div class="sample">{text}</div>' for text in texts)
    return f"<p>{escape(how)} The same seed gives the same texts.{marked}</p>{boxes}"


def _underlined(text: str, found: Copies) -> str:
    """A text as HTML with its copies underlined."""
    parts, done = [], 0
    for start, end in found.spans(COPIED):
        parts += [escape(text[done:start]), f"<u>{escape(text[start:end])}</u>"]
        done = end
    return "".join([*parts, escape(text[done:])])


def _copying(found: FromText | None) -> str:
    if found is None or found.copying is None:
        return ""
    copying = found.copying
    rows = "".join(
        f"<tr><td>{name}</td><td>{each.texts}</td><td>{each.characters:,}</td><td>{each.longest_run}</td>"
        f"<td>{each.share_20:.1%}</td><td>{each.share_50:.1%}</td></tr>"
        for name, each in (("samples", copying.samples), (f"{copying.split} text", copying.held_out))
    )
    heads = "".join(
        f"<th>{head}</th>" for head in ("", "texts", "characters", "longest run", "in runs of 20", "in runs of 50")
    )
    longest = copying.samples.longest_text
    quoted = (
        f'<p>The longest run: <span class="quote">“{escape(longest.replace(chr(10), "↵"))}”</span></p>'
        if longest
        else ""
    )
    return (
        f"<p>{escape(copying.sentence)}</p>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{quoted}'
    )


def _calibration(found: FromText | None) -> str:
    if found is None:
        return ""
    calibration = found.calibration
    bins = [(each.confidence, each.accuracy) for each in calibration.equal_mass.bins]
    lines = [Line("first choice right", bins), Line("as often as its probability says", [(0, 0), (1, 1)], "#94a3b8")]
    chart = line_chart_html(lines, x_title="probability of the first choice", y_title="share that is right", x_end=1)
    return f'<div class="frame">{chart}</div>' + "".join(
        f"<p>{escape(sentence)}</p>" for sentence in calibration_sentences(calibration)
    )


def calibration_sentences(calibration: Calibration) -> Iterator[str]:
    """What the figures of calibration mean."""
    confidence, accuracy = (
        math.fsum(getattr(each, name) * each.tokens for each in calibration.equal_mass.bins) / calibration.tokens
        for name in ("confidence", "accuracy")
    )
    how = "too sure" if confidence > accuracy else "not sure enough"
    yield (
        f"Its first choices have a probability of {confidence:.1%} in the mean, and {accuracy:.1%} of them are right: "
        + ("they are right as often as it says." if abs(confidence - accuracy) < 0.005 else f"it is {how}.")
        + f" Expected calibration error: {calibration.equal_mass.error:.4f}."
    )
    fitted = calibration.temperature
    if fitted is not None and calibration.loss_at_temperature is not None:
        yield (
            f"Temperature {fitted.value:.3f} gives the lowest loss on the {fitted.text} text. With it, the loss here "
            f"is {calibration.loss_at_temperature:.4f} instead of {calibration.loss:.4f} nats per token."
        )
    yield (
        f"It expects {calibration.expected_loss:.3f} nats per token; the text has {calibration.loss:.3f}."
        + (f" Its own samples have {calibration.samples.entropy:.3f}." if calibration.samples else "")
    )


def _surprise(report: RunReport) -> str:
    if report.from_text is None:
        return "<p>The text was not available when this page was made.</p>"
    tokens = report.from_text.tokens
    marks = (
        Mark(token.text, 0.0, "context, which is not measured") if math.isnan(token.nats)
        else Mark(token.text, surprise_strength(-token.nats),
                  f"“{visible(token.text)}”: {percent(math.exp(-token.nats))} ({token.nats:.2f} nats)")
        for token in tokens
    )  # fmt: skip
    html = marks_html(marks).replace(' tabindex="-1" role="button"', "").replace(' tabindex="0" role="button"', "")
    context = ""
    if any(math.isnan(token.nats) for token in tokens):
        context = "The answers are measured; what stands around them is context. "
    where = report.main.corpus if report.main.split == "text" else f"the {report.main.split} split"
    return (
        f"<p>The first {len(tokens):,} tokens of {escape(where)}. {context}Point at a token to see "
        f'its probability. <span class="legend-scale">{SURPRISE_SCALE}</span></p><div class="frame marks">{html}</div>'
    )


# -- corpus and options ----------------------------------------------------------------------------------


def _corpus(facts: Mapping[str, Any]) -> str:
    if facts["imported"] is not None:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td class='text'>{escape(value)}</td><td class='text'>{escape(note)}</td></tr>"
            for name, value, note in source_rows(facts["imported"])
        )
        return f'<div class="scroll"><table>{rows}</table></div>'
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{part['tokens']:,}</td><td>{part['characters']:,}</td>"
        f'<td class="text"><code>{part["sha256"]}</code></td></tr>'
        for name, part in facts["splits"].items()
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in facts["corpus_notes"])
    options = "".join(
        f"<tr><td>{section}.{escape(name)}</td><td class='text'>{escape(str(value))}</td></tr>"
        for section in ("tokenizer", "model", "training")
        for name, value in facts["options"][section].items()
    )
    return (
        '<div class="scroll"><table><thead><tr><th>Split</th><th>Tokens</th><th>Characters</th><th>sha256</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>{notes}"
        f'<details><summary>All options</summary><div class="scroll"><table>{options}</table></div></details>'
    )
