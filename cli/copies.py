"""Copies from the training text: marked in samples, and as a table of `lm eval --copy`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from cli.output import facts_table, no_color, print_sentence, reading, say
from cli.terminal import shown
from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.copies import Copies
    from lm.evaluation.copying import CopiedText, CopyReport
    from lm.runs.run import Run

MIN_COPY = 20
"""Characters of the shortest run that is marked, if none are given."""
_UNDERLINE, _NO_UNDERLINE = "\x1b[4m", "\x1b[24m"
_LEFT, _RIGHT = "[[", "]]"
_SHOWN_CHARACTERS = 60


def check_training_text(run: Run, flag: str) -> None:
    """Refuse a flag that needs the training text, for a run whose training text is unknown.

    Raises:
        ConfigError: the run was imported.
    """
    if not run.record["corpus"]["splits"]:
        raise ConfigError(
            f"Run {run.name!r} was imported, so the text that it learned from is unknown: leave {flag} out."
        )


class CopyMarker:
    """Marks what stands word for word in a run's training text."""

    def __init__(self, run: Run, minimum: int) -> None:
        self._minimum = minimum
        with reading() as watch:
            self._index = run.copy_index(progress=watch)
        styled = sys.stdout.isatty() and not no_color()
        self._marks = (_UNDERLINE, _NO_UNDERLINE) if styled else (_LEFT, _RIGHT)

    def find(self, prompt: str, text: str) -> Copies:
        """The copies in a sample; a run may begin in the prompt."""
        return self._index.find(prompt + text)

    def print_text(self, copies: Copies, prompt: str, text: str, *, echo: bool) -> None:
        """Print a sample: underlined runs on a terminal, runs in double brackets with NO_COLOR and in a pipe."""
        whole, at = prompt + text, 0 if echo else len(prompt)
        left, right = self._marks
        parts = []
        for start, end in copies.spans(self._minimum):
            if end > at:
                parts += [shown(whole[at : max(start, at)], sys.stdout)]
                parts += [left, shown(whole[max(start, at) : end], sys.stdout), right]
                at = end
        parts.append(shown(whole[at:], sys.stdout))
        typer.echo("".join(parts), color=True)

    def facts(self, copies: Copies, prompt: str) -> dict[str, Any]:
        """For --json: positions are those of the text without the prompt."""
        own = copies.around[len(prompt) :]
        spans = [
            [max(start - len(prompt), 0), end - len(prompt)]
            for start, end in copies.spans(self._minimum)
            if end > len(prompt)
        ]
        share = float((own >= self._minimum).mean()) if len(own) else 0.0
        return {"min_copy": self._minimum, "share": share, "longest_run": int(own.max(initial=0)), "spans": spans}

    def print_share(self, copies: Copies, prompt: str) -> None:
        """Print the share and the longest run on stderr."""
        facts = self.facts(copies, prompt)
        say(
            f"{facts['share']:.1%} of the characters stand in verbatim runs of {self._minimum} or more from the "
            f"training text; the longest run has {facts['longest_run']:,}"
        )


def print_copies(screen: Console, report: CopyReport) -> None:
    """Print the figures of the samples and of held-out text."""
    ours, theirs = report.samples, report.held_out
    rows = [("samples", f"{ours.texts:,}", f"{ours.characters:,} characters; {theirs.characters:,} of {report.split}")]
    for name, samples, unit, baseline in (
        ("longest verbatim run", f"{ours.longest_run:,}", "characters", f"{theirs.longest_run:,}"),
        ("in runs of 20 or more", f"{ours.share_20:.1%}", "of the characters", f"{theirs.share_20:.1%}"),
        ("in runs of 50 or more", f"{ours.share_50:.1%}", "of the characters", f"{theirs.share_50:.1%}"),
    ):
        rows.append((name, samples, f"{unit}; {baseline} in held-out text"))
    rows += [("  in a sample", "", _quoted(ours)), ("  in held-out text", "", _quoted(theirs))]
    screen.print()
    screen.print("[bold]Copies from the training text[/bold]")
    screen.print(facts_table(rows))
    print_sentence(screen, report.sentence, "yellow" if report.copies_more else "")


def _quoted(copied: CopiedText) -> str:
    if copied.longest_line is None:
        return "no character stands in the training text"
    text = copied.longest_text
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
    return f"line {copied.longest_line:,}: {cut!r}"
