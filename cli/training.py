"""The live view of a training run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cli.options import named
from cli.output import Reading, console
from lm.runs.card import numbers, perplexity
from lm.training.callbacks import Callback, End, Row, Start, Tick, TimeLeft

PLAIN_SECONDS = 10.0
"""Between lines where there is no terminal."""


def duration(seconds: float) -> str:
    """92 → 1:32."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingView(Callback):
    """Step, loss, perplexity, tokens/s, time left, learning rate and the diary of the gradients on stderr."""

    def __init__(self, runs_dir: Path, reading: Reading | None = None) -> None:
        self._reading = reading
        self._runs_dir = runs_dir
        self._screen = console(stderr=True)
        self._live: Live | None = None
        self._measuring: Progress | None = None
        self._row: Row = {}
        self.end: End | None = None
        """How it ended, once it has."""
        self._printed = time.monotonic()

    def on_start(self, start: Start) -> None:
        """Say what is trained and how far; begin the bar."""
        self.close()
        self._start, self._time_left = start, TimeLeft(start)
        sizes = numbers({"parameters": start.parameters, "counts": start.counts})
        if start.counts == start.parameters:
            self._screen.print(
                f"[bold]{escape(start.run)}[/bold]: {start.model}, {sizes} of {escape(start.corpus)}, made in one pass "
                f"over {start.tokens_per_step:,} tokens",
                soft_wrap=True,
            )
            return
        epochs = start.plan_steps / start.steps_per_epoch
        memory = "" if start.memory_bytes is None else f", {start.memory_bytes / 1e6:,.0f} MB of tensors at most"
        goes = f"goes on at step {start.step:,}" if start.step else "starts"
        self._screen.print(
            f"[bold]{escape(start.run)}[/bold] {goes}: {start.model}, {sizes}, on "
            f"{escape(start.corpus)}; "
            f"{start.plan_steps:,} steps of {start.tokens_per_step:,} tokens ({epochs:.1f} epochs), {start.device}, "
            f"{start.precision}{memory}",
            soft_wrap=True,
        )
        if start.validation_tokens is not None and start.step == 0:
            self._screen.print(
                f"Validation: {start.validations} times on the first {start.validation_tokens:,} of "
                f"{start.valid_tokens:,} tokens, so that it takes a small part of the time. "
                "The report at the end scores all of them.",
                soft_wrap=True,
            )
        if self._screen.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:.0f}%")
            )
            self._task = self._bar.add_task("", total=start.plan_steps, completed=start.step)
            self._live = Live(self._bar, console=self._screen, refresh_per_second=8, transient=True)
            self._live.start()

    def on_step(self, tick: Tick) -> None:
        """Move the bar."""
        if self._live is not None:
            self._bar.update(
                self._task, completed=tick.step, description=f"step {tick.step:,}/{self._start.plan_steps:,}"
            )
            self._live.update(
                Group(
                    self._bar,
                    Text(f"{self._numbers(tick.loss)} · {self._left(tick.step, tick.seconds)} left", style="dim"),
                )
            )

    def on_log(self, row: Row) -> None:
        """Keep the numbers; print a line at each validation, and now and then without a terminal."""
        self._row = row
        self._time_left.add(row)
        if row["valid_loss"] is not None:
            self._print_validation(row)
        elif self._live is None and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            numbers = f"{self._numbers(row['train_loss'] or math.nan)} · {self._left(row['step'], row['seconds'])} left"
            self._screen.print(f"step {row['step']:>7,}  {numbers}", soft_wrap=True)

    def on_validation(self, done: int, total: int) -> None:
        """Show that a validation runs."""
        if self._live is not None:
            self._live.update(Group(self._bar, Text(f"validating {done / total:.0%}", style="dim")))

    def on_end(self, end: End) -> None:
        """Clear the bar and say why it ended."""
        self.close()
        self.end = end
        if self._start.counts == self._start.parameters:
            return
        why = {
            "finished": "Finished the plan",
            "stop_after": f"Stopped early at step {end.step:,} of {end.plan_steps:,}",
            "interrupted": f"Interrupted, saved at step {end.step:,} of {end.plan_steps:,}",
            "out_of_time": f"Time is up at step {end.step:,} of {end.plan_steps:,}",
            "no_progress": f"Stopped at step {end.step:,}: no better validation since step {end.best_step or 0:,}",
        }[end.reason]
        self._screen.print(f"{why} after {duration(end.seconds)}.")
        if end.reason == "out_of_time":
            rate = (
                ""
                if end.learning_rate_share is None
                else f"The learning rate was still {end.learning_rate_share:.0%} of its peak. "
            )
            self._screen.print(
                f"{rate}The last steps of a plan, with a low learning rate, often give the most.", soft_wrap=True
            )
        if end.reason in ("interrupted", "stop_after", "out_of_time"):
            then = f"Finish the plan with: lm train --resume {named(self._start.run, self._runs_dir)}"
            self._screen.print(then, markup=False, soft_wrap=True)

    def on_report(self, done: int, total: int) -> None:
        """Show how far the closing report is; it scores the whole split."""
        if not self._screen.is_terminal:
            return
        if self._measuring is None:
            self._measuring = Progress(
                TextColumn("measuring the validation split"), BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,} tokens"), TimeRemainingColumn(),
                console=self._screen, transient=True,
            )  # fmt: skip
            self._measuring.start()
            self._task = self._measuring.add_task("", total=total)
        self._measuring.update(self._task, completed=done)
        if done >= total:
            self._measuring.stop()
            self._measuring = None

    def close(self) -> None:
        """Give the terminal back."""
        if self._reading is not None:
            self._reading.close()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._measuring is not None:
            self._measuring.stop()
            self._measuring = None

    def _left(self, step: int, seconds: float) -> str:
        return duration(self._time_left.seconds(step, seconds))

    def _numbers(self, loss: float) -> str:
        row = self._row
        parts = [f"loss {loss:.4f}", f"perplexity {perplexity(loss)}"]
        if row:
            parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"lr {row['learning_rate']:.2e}")
            if row["grad_norm"] is not None:
                parts.append(f"grad {row['grad_norm']:.2f}, {row['clip_rate']:.0%} clipped")
            if "loss_scale" in row:
                parts.append(f"scale {row['loss_scale']:,.10g}")
            if row["skipped_steps"]:
                parts.append(f"{row['skipped_steps']} skipped")
            if "first_nonfinite" in row:
                parts.append(f"not finite: {row['first_nonfinite']}")
            if "largest_activation" in row:
                parts.append(f"largest {row['largest_activation']:.3g} in {row['largest_activation_in']}")
        return " · ".join(parts)

    def _print_validation(self, row: Row) -> None:
        train = f"{row['train_loss']:.4f}" if row["train_loss"] is not None else "–"
        self._printed = time.monotonic()
        self._screen.print(
            f"step {row['step']:>7,}  epoch {row['epoch']:6.2f}  train {train}  "
            f"valid [bold]{row['valid_loss']:.4f}[/bold]"
            f"  perplexity {perplexity(row['valid_loss']):>9}  {row['tokens_per_second']:>9,.0f} tokens/s"
            f"  {duration(row['seconds'])}{'  best' if row['best_step'] == row['step'] else ''}",
            soft_wrap=True,
        )
