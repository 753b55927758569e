"""The progress of a training run on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from pathlib import Path

from rich.console import Group
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from cli.options import named
from cli.output import Reading, console, say, token_bar
from lm.runs.card import numbers, perplexity
from lm.training.callbacks import Callback, End, Row, Start, Tick, TimeLeft

LONG_REPORT = 0.1
"""A report that takes more than this share of the plan is announced."""
FEW_STEPS = 100
"""With fewer steps in a plan by time, one step is more than 1 % of its time."""
PLAIN_SECONDS = 10.0
"""Seconds between lines where there is no terminal."""


def duration(seconds: float) -> str:
    """92 → 1:32."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(per_second: float) -> str:
    """9876 → 9,876; 98765 → 99k, so that a line of progress fits a terminal of 80 columns."""
    return f"{per_second:,.0f}" if per_second < 10_000 else f"{per_second / 1000:,.0f}k"


class TrainingView(Callback):
    """Shows step, loss, tokens/s, time left, learning rate and gradient norm on stderr."""

    def __init__(self, runs_dir: Path, reading: Reading | None = None) -> None:
        self._reading = reading
        self._runs_dir = runs_dir
        self._screen = console(stderr=True)
        self._live: Live | None = None
        self._measuring: Progress | None = None
        self._row: Row = {}
        self.end: End | None = None
        """How the training ended; None: not yet."""
        self._printed = time.monotonic()

    def on_start(self, start: Start) -> None:
        """Print what is trained and the plan; start the bar."""
        self.close()
        self._start, self._time_left = start, TimeLeft(start)
        run, corpus = f"[bold]{escape(start.run)}[/bold]", escape(start.corpus)
        sizes = numbers({"parameters": start.parameters, "counts": start.counts})
        if start.adapter_parameters:
            frozen = start.parameters - start.adapter_parameters
            sizes = f"{start.adapter_parameters:,} parameters in adapters over {frozen:,} frozen ones"
        if start.counts == start.parameters:
            self._print(f"{run}: {start.model}, {sizes} of {corpus}, in one pass over {start.tokens_per_step:,} tokens")
            return
        begins = f"resumes at step {start.step:,}" if start.step else "starts"
        models, each = 1, ""
        if start.member is not None:
            number, models = start.member
            each = f", {models} models one after another"
            begins = begins if not self._row else f"model {number} of {models}"
        self._print(f"{run} {begins}: {start.model}, {sizes}, on {corpus}")
        epochs = start.plan_steps / start.steps_per_epoch / models
        memory = "" if start.memory_bytes is None else f", up to {decimal(start.memory_bytes)}"
        length = "" if start.plan_seconds is None else f"{duration(start.plan_seconds)}, "
        # The later members of an ensemble have the plan of the first.
        if not each or not self._row:
            self._print(
                f"Plan: {length}{self._about}{start.plan_steps:,} steps of {start.tokens_per_step:,} tokens "
                f"({epochs:.1f} epochs{each}), {start.device}, {start.precision}{memory}"
            )
        if start.plan_seconds is not None and not each:
            self._print_limits(start.plan_seconds)
        if start.validation_tokens is not None and start.step == 0:
            often = "once" if start.validations == 1 else f"{start.validations} times"
            self._print(
                f"Validation: {often} on the first {start.validation_tokens:,} of "
                f"{start.valid_tokens:,} tokens; the report uses all."
            )
        if self._screen.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:.0f}%")
            )
            self._task = self._bar.add_task("", total=1.0)
            self._live = Live(self._bar, console=self._screen, refresh_per_second=8, transient=True)
            self._live.start()

    def _print_limits(self, plan_seconds: float) -> None:
        """What a plan by time of few long steps holds, and what comes after it."""
        start = self._start
        if start.plan_steps < FEW_STEPS and start.step_seconds is not None:
            self._print(
                f"About {start.plan_steps:,} steps of {start.step_seconds:.1f} s fit into {duration(plan_seconds)}; no "
                "step starts that would not fit."
            )
        if (report := start.report_seconds) is not None and report > max(1.0, LONG_REPORT * plan_seconds):
            self._print(f"After it comes the report, which takes about {duration(report)}.")

    def on_step(self, tick: Tick) -> None:
        """Move the bar."""
        if self._live is not None:
            step = f"step {tick.step:,} of {self._about}{tick.plan_steps:,}"
            self._bar.update(self._task, completed=tick.progress, description=step)
            lines = [self._speed(tick.loss, tick.step, tick.seconds), *self._details()]
            self._live.update(Group(self._bar, Text("\n".join(lines), style="dim")))

    def on_log(self, row: Row) -> None:
        """Print a line for each validation, and every `PLAIN_SECONDS` where there is no terminal."""
        self._row = row
        self._time_left.add(row)
        if row["valid_loss"] is not None:
            self._print_validation(row)
        elif self._live is None and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            speed = self._speed(row["train_loss"] or math.nan, row["step"], row["seconds"])
            self._print(f"step {row['step']:>6,}  {speed}")
            for line in self._details():
                self._print(f"             {line}")

    def on_validation(self, done: int, total: int) -> None:
        """Show the progress of a validation."""
        if self._live is not None:
            self._live.update(Group(self._bar, Text(f"validating {done / total:.0%}", style="dim")))

    def on_end(self, end: End) -> None:
        """Clear the bar and print why the training ended."""
        self.close()
        self.end = end
        if self._start.counts == self._start.parameters:
            return
        after = f" after {duration(end.seconds)}"
        step = f"at step {end.step:,} of {self._about}{end.plan_steps:,}"
        match end.reason:
            case "finished":
                steps = f": {end.step:,} step{'' if end.step == 1 else 's'}" if self._about else ""
                self._print(f"Finished the plan{after}{steps}.")
            case "stop_after":
                self._print(f"Stopped early {step}{after}.")
            case "interrupted":
                self._print(f"Interrupted, saved {step}{after}.")
            case "out_of_time":
                self._print(f"Time is up {step}{after}.")
                if end.learning_rate_share is not None:
                    share = f"{end.learning_rate_share:.0%}"
                    self._print(f"The learning rate was still {share} of its peak; the last steps often help most.")
            case "no_progress":
                best = f"no better validation since step {end.best_step or 0:,}"
                self._print(f"Stopped at step {end.step:,}{after}: {best}.")
        if end.reason in ("interrupted", "stop_after", "out_of_time"):
            say(f"Finish the plan with: lm train --resume {named(self._start.run, self._runs_dir)}", dim=False)

    def on_report(self, done: int, total: int) -> None:
        """Show the progress of the report, which uses the whole split."""
        if not self._screen.is_terminal:
            return
        if self._measuring is None:
            self._measuring = token_bar("measuring the validation split", self._screen)
            self._measuring.start()
            self._task = self._measuring.add_task("", total=total)
        self._measuring.update(self._task, completed=done)
        if done >= total:
            self._measuring.stop()
            self._measuring = None

    def close(self) -> None:
        """Remove all bars from the terminal."""
        if self._reading is not None:
            self._reading.close()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._measuring is not None:
            self._measuring.stop()
            self._measuring = None

    @property
    def _about(self) -> str:
        """What stands before the number of steps of a plan by time, which is an estimate."""
        return "" if self._start.plan_seconds is None else "about "

    def _print(self, line: str) -> None:
        self._screen.print(line, soft_wrap=not self._screen.is_terminal)

    def _speed(self, loss: float, step: int, seconds: float) -> str:
        parts = [f"loss {loss:.4f}", f"perplexity {perplexity(loss)}"]
        if self._row:
            parts.append(f"{self._row['tokens_per_second']:,.0f} tokens/s")
        return " · ".join([*parts, f"{duration(self._time_left.seconds(step, seconds))} left"])

    def _details(self) -> list[str]:
        """Learning rate and gradient norm of the last line of metrics, and what was unusual."""
        row = self._row
        if not row:
            return []
        parts, unusual = [f"lr {row['learning_rate']:.2e}"], []
        if row["grad_norm"] is not None:
            parts.append(f"grad {row['grad_norm']:.2f}, {row['clip_rate']:.0%} clipped")
        if "loss_scale" in row:
            parts.append(f"scale {row['loss_scale']:,.10g}")
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} skipped")
        if "first_nonfinite" in row:
            unusual.append(f"not finite: {row['first_nonfinite']}")
        if "largest_activation" in row:
            unusual.append(f"largest {row['largest_activation']:.3g} in {row['largest_activation_in']}")
        return [" · ".join(parts), *unusual]

    def _print_validation(self, row: Row) -> None:
        train = f"{row['train_loss']:.4f}" if row["train_loss"] is not None else "–"
        self._printed = time.monotonic()
        self._print(
            f"step {row['step']:>6,}  epoch {row['epoch']:>5.2f}  train {train}  "
            f"valid [bold]{row['valid_loss']:.4f}[/bold]  {_rate(row['tokens_per_second']):>5} tokens/s  "
            f"{duration(row['seconds'])}{' best' if row['best_step'] == row['step'] else ''}"
        )
