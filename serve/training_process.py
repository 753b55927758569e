"""A training as a process of its own, which the server starts with `python -m serve.training_process`.

stdin holds the order, one line of JSON, and stays open for as long as the server lives. stdout gives one line of JSON
an event:

    {"event": "ready"}                                          signals are heeded from here on
    {"event": "reading", "stage": …, "done": …, "total": …}
    {"event": "started", "run": …, "model": …, "parameters": …, "corpus": …, "steps": …, "device": …}
    {"event": "progress", "step": …, "loss": …, "seconds": …, "left": …}   about four times a second
    {"event": "validating", "done": …, "total": …}
    {"event": "row", "step": …, "seconds": …, "train_loss": …, "valid_loss": …}
    {"event": "sample", "step": …, "valid_loss": …, "text": …}  of the best weights so far
    {"event": "ended", "reason": …, "step": …}
    {"event": "report", "report": …}                            the run is whole
    {"event": "failed", "sentence": …}

SIGINT ends the training and keeps what was learned, with its report. SIGTERM, and the end of the server, save what was
learned and leave in haste: `lm train --resume` goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lm.config import RunConfig, compose, preset_names, read_preset
from lm.corpora import Corpus
from lm.errors import LMError
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import Callback, End, Row, Start, Tick, TimeLeft

NICENESS = 10
"""Who waits for an answer of the server goes first."""
PROGRESS_SECONDS = 0.25
SAMPLE: dict[str, Any] = {"seed": 1, "temperature": 0.8, "max_tokens": 240}
"""The same each time, so that samples show what changed in the model."""


@dataclass(frozen=True)
class Order:
    """What is to be trained."""

    text: str
    """Path of the text."""
    family: str
    """Type of the model."""
    minutes: float
    runs_dir: str
    name: str | None = None
    """Of the run; None names it after text and model."""


def choose_config(corpus: Corpus, family: str, minutes: float) -> RunConfig:
    """The options for a text: a preset of the family that cuts the text as suits it."""
    from lm.jobs.autoconfig import choose_config as choose
    from lm.jobs.autoconfig import suited_presets

    suited = suited_presets(corpus)[0]
    cut = read_preset(suited)["tokenizer"]["type"]
    length = {"training.minutes": minutes}
    if read_preset(suited)["model"]["type"] == family:
        return choose(corpus, lambda preset: compose(corpus.source, preset=preset, overrides=length)).config
    for preset in preset_names():
        sections = read_preset(preset)
        if sections["model"]["type"] == family and sections["tokenizer"]["type"] == cut:
            return compose(corpus.source, preset=preset, overrides=length)
    return compose(corpus.source, preset=suited, overrides={"model.type": family, **length})


class TrainingProcess(Callback):
    """One training, and what is told of it."""

    def __init__(self, order: Order, out: TextIO) -> None:
        self._order, self._out = order, out
        self._told_at = 0.0
        self._sampled: int | None = None
        self._due: tuple[int, float] | None = None
        self._folder: RunFolder | None = None
        self._end: End | None = None

    def tell(self, event: str, **facts: Any) -> None:
        """Write a line; where nobody reads any more, the end of stdin says so too."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"event": event, **facts}), file=self._out, flush=True)

    def work(self) -> None:
        """Train, and leave a run with its report."""
        from lm.config import CorpusConfig
        from lm.corpora import open_corpus
        from lm.jobs.train import train

        order = self._order
        corpus = open_corpus(CorpusConfig(source=order.text), progress=self._reading)
        config = choose_config(corpus, order.family, order.minutes)
        run = train(
            corpus, config, name=order.name, runs_dir=order.runs_dir, callbacks=[self], progress=self._reading
        )  # fmt: skip
        assert self._end is not None, "who returns from training has ended it"
        if self._end.signal == signal.SIGTERM:
            return
        if self._end.reason == "interrupted":
            report = run.evaluate("valid", progress=self.on_validation)
            run.save_report(report)
            self._sample(report.step or 0, report.loss)
        self.tell("report", report=run.reports()["valid"])

    def interrupt(self, number: int, frame: object) -> None:
        """The way of a signal outside the steps, where the trainer listens itself."""
        if number == signal.SIGINT and self._end is not None:
            # Only the report is missing: there is no training left to stop.
            return
        raise KeyboardInterrupt

    # -- what is told ---------------------------------------------------------------------------

    def _now_and_then(self) -> bool:
        now = time.monotonic()
        if now - self._told_at < PROGRESS_SECONDS:
            return False
        self._told_at = now
        return True

    def _reading(self, stage: str, done: int, total: int) -> None:
        if self._now_and_then():
            self.tell("reading", stage=stage, done=done, total=total)

    def on_start(self, start: Start) -> None:
        """Say what is trained."""
        self._folder = RunFolder(Path(self._order.runs_dir) / start.run)
        self._time_left = TimeLeft(start)
        self.tell(
            "started", run=start.run, model=start.model, parameters=start.parameters, corpus=start.corpus,
            steps=start.plan_steps, device=start.device,
        )  # fmt: skip

    def on_step(self, tick: Tick) -> None:
        """Say how far it is."""
        if self._now_and_then():
            loss = tick.loss if math.isfinite(tick.loss) else None
            left = self._time_left.seconds(tick.step, tick.seconds)
            self.tell("progress", step=tick.step, loss=loss, seconds=tick.seconds, left=left)

    def on_validation(self, done: int, total: int) -> None:
        """Say how far the validation is."""
        if self._now_and_then():
            self.tell("validating", done=done, total=total)

    on_report = on_validation

    def on_log(self, row: Row) -> None:
        """Give the point of the curve; where it is the best so far, a sample is due."""
        self._time_left.add(row)
        self.tell("row", **{name: row.get(name) for name in ("step", "seconds", "train_loss", "valid_loss")})
        if row["valid_loss"] is not None and row["best_step"] == row["step"]:
            self._due = row["step"], row["valid_loss"]

    def on_save(self, step: int) -> None:
        """Give the sample that is due: weights are written beside training, and now they are there."""
        if self._due is not None and self._due[0] <= step:
            self._sample(*self._due)
            self._due = None

    def on_end(self, end: End) -> None:
        """Say why it ended."""
        self._end = end
        self.tell("ended", reason=end.reason, step=end.step)

    def _sample(self, step: int, valid_loss: float) -> None:
        if self._sampled == step:
            return
        self._sampled = step
        assert self._folder is not None, "a training that has rows has begun"
        # A text is here to be looked at; training goes on without it.
        with contextlib.suppress(LMError):
            text = Run(self._folder).sample("", **SAMPLE)
            self.tell("sample", step=step, valid_loss=valid_loss, text=text)


def _leave_with_server() -> None:
    """Wait for the end of stdin, which is the end of the server."""
    # The descriptor itself: a thread that holds the lock of sys.stdin would keep Python from ending.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Follow the order on stdin."""
    order = Order(**json.loads(sys.stdin.readline()))
    # Events have stdout for themselves; whatever else is printed goes to stderr.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    trainee = TrainingProcess(order, out)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, trainee.interrupt)
        threading.Thread(target=_leave_with_server, daemon=True).start()
        trainee.tell("ready")
        trainee.work()
    except KeyboardInterrupt:
        pass
    except LMError as error:
        trainee.tell("failed", sentence=str(error))


if __name__ == "__main__":
    main()
