"""Consoles, tables and progress bars. Colour and width follow the terminal, NO_COLOR and pipes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from cli.terminal import shown, visible

if TYPE_CHECKING:
    from lm.generation.request import Score
    from lm.tokenizers.base import Tokenizer

WIDE = 200
"""Columns of a pipe."""
NARROW = 80
"""Columns that a table of facts uses at most."""


class _Console(Console):
    """A console that sends no control character of a name or a text to a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text) if self.is_terminal else text, **options)


def console(*, stderr: bool = False) -> Console:
    """A console for results, or for everything else (stderr)."""
    made = _Console(stderr=stderr, highlight=False, emoji=False, color_system=None if no_color() else "auto")
    if not made.is_terminal:
        # A pipe has no width: do not fold lines that a script reads.
        made.width = WIDE
    return made


def no_color() -> bool:
    """Whether NO_COLOR is set (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def facts_table(rows: list[tuple[str, str, str]]) -> Table:
    """A table of names, values and notes; long notes wrap so that it fits `NARROW` columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim", overflow="fold")
    left = max((len(name) for name, _, _ in rows), default=0) + max((len(value) for _, value, _ in rows), default=0)
    for name, value, note in rows:
        lines = textwrap.wrap(note, max(NARROW - left - 4, 24), break_on_hyphens=False, break_long_words=False) or [""]
        # Brackets in an option or a file name are no markup.
        table.add_row(*(Text(shown(cell, sys.stdout)) for cell in (name, value, "\n".join(lines))))
    return table


def wide_table(first: str, *others: str, left: Collection[str] = ()) -> Table:
    """A table with a heading: the first column and those in `left` are aligned left."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def print_sentence(screen: Console, sentence: str, style: str = "") -> None:
    """Print a sentence; a terminal breaks it between words, and a pipe gets one line."""
    screen.print(sentence, style=style, markup=False, soft_wrap=not screen.is_terminal)


def say(sentence: str, *, dim: bool = True) -> None:
    """Print a remark on stderr, dimmed where there is colour."""
    sentence = shown(sentence, sys.stderr)
    typer.echo(typer.style(sentence, dim=True) if dim and not no_color() else sentence, err=True)


def score_lines(tokenizer: Tokenizer, scores: Iterable[Score]) -> list[str]:
    """One line for each token: its text, its probability, and the likeliest alternatives."""

    def shown(token: int, logprob: float) -> str:
        return f"{tokenizer.pieces([token])[0]} {100 * math.exp(logprob):.2f}%"

    return [
        "  ".join([f"{shown(score.token, score.logprob):<20}", *(shown(*other) for other in score.top)]).rstrip()
        for score in scores
    ]


def print_json(value: Any) -> None:
    """Print one line of strict JSON on stdout; NaN and infinity become null."""
    typer.echo(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reading:
    """A progress bar for text that is read; it appears at the first call."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description:24}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console(stderr=True), transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a stage are read."""
        if not self._bar.console.is_terminal:
            return
        if stage not in self._tasks:
            self._bar.start()
            self._tasks[stage] = self._bar.add_task(stage, total=total or None)
        self._bar.update(self._tasks[stage], completed=done, total=total or None)

    def close(self) -> None:
        """Remove the bar. Two bars at once would overwrite each other."""
        if self._tasks:
            self._bar.stop()


@contextlib.contextmanager
def reading() -> Iterator[Reading]:
    """A progress bar for text that is read, removed at the end of the block."""
    bar = Reading()
    try:
        yield bar
    finally:
        bar.close()


def token_bar(label: str, screen: Console) -> Progress:
    """A progress bar for tokens that are scored."""
    return Progress(
        TextColumn(label), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} tokens"), TimeRemainingColumn(),
        console=screen, transient=True,
    )  # fmt: skip


@contextlib.contextmanager
def scoring(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for tokens that are scored; None where stderr is no terminal."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield None
        return
    with token_bar(label, screen) as bar:
        task = bar.add_task("", total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)
