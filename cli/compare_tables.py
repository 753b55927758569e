"""A comparison in the terminal: verdict, table, differences, places and passages, in 80 columns."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from cli.output import NARROW, wide_table
from cli.terminal import shown
from lm.comparison.sentences import counted, size_of
from lm.runs.card import figure

if TYPE_CHECKING:
    from rich.console import Console

    from lm.comparison.result import Comparison, Difference, Passage, Place

LONGEST_NAME = 16
"""Columns of a run's name in a table of places."""


def print_comparison(screen: Console, found: Comparison, *, passages: int) -> None:
    """Print a comparison.

    Args:
        screen: where.
        found: the comparison.
        passages: of each side.
    """
    style = "bold green" if found.verdict.comparable else "bold red"
    _wrapped(screen, found.verdict.sentence, style=style)
    for finding in found.verdict.problems[1:]:
        _wrapped(screen, finding.sentence, indent="  ", style="red")
    for finding in found.verdict.cautions:
        _wrapped(screen, f"caution: {finding.sentence}", indent="  ", style="yellow")
    split = "" if found.split == "text" else f", split {found.split}"
    screen.print(f"\n[bold]{escape(found.text)}[/bold]{split}: {size_of(found)}", soft_wrap=True)
    _print_ranking(screen, found)
    for difference in found.differences:
        screen.print()
        _wrapped(screen, difference.sentence, style="bold")
        _wrapped(screen, _method(found, difference), indent="  ", style="dim")
    if found.differences:
        main = found.differences[0]
        if len(found.differences) > 1:
            screen.print(f"\n{escape(main.a)} against {escape(main.b)}:", soft_wrap=True)
        _print_places(screen, found, main)
        for winner, won in ((main.a, main.passages_a), (main.b, main.passages_b)):
            _print_passages(screen, winner, won[:passages], main)
    screen.print()
    for note in found.notes:
        _wrapped(screen, f"note: {note}", style="dim")


def _print_ranking(screen: Console, found: Comparison) -> None:
    spelled = any(each.spelling_bits_per_byte for each in found.candidates)
    seeds = any(each.seed_spread is not None for each in found.candidates)
    names = ["bits/byte", *(["spread of seeds"] if seeds else []), *(["of it spelling"] if spelled else [])]
    table = wide_table("run", *names, "parameters", "tokens", left=["tokens"])
    for each in found.candidates:
        cells = [figure(each.bits_per_byte, ".4f")]
        if seeds:
            cells.append("" if each.seed_spread is None else f"± {each.seed_spread:.4f}")
        if spelled:
            cells.append(figure(each.spelling_bits_per_byte, ".4f"))
        table.add_row(*map(_safe, (each.name, *cells, f"{each.parameters:,}", each.tokenizer)))
    screen.print(table)
    _wrapped(screen, f"{found.figure}; lower is better", style="dim")


def _method(found: Comparison, difference: Difference) -> str:
    method = (
        f"95 % interval: {found.resamples:,} resamples of {difference.blocks} blocks of about "
        f"{difference.block_bytes:,.0f} bytes, seed {found.seed}."
    )
    if difference.low is None:
        blocks = counted(difference.blocks, "block")
        method = f"The text is {blocks} of about {difference.block_bytes:,.0f} bytes: too few for an interval."
    if difference.seed_standard_error is not None:
        method += f" Standard error across seeds: {difference.seed_standard_error:.4f}."
    return method


def _print_places(screen: Console, found: Comparison, difference: Difference) -> None:
    known = [each.name for each in found.candidates if each.bits_per_byte is not None]
    pair = [known.index(name) for name in (difference.a, difference.b)]
    table = wide_table("where they differ", "bytes", *map(_short, (difference.a, difference.b)), "difference")
    group = ""
    for place in difference.places:
        if place.group != group:
            group = place.group
            table.add_row(Text(group, style="bold"), "", "", "", "")
        table.add_row(
            f"  {place.name}", f"{place.bytes:,}", *(f"{place.bits_per_byte[each]:.3f}" for each in pair), _gap(place)
        )
    screen.print()
    screen.print(table)
    legend = f"difference: bits per byte of {difference.b} less those of {difference.a}; * not chance"
    _wrapped(screen, legend, style="dim")


def _gap(place: Place) -> str:
    if place.low is None or place.high is None:
        return f"{place.difference:+.3f}        "
    mark = "*" if place.low > 0 or place.high < 0 else " "
    return f"{place.difference:+.3f} ± {(place.high - place.low) / 2:.3f}{mark}"


def _print_passages(screen: Console, winner: str, won: Sequence[Passage], difference: Difference) -> None:
    if not won:
        return
    screen.print(f"\n[bold]{escape(winner)} wins most on:[/bold]", soft_wrap=True)
    for passage in won:
        screen.print(
            f"[dim]line {passage.line:,}: {escape(difference.a)} {passage.bits_a:.0f} bits, "
            f"{escape(difference.b)} {passage.bits_b:.0f} bits[/dim]",
            soft_wrap=True,
        )
        for line in passage.text.strip("\r\n").splitlines():
            _wrapped(screen, line, indent="    ")


def _wrapped(screen: Console, sentence: str, *, indent: str = "", style: str = "") -> None:
    lines = textwrap.wrap(sentence, NARROW - len(indent), break_on_hyphens=False) or [""]
    for line in lines:
        screen.print(Text(indent + shown(line, sys.stdout), style=style), soft_wrap=True)


def _safe(cell: str) -> Text:
    # Brackets in a name are no markup.
    return Text(shown(cell, sys.stdout))


def _short(name: str) -> str:
    return escape(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…")
