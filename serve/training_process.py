"""One training in a separate process. The server starts it with `python -m serve.training_process`.

stdin has a TrainingSpec as one line of JSON. It stays open as long as the server runs. stdout has one line of JSON for
each event:

    {"event": "ready"}                                          the process handles signals now
    {"event": "reading", "stage": …, "done": …, "total": …}
    {"event": "started", "run": …, "model": …, "parameters": …, "corpus": …, "steps": …, "device": …}
    {"event": "progress", "step": …, "steps": …, "loss": …, "seconds": …, "left": …}   about four times a second
    {"event": "validating", "done": …, "total": …}
    {"event": "row", "step": …, "seconds": …, "train_loss": …, "valid_loss": …}
    {"event": "sample", "step": …, "valid_loss": …, "text": …}  from the best weights so far
    {"event": "ended", "reason": …, "step": …}
    {"event": "report", "report": …}                            the run is complete
    {"event": "failed", "sentence": …}

SIGINT stops the training and writes its report. SIGTERM and the end of the server save the training and exit at once;
`lm train --resume` continues it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lm.errors import LMError
from lm.jobs.child_process import end_with_parent, take_stdout
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import Callback, End, Row, Start, Tick, TimeLeft

NICENESS = 10
"""Requests to the server have a higher priority."""
PROGRESS_SECONDS = 0.25
DEFAULT_FAMILY = "default"
"""The kind of model that `lm train` makes by itself."""
SAMPLE: dict[str, Any] = {"seed": 1, "temperature": 0.8, "max_tokens": 240}
"""Always the same, so that samples differ only by the model."""


@dataclass(frozen=True)
class TrainingSpec:
    """What to train."""

    text: str
    """Path of the text."""
    family: str
    """Type of the model, or `DEFAULT_FAMILY`."""
    minutes: float
    runs_dir: str
    name: str | None = None
    """Name of the run; None: from the text and the model."""


class TrainingProcess(Callback):
    """Trains one run, and writes its events to `out`."""

    def __init__(self, spec: TrainingSpec, out: TextIO) -> None:
        self._spec, self._out = spec, out
        self._sent_at = 0.0
        self._sampled_step: int | None = None
        self._sample_due: tuple[int, float] | None = None
        """Step and validation loss of the best weights, until they are saved."""
        self._folder: RunFolder | None = None
        self._end: End | None = None

    def send(self, event: str, **fields: Any) -> None:
        """Write one event. If the server is gone, the end of stdin stops the process."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"event": event, **fields}), file=self._out, flush=True)

    def train(self) -> None:
        """Train the run and write its report."""
        from lm.config import CorpusConfig
        from lm.corpora import open_corpus
        from lm.jobs.train import train

        spec = self._spec
        corpus = open_corpus(CorpusConfig(source=spec.text), progress=self._on_reading)
        options = {} if spec.family == DEFAULT_FAMILY else {"model.type": spec.family}
        run = train(
            corpus, minutes=spec.minutes, overrides=options,
            name=spec.name, runs_dir=spec.runs_dir, callbacks=[self], progress=self._on_reading,
        )  # fmt: skip
        assert self._end is not None, "train calls on_end"
        if self._end.signal == signal.SIGTERM:
            return
        if self._end.reason == "interrupted":
            report = run.evaluate("valid", progress=self.on_validation)
            run.save_report(report)
            self._send_sample(report.step or 0, report.loss)
        self.send("report", report=run.reports()["valid"])

    def interrupt(self, number: int, frame: object) -> None:
        """Signal handler before and after the steps, where the trainer has none."""
        if number == signal.SIGINT and self._end is not None:
            # The training has ended, and only the report is missing.
            return
        raise KeyboardInterrupt

    def _send_progress(self, event: str, **fields: Any) -> None:
        """Write an event, at most one per PROGRESS_SECONDS."""
        now = time.monotonic()
        if now - self._sent_at >= PROGRESS_SECONDS:
            self._sent_at = now
            self.send(event, **fields)

    def _on_reading(self, stage: str, done: int, total: int) -> None:
        self._send_progress("reading", stage=stage, done=done, total=total)

    def on_start(self, start: Start) -> None:
        """Send the description of the run."""
        self._folder = RunFolder(Path(self._spec.runs_dir) / start.run)
        self._time_left = TimeLeft(start)
        self.send(
            "started", run=start.run, model=start.model, parameters=start.parameters, corpus=start.corpus,
            steps=start.plan_steps, device=start.device,
        )  # fmt: skip

    def on_step(self, tick: Tick) -> None:
        """Send the progress."""
        loss = tick.loss if math.isfinite(tick.loss) else None
        left = self._time_left.seconds(tick.step, tick.seconds)
        self._send_progress(
            "progress", step=tick.step, steps=tick.plan_steps, loss=loss, seconds=tick.seconds, left=left
        )

    def on_validation(self, done: int, total: int) -> None:
        """Send the progress of the validation."""
        self._send_progress("validating", done=done, total=total)

    on_report = on_validation

    def on_log(self, row: Row) -> None:
        """Send a point of the curve."""
        self._time_left.add(row)
        self.send("row", **{name: row.get(name) for name in ("step", "seconds", "train_loss", "valid_loss")})
        if row["valid_loss"] is not None and row["best_step"] == row["step"]:
            self._sample_due = row["step"], row["valid_loss"]

    def on_save(self, step: int) -> None:
        """Send a sample of the best weights, which a thread has written to disk."""
        if self._sample_due is not None and self._sample_due[0] <= step:
            self._send_sample(*self._sample_due)
            self._sample_due = None

    def on_end(self, end: End) -> None:
        """Send the reason for the end."""
        self._end = end
        self.send("ended", reason=end.reason, step=end.step)

    def _send_sample(self, step: int, valid_loss: float) -> None:
        if self._sampled_step == step:
            return
        self._sampled_step = step
        assert self._folder is not None, "on_start was called"
        # Training continues if a sample fails.
        with contextlib.suppress(LMError):
            text = Run(self._folder).sample("", **SAMPLE)
            self.send("sample", step=step, valid_loss=valid_loss, text=text)


def main() -> None:
    """Train what stdin specifies."""
    spec = TrainingSpec(**json.loads(sys.stdin.readline()))
    out = take_stdout()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    process = TrainingProcess(spec, out)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, process.interrupt)
        end_with_parent()
        process.send("ready")
        process.train()
    except KeyboardInterrupt:
        pass
    except LMError as error:
        process.send("failed", sentence=str(error))


if __name__ == "__main__":
    main()
