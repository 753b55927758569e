"""The progress of a sweep on stderr: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cli.output import console, token_bar
from cli.progress import duration
from lm.jobs.sweep_axes import label
from lm.jobs.sweep_queue import RunProgress
from lm.jobs.sweep_record import ENDED, SweepRecord
from lm.runs.card import figure

PLAIN_SECONDS = 60.0
"""Seconds between lines about the whole queue where there is no terminal."""
STYLES = {"training": "bold", "measuring": "bold", "failed": "red", "waiting": "dim", "finished": "green"}
RESERVED_LINES = 6
"""Of the terminal, for the heading, the summary and the prompt."""


class SweepView:
    """Shows all runs of a sweep: what each does, its progress, its loss so far, the time left.

    Args:
        record: of the sweep.
        jobs: runs at the same time.
    """

    def __init__(self, record: SweepRecord, jobs: int) -> None:
        self._record, self._jobs = record, jobs
        self._screen = console(stderr=True)
        self._live: Live | None = None
        self._scoring: Progress | None = None
        self._scored: str | None = None
        self._stages: dict[str, str] = {}
        self._printed = time.monotonic()

    def __enter__(self) -> SweepView:
        if self._screen.is_terminal:
            self._live = Live(console=self._screen, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def on_score(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` tokens are scored, after the last run."""
        if not self._screen.is_terminal:
            return
        if self._scored != what:
            self._close()
            self._scored, self._scoring = what, token_bar(what, self._screen)
            self._scoring.start()
            self._task = self._scoring.add_task("", total=total)
        if self._scoring is not None:
            self._scoring.update(self._task, completed=done, total=total)

    def _close(self) -> None:
        for shown in (self._live, self._scoring):
            if shown is not None:
                shown.stop()
        self._live = self._scoring = None

    def __call__(self, runs: Sequence[RunProgress]) -> None:
        """Show the runs as they are now."""
        for run in runs:
            self._report_change(run)
        if self._live is not None:
            self._live.update(Group(self._table(runs), Text(self._summary(runs), style="dim")))
        elif time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(self._summary(runs))

    def _report_change(self, run: RunProgress) -> None:
        """Print a line where a run begins or ends."""
        # A run that an earlier sweep ended is no change.
        before = self._stages.get(run.run.run, run.stage if run.stage in ENDED else "waiting")
        self._stages[run.run.run] = run.stage
        if before == run.stage:
            return
        name, bits = run.run.run, figure(run.bits_per_byte, ".4f")
        if run.stage == "training":
            self._print(f"{name}: {self._label(run)}, seed {run.run.seed}")
        elif run.stage == "finished":
            self._print(f"{name}: finished after {duration(run.seconds)}, best validation {bits} bits/byte")
        elif run.stage == "failed":
            self._print(f"{name}: failed. {run.run.sentence}")
        elif run.stage == "stopped":
            self._print(f"{name}: stopped at {run.share:.0%}")

    def _label(self, run: RunProgress) -> str:
        return label(self._record.configuration(run.run.configuration).values)

    def _table(self, runs: Sequence[RunProgress]) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column("configuration", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("seed", justify="right")
        table.add_column("status")
        for name in ("done", "loss", "bits/byte", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        for run in self._window(runs):
            left = "" if run.seconds_left is None else duration(run.seconds_left)
            table.add_row(
                Text(self._label(run)), str(run.run.seed), run.stage, f"{run.share:.0%}" if run.share else "",
                figure(run.train_loss, ".4f") if run.train_loss else "",
                figure(run.bits_per_byte, ".4f") if run.bits_per_byte else "", left, style=STYLES.get(run.stage, ""),
            )  # fmt: skip
        return table

    def _window(self, runs: Sequence[RunProgress]) -> Sequence[RunProgress]:
        """As many runs as the terminal has lines for, around those in training."""
        height = max(3, self._screen.height - RESERVED_LINES)
        first = next((place for place, run in enumerate(runs) if run.stage not in ENDED), len(runs))
        start = max(0, min(first - height // 3, len(runs) - height))
        return runs[start : start + height]

    def _summary(self, runs: Sequence[RunProgress]) -> str:
        self._printed = time.monotonic()
        stages = Counter(run.stage for run in runs)
        known = [f"{stages['finished']} of {len(runs)} runs finished"]
        if stages["failed"]:
            known.append(f"{stages['failed']} failed")
        if (left := self._seconds_left(runs)) is not None:
            known.append(f"about {duration(left)} left")
        return " · ".join(known)

    def _seconds_left(self, runs: Sequence[RunProgress]) -> float | None:
        """Training time of the runs that are left, by the runs so far; None: unknown."""
        left = sum(run.seconds_left or 0.0 for run in runs)
        waiting = [run for run in runs if run.stage in ("waiting", "preparing")]
        finished = [run.seconds for run in runs if run.stage == "finished"]
        for run in waiting:
            minutes = self._record.configuration(run.run.configuration).config.training.minutes
            if finished:
                left += sum(finished) / len(finished)
            elif minutes is not None:
                left += minutes * 60
            else:
                return None
        return left / self._jobs if left else None

    def _print(self, line: str) -> None:
        self._screen.print(line, markup=False, soft_wrap=True)
