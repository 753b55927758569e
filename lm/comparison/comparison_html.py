"""A comparison as HTML: verdict, table, intervals, places and passages.

`page` is a whole page without external files. The web page of `lm serve` shows its parts: `verdict_html`,
`results_html`, `ranking_html`, `details_html` and `notes_html`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from lm.comparison.result import Comparison, Difference, Passage, Place
from lm.comparison.sentences import counted, size_of
from lm.html_parts.page import whole_page
from lm.version import __version__

COLORS = ("var(--a)", "var(--b)")
"""Of the first and the second of a pair; from Okabe and Ito's palette, for colour-blind readers."""
FULL_BITS = 8.0
"""Difference of a word that has the full colour."""
LEAST_SHARE = 0.06
"""Of the full colour: a smaller difference has none."""
WIDTH, ROW = 420, 22
"""Of a picture of intervals, in pixels."""

STYLE = """
th.text { text-align: left; }
.verdict { font-size: 1.1rem; font-weight: 600; color: var(--ink); border-left: .35rem solid #009e73;
  padding: .3rem .8rem; background: var(--band); max-width: none; }
.verdict.no { border-color: #d55e00; }
ul { color: var(--soft); max-width: 80ch; padding-left: 1.2rem; }
p.result { color: var(--ink); font-weight: 600; font-size: 1.05rem; }
td.group { font-weight: 600; padding-top: .8rem; }
td svg { width: 420px; height: 22px; display: block; }
.passages { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1.5rem; }
.passage { border: 1px solid var(--line); border-radius: 4px; padding: .5rem .8rem; margin: .5rem 0; }
.passage pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace;
  margin: .3rem 0 0; }
.passage small { color: var(--soft); }
.passage b { font-weight: inherit; border-radius: 2px; }
summary { cursor: pointer; font-weight: 600; font-size: 1.05rem; margin-top: 1.5rem; }
.zero { stroke: var(--soft); } .span { stroke-width: 3; }
"""
"""Of the parts; it needs the colours `--a`, `--b`, `--ink`, `--soft`, `--line` and `--band`."""
_COLOR_STYLE = """
:root { --a: #0072b2; --b: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --a: #56b4e9; --b: #e69f00; } }
"""


def page(found: Comparison) -> str:
    """The whole page."""
    names = ", ".join(each.name for each in found.candidates)
    split = "" if found.split == "text" else f", split {escape(found.split)}"
    body = f"""<h1>{escape(names)}</h1>
<p>Compared on {escape(found.text)}{split}: {size_of(found)}, sha256 <code>{found.text_sha256[:12]}</code>.
Inkling {__version__}.</p>
{verdict_html(found)}
<h2>Ranking</h2>
{ranking_html(found)}
{details_html(found)}
<h2>Notes</h2>
{notes_html(found)}"""
    return whole_page(f"Compared: {names}", body, _COLOR_STYLE + STYLE)


def verdict_html(found: Comparison) -> str:
    """The verdict, its reasons and its cautions."""
    reasons = [*found.verdict.problems[1:], *found.verdict.cautions]
    return (
        f'<p class="verdict{"" if found.verdict.comparable else " no"}">{escape(found.verdict.sentence)}</p>'
        f"{_list([each.sentence for each in reasons])}"
    )


def results_html(found: Comparison) -> str:
    """The sentence of each difference."""
    return "".join(f'<p class="result">{escape(each.sentence)}</p>' for each in found.differences)


def ranking_html(found: Comparison) -> str:
    """The candidates with their figures, best first."""
    return f"<p>{escape(found.figure[0].upper() + found.figure[1:])}; lower is better.</p>{_ranking(found)}"


def details_html(found: Comparison) -> str:
    """Each difference with its interval, places and passages; the first one is open."""
    known = [each.name for each in found.candidates if each.bits_per_byte is not None]
    return "".join(
        _details(found, difference, known, is_open=index == 0) for index, difference in enumerate(found.differences)
    )


def notes_html(found: Comparison) -> str:
    """What was left out, and other facts."""
    return _list(found.notes)


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _ranking(found: Comparison) -> str:
    rows = []
    for each in found.candidates:
        runs = "" if len(each.runs) == 1 else f"<br><small>{escape(', '.join(each.runs))}</small>"
        rows.append(
            f"<tr><td>{escape(each.name)}{runs}</td><td>{_number(each.bits_per_byte, '.4f')}</td>"
            f"<td>{'' if each.seed_spread is None else f'± {each.seed_spread:.4f}'}</td>"
            f"<td>{_number(each.spelling_bits_per_byte, '.4f')}</td><td>{each.parameters:,}</td>"
            f'<td class="text">{escape(each.tokenizer)}</td><td class="text">{escape(each.context)}</td></tr>'
        )
    heads = ("Run", "Bits per byte", "Spread of seeds", "Of it spelling", "Parameters", "Tokens", "Context")
    return _table(heads, rows)


_TEXTS = ("Tokens", "Context")
"""Columns of text, aligned left."""


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th{' class=text' if name in _TEXTS else ''}>{escape(name)}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _details(found: Comparison, difference: Difference, known: Sequence[str], *, is_open: bool) -> str:
    interval = f"The text has {counted(difference.blocks, 'block')}, too few for an interval."
    if difference.low is not None and difference.high is not None:
        interval = (
            f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}: paired block bootstrap, "
            f"{found.resamples:,} resamples of {difference.blocks} blocks of about {difference.block_bytes:,.0f} bytes."
        )
    if difference.seed_standard_error is not None:
        interval += f" Standard error across seeds: {difference.seed_standard_error:.4f}."
    return f"""<details{" open" if is_open else ""}><summary>{escape(difference.a)} and {escape(difference.b)}</summary>
<p class="result">{escape(difference.sentence)}</p>
<p>{interval}</p>
<h2>Where they differ</h2>
<p>Difference: bits per byte of {escape(difference.b)} less those of {escape(difference.a)}. Left of the line,
{_colored(difference.b, 1)} is better; right of it, {_colored(difference.a, 0)}.</p>
{_places(difference, known)}
<h2>Passages</h2>
<p>A word is coloured by who predicts it better; full colour is {FULL_BITS:.0f} bits.</p>
<div class="passages">
{_won(difference, 0, difference.passages_a)}
{_won(difference, 1, difference.passages_b)}
</div></details>
"""


def _won(difference: Difference, side: int, won: Sequence[Passage]) -> str:
    winner = (difference.a, difference.b)[side]
    return (
        f"<div><h3>{_colored(winner, side)} wins most</h3>{''.join(_passage(each, difference) for each in won)}</div>"
    )


def _colored(name: str, side: int) -> str:
    return f'<span style="color: {COLORS[side]}">{escape(name)}</span>'


def _places(difference: Difference, known: Sequence[str]) -> str:
    a, b = known.index(difference.a), known.index(difference.b)
    most = max((abs(edge) for place in difference.places for edge in _edges(place)), default=1.0) or 1.0
    return _table(
        ("Part of the text", "Bytes", difference.a, difference.b, "Difference", ""),
        [*_place_rows(difference.places, a, b, most)],
    )


def _place_rows(places: Sequence[Place], a: int, b: int, most: float) -> Iterator[str]:
    group = ""
    for place in places:
        if place.group != group:
            group = place.group
            yield f'<tr><td class="group" colspan="6">{escape(group)}</td></tr>'
        margin = "" if place.low is None or place.high is None else f" ± {(place.high - place.low) / 2:.3f}"
        yield (
            f"<tr><td>{escape(place.name)}</td><td>{place.bytes:,}</td><td>{place.bits_per_byte[a]:.3f}</td>"
            f"<td>{place.bits_per_byte[b]:.3f}</td><td>{place.difference:+.3f}{margin}</td>"
            f"<td>{_picture(place, most)}</td></tr>"
        )


def _edges(place: Place) -> tuple[float, ...]:
    return (place.difference, *(edge for edge in (place.low, place.high) if edge is not None))


def _picture(place: Place, most: float) -> str:
    """The difference as a point and its interval as a line, on a scale that all parts share."""

    def x(value: float) -> float:
        return WIDTH / 2 * (1 + 0.96 * value / most)

    color = COLORS[place.difference < 0]
    span = ""
    if place.low is not None and place.high is not None:
        span = (
            f'<line class="span" x1="{x(place.low):.1f}" x2="{x(place.high):.1f}" y1="{ROW / 2}" y2="{ROW / 2}" '
            f'style="stroke: {color}"/>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {ROW}" role="img" aria-label="{place.difference:+.3f}">'
        f'<line class="zero" x1="{WIDTH / 2}" x2="{WIDTH / 2}" y1="0" y2="{ROW}"/>{span}'
        f'<circle cx="{x(place.difference):.1f}" cy="{ROW / 2}" r="4.5" style="fill: {color}"/></svg>'
    )


def _passage(passage: Passage, difference: Difference) -> str:
    words = "".join(_word(word.text, word.bits) for word in passage.words)
    return (
        f'<div class="passage"><small>line {passage.line:,} · {escape(difference.a)} {passage.bits_a:.0f} bits · '
        f"{escape(difference.b)} {passage.bits_b:.0f} bits</small><pre>{words}</pre></div>"
    )


def _word(text: str, bits: float) -> str:
    share = min(1.0, abs(bits) / FULL_BITS)
    if share < LEAST_SHARE:
        return escape(text)
    word = text.lstrip()
    space = text[: len(text) - len(word)]
    color = COLORS[bits < 0]
    return (
        f'{escape(space)}<b style="background: color-mix(in srgb, {color} {70 * share:.0f}%, transparent)" '
        f'title="{bits:+.1f} bits">{escape(word)}</b>'
    )
