"""Consoles, tables and progress bars: colour and width follow the terminal, NO_COLOR and pipes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
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


class _Console(Console):
    """One whose terminal gets no control character of a name or a text."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text) if self.is_terminal else text, **options)


def console(*, stderr: bool = False) -> Console:
    """A console for results, or (stderr) for everything that is not the result."""
    made = _Console(stderr=stderr, highlight=False, emoji=False, color_system=None if no_color() else "auto")
    if not made.is_terminal:
        # A pipe has no width: do not fold what a script reads.
        made.width = WIDE
    return made


def no_color() -> bool:
    """Whether the user wants text without colour (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def facts_table(rows: list[tuple[str, str, str]]) -> Table:
    """Name, value, and what it means."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim", overflow="fold")
    for row in rows:
        # What stands in brackets, in an option or a file's name, is no markup.
        table.add_row(*(Text(shown(cell, sys.stdout)) for cell in row))
    return table


def say(sentence: str, *, dim: bool = True) -> None:
    """Print a remark on stderr, dimmed where there is colour."""
    sentence = shown(sentence, sys.stderr)
    typer.echo(typer.style(sentence, dim=True) if dim and not no_color() else sentence, err=True)


def score_lines(tokenizer: Tokenizer, scores: Iterable[Score]) -> list[str]:
    """A line a token: what it shows as, its probability, and what else was likely."""

    def shown(token: int, logprob: float) -> str:
        return f"{tokenizer.pieces([token])[0]} {100 * math.exp(logprob):.2f}%"

    return [
        "  ".join([f"{shown(score.token, score.logprob):<20}", *(shown(*other) for other in score.top)]).rstrip()
        for score in scores
    ]


def print_json(value: Any) -> None:
    """One line of strict JSON on stdout: NaN and infinity, which JSON has not, become null."""
    typer.echo(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reading:
    """A progress bar for text that is read; shows itself at the first news, and goes when it is closed."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description:24}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console(stderr=True), transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take the news that `done` of `total` bytes are through a stage."""
        if not self._bar.console.is_terminal:
            return
        if stage not in self._tasks:
            self._bar.start()
            self._tasks[stage] = self._bar.add_task(stage, total=total or None)
        self._bar.update(self._tasks[stage], completed=done, total=total or None)

    def close(self) -> None:
        """Take the bar off the screen; two live displays at once would erase each other."""
        if self._tasks:
            self._bar.stop()


@contextlib.contextmanager
def reading() -> Iterator[Reading]:
    """A progress bar for text that is read, closed at the end of the block at the latest."""
    bar = Reading()
    try:
        yield bar
    finally:
        bar.close()


@contextlib.contextmanager
def scoring(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for tokens that are scored, or None where nobody watches."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield None
        return
    bar = Progress(
        TextColumn(label), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} tokens"), TimeRemainingColumn(),
        console=screen, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)
