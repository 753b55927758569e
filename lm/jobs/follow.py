"""Follow a run from another process: read its folder and call a callback as the trainer does.

metrics.jsonl ──► on_start, on_step, on_log …, on_end        (writes nothing, imports no torch)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from lm.config import RunConfig, validate
from lm.errors import LMError
from lm.jobs.ensemble_config import unwrapped
from lm.runs.run_folder import METRICS, RunFolder
from lm.training.callbacks import Callback, End, Row, Start, Tick
from lm.training.plan import Plan

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""Time without a trainer, as between a kill and a resume by a job manager, after which following ends."""


@dataclass
class Follower:
    """Reads new lines of a run's metrics and calls a callback.

    `on_start` is called again where a resume cut off the last lines, or another run of the same name replaced the run.
    """

    folder: RunFolder
    callback: Callback
    _rows: list[Row] = field(default_factory=list)
    _made: str | None = None
    _plan_steps: int = 1
    _size: tuple[int, int, int] = (0, 0, 0)

    def follow(self, *, wait: Callable[[float], None] = time.sleep) -> End | None:
        """Follow until the job ends; None if it was killed or never wrote a line.

        Raises:
            LMError: the run's folder cannot be read.
        """
        idle = 0.0
        try:
            while True:
                is_training = self.folder.is_training
                # Read after the check, so that the last lines of an ending trainer are not missed.
                self.read()
                if is_training:
                    idle = 0.0
                elif (end := self._end()) is not None:
                    self.callback.on_end(end)
                    return end
                elif idle >= GRACE_SECONDS:
                    return None
                else:
                    idle += POLL_SECONDS
                wait(POLL_SECONDS)
        finally:
            self.callback.close()

    def read(self) -> None:
        """Call the callback for new lines."""
        try:
            found = (self.folder.path / METRICS).stat()
            made = self.folder.read_record()["created"]
        except (FileNotFoundError, LMError):
            # The run has not started, or is being replaced.
            return
        size = (found.st_ino, found.st_size, found.st_mtime_ns)
        if size == self._size:
            return
        self._size = size
        rows = self.folder.read_metrics()
        known = len(self._rows)
        if made != self._made or rows[:known] != self._rows:
            # A resume cut the lines, or this is another run.
            kept = _common(self._rows, rows) if made == self._made else 0
            self._rows, self._made = rows[:kept], made
            if rows:
                self._start(rows[-1], rows[kept - 1] if kept else None)
        for row in rows[len(self._rows) :]:
            steps = row.get("plan_steps") or self._plan_steps
            progress = row.get("progress", min(1.0, row["step"] / steps))
            loss = row["train_loss"] or float("nan")
            self.callback.on_step(Tick(row["step"], loss, row["seconds"], progress, steps))
            self.callback.on_log(row)
        self._rows = rows

    def _start(self, row: Row, since: Row | None) -> None:
        """Call `on_start`; `row` is any line of the run, `since` the last one before the start."""
        record, environment = self.folder.read_record(), self._last_checkpoint().get("environment", {})
        level, plan = environment.get("amp", "O0"), Plan.from_json(record["plan"])
        config = unwrapped(validate(RunConfig, record["config"], where="config.json: config"))
        self._plan_steps = (since or {}).get("plan_steps") or plan.steps
        training = config.training
        start = Start(
            run=self.folder.name, model=config.model.type, parameters=record["parameters"],
            counts=record.get("counts", 0), corpus=record["corpus"]["name"], step=since["step"] if since else 0,
            seconds=since["seconds"] if since else 0.0, plan_steps=self._plan_steps,
            tokens_per_step=training.batch_size * config.row_length * training.gradient_accumulation,
            steps_per_epoch=row["step"] / (row["epoch"] or 1), device=environment.get("device", "cpu"),
            precision=environment.get("precision", "fp32") + ("" if level == "O0" else f" {level}"),
            plan_seconds=plan.seconds, step_seconds=plan.measured_step_seconds, report_seconds=plan.report_seconds,
            max_steps=plan.max_steps, validations=plan.validation_count,
            validation_tokens=plan.validation_tokens,
            valid_tokens=record["corpus"]["splits"].get("valid", {}).get("tokens", 0),
            memory_bytes=plan.expected_bytes,
        )  # fmt: skip
        self.callback.on_start(start)

    def _last_checkpoint(self) -> dict[str, Any]:
        """The content of `state.json`; empty where there is none, as for models of counts."""
        try:
            return self.folder.read_state()
        except LMError:
            return {}

    def _end(self) -> End | None:
        """How the run ended; None: it did not."""
        if not self._rows:
            return None
        last = self._rows[-1]
        if last.get("member") is not None:
            # A member of an ensemble ended; the last line of a finished ensemble is of no member.
            return None
        steps = last.get("plan_steps") or self.folder.read_record()["plan"]["steps"]
        if not self.folder.has_last():
            return End("finished", last["step"], steps, last["seconds"], last.get("valid_loss"), last["step"])
        progress = self._last_checkpoint().get("train_state", {})
        if progress.get("stop_reason") is None:
            return None
        return End(
            progress["stop_reason"], progress["step"], steps, progress["seconds"], progress["best_loss"],
            progress["best_step"], learning_rate_share=progress.get("learning_rate_share"),
        )  # fmt: skip


def _common(one: list[Row], two: list[Row]) -> int:
    """Number of equal lines at the start of both lists."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
