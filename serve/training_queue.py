"""Trainings that the page asks for: one at a time, each in a process of its own, the others in line.

    job = jobs.submit(path, "letters.txt", family="gru", minutes=5)
    job.status, job.rows, job.samples, job.seconds_left
    jobs.stop(job)                      # keeps what was learned

Used from the server's event loop. A training that fails cannot harm the server: it is a process of its own
(`serve.training_process`), which sends lines of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import re
import signal
import sys
import unicodedata
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from lm.config import preset_names, read_preset
from lm.corpora import open_text
from lm.corpora.cache import cache_folder, put_in_place, unwritable, workplace
from lm.errors import ConfigError, CorpusError, LMError, TrainingError
from serve.engines.model_pool import ModelPool
from serve.settings import ServeOptions
from serve.training_process import Order

log = logging.getLogger(__name__)

Status = Literal["waiting", "reading", "training", "validating", "done", "stopped", "failed"]

MOST_MINUTES = 120
MOST_WAITING = 10
"""Trainings in line."""
MOST_ENDED = 20
"""Trainings that are remembered after their end."""
MOST_ROWS = 600
"""Points of a curve; where there are more, every second one goes."""
MOST_SAMPLES = 20
MOST_LINE = 1 << 20
"""Bytes of one event."""
MOST_LOGGED = 4000
"""Characters of what a training that died had to say."""
CLOSE_SECONDS = 5.0
"""How long the end of the server waits for a training to save."""

SHORT_NAME = 60
SHORT_NAME_BYTES = 120


def families() -> dict[str, str]:
    """The families of models that there are presets for: what they are called, and the model's type."""
    types = dict.fromkeys(read_preset(name)["model"]["type"] for name in preset_names())
    return {name.upper() if len(name) <= 4 else name.capitalize(): name for name in types}


# -- the text -----------------------------------------------------------------------------------------


def safe_name(shown: str) -> str:
    """A file's name without its suffix, of letters, digits and . _ - alone, that never hides and never is a path."""
    stem = PurePosixPath(shown.replace("\\", "/")).stem
    kept = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", stem)).strip("-.")[:SHORT_NAME]
    return kept.encode()[:SHORT_NAME_BYTES].decode(errors="ignore").strip("-.") or "text"


def text_suffix(shown: str) -> str:
    """How the name of an uploaded file has to end for its text to be read: a table's suffix, else ".txt".

    What unpacks to more than was sent, as parquet and packed files do, is taken for text, and refused as it is read.
    """
    suffix = PurePosixPath(shown.replace("\\", "/")).suffix.lower()
    return suffix if suffix in (".jsonl", ".json", ".csv") else ".txt"


def keep_text(stream: BinaryIO, shown: str, most_bytes: int) -> Path:
    """A copy of a text in the cache, where a run finds it again when it is measured or trained on.

    Args:
        stream: what a visitor gave.
        shown: the name it came with, which names the run too; no more of it is believed than `safe_name` keeps.
        most_bytes: longer texts are refused.

    Raises:
        CorpusError: it is too long, empty, or no text.
    """
    folder = cache_folder() / "texts"
    digest, size = hashlib.sha256(), 0
    with workplace(folder) as place:
        copy = place / f"text{text_suffix(shown)}"
        try:
            with copy.open("wb") as file:
                while block := stream.read(1 << 20):
                    size += len(block)
                    if size > most_bytes:
                        raise CorpusError(
                            f"{shown} is longer than the {most_bytes:,} bytes that this server takes: give a part of "
                            "it."
                        )
                    digest.update(block)
                    file.write(block)
            for _ in open_text(str(copy), where=shown).chunks():
                pass
            target = folder / digest.hexdigest()[:12] / f"{safe_name(shown)}{copy.suffix}"
            target.parent.mkdir(exist_ok=True)
            put_in_place(copy, target)
        except OSError as error:
            raise unwritable(folder, error) from None
    return target


# -- a job --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A text that the best weights of that moment wrote."""

    step: int
    valid_loss: float
    text: str


@dataclass(eq=False)
class Job:
    """One training, from the line to its end."""

    number: int
    text: Path
    shown: str
    """What the visitor calls the text."""
    family: str
    minutes: float
    status: Status = "waiting"
    stopping: bool = False
    """Whether it was asked to stop."""
    version: int = 0
    """Grows with everything that changes: who saw this number has seen all."""

    stage: str = ""
    """What is read at present."""
    share: float | None = None
    """How far the reading or the validation is."""
    run: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the start: model, parameters, corpus, device."""
    steps: int = 0
    """In the plan."""
    step: int = 0
    seconds: float = 0.0
    """Of training."""
    left: float | None = None
    """Seconds of training to come after the step."""
    loss: float | None = None
    """Of the step."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Points of the curve: step, seconds, train_loss, valid_loss."""
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MOST_SAMPLES))
    """The newest last."""
    reason: str | None = None
    """Why the training ended, as `lm.training.callbacks.End` has it."""
    report: dict[str, Any] | None = None
    """Of the run that it left."""
    sentence: str | None = None
    """Why it failed."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ("done", "stopped", "failed")

    @property
    def seconds_left(self) -> float | None:
        """About how long the training goes on; None where that is not known yet."""
        if self.status not in ("training", "validating") or not self.step or self.reason:
            return None
        return self.left

    def take(self, event: dict[str, Any]) -> None:
        """Learn from an event of the trainee."""
        match event.pop("event"):
            case "reading":
                self.stage, self.share = str(event["stage"]), _share(event)
            case "started":
                self.run, self.steps = event.pop("run"), event.pop("steps")
                self.status, self.share, self.facts = "training", None, event
            case "progress":
                self.status, self.share = "training", None
                self.step, self.seconds, self.loss = event["step"], event["seconds"], event["loss"]
                self.left = event["left"]
            case "validating":
                self.status, self.share = "validating", _share(event)
            case "row":
                self.status, self.share = "training", None
                self.step, self.seconds = event["step"], event["seconds"]
                self.rows.append(event)
                if len(self.rows) > MOST_ROWS:
                    self.rows = [
                        row for number, row in enumerate(self.rows) if number % 2 or row["valid_loss"] is not None
                    ]
            case "sample":
                self.samples.append(Sample(**event))
            case "ended":
                self.status, self.share, self.reason = "validating", None, event["reason"]
                self.step = event["step"]
            case "report":
                self.report = event["report"]
            case "failed":
                self.sentence = event["sentence"].replace(str(self.text), self.shown)


def _share(event: dict[str, Any]) -> float | None:
    return min(1.0, event["done"] / event["total"]) if event["total"] else None


# -- the line -----------------------------------------------------------------------------------------


class TrainingQueue:
    """All trainings of one server."""

    def __init__(self, models: ModelPool, options: ServeOptions) -> None:
        self._models = models
        self._runs_dir = options.runs_dir.resolve()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._heeds = False
        """Whether the process has said that it heeds signals."""
        self._runner: asyncio.Task[None] | None = None
        self._closing = False
        self.version = 0
        """Grows with everything that changes in any job."""

    @property
    def jobs(self) -> list[Job]:
        """In the order in which they were asked for."""
        return list(self._jobs.values())

    def find(self, number: int | None) -> Job | None:
        """The job of that number, unless it is forgotten."""
        return self._jobs.get(number) if number is not None else None

    @property
    def busy(self) -> bool:
        """Whether anything is still to come."""
        return any(not job.ended for job in self._jobs.values())

    def ahead(self, job: Job) -> int:
        """How many trainings have to end before this one begins."""
        return sum(not other.ended for other in self._jobs.values() if other.number < job.number)

    def submit(self, text: Path, shown: str, family: str, minutes: float) -> Job:
        """Take a training into the line.

        Args:
            text: as `keep_text` gave it.
            shown: the name that the visitor knows it by.
            family: one of the values of `families()`.
            minutes: how long to train.

        Raises:
            ConfigError: there is no such family, or nobody waits so long.
            TrainingError: the line is full.
        """
        if family not in families().values():
            raise ConfigError(f"There is no preset for models of type {family!r}.")
        if not 0 < minutes <= MOST_MINUTES:
            raise ConfigError(f"{minutes:g} minutes: give more than 0, and at most {MOST_MINUTES}.")
        if sum(job.status == "waiting" for job in self.jobs) >= MOST_WAITING or self._closing:
            raise TrainingError(f"{MOST_WAITING} trainings are in line already: try again when one has ended.")
        job = Job(next(self._numbers), text, shown, family, minutes)
        self._jobs[job.number] = job
        self._changed(job)
        ended = [other for other in self.jobs if other.ended]
        for other in ended[:-MOST_ENDED]:
            self.forget(other)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._work())
        return job

    def stop(self, job: Job) -> None:
        """Take a job out of the line, or end its training and keep what was learned."""
        if job.status == "waiting":
            job.status = "stopped"
        elif not job.ended and not job.stopping:
            job.stopping = True
            self._signal(signal.SIGINT)
        self._changed(job)

    def forget(self, job: Job) -> None:
        """Drop a job that has ended; its run stays."""
        if job.ended:
            self._jobs.pop(job.number, None)
            self.version += 1

    async def close(self) -> None:
        """End everything: a training that runs has a few seconds to save what it learned."""
        self._closing = True
        for job in self.jobs:
            if job.status == "waiting":
                self.stop(job)
        if self._process is not None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), CLOSE_SECONDS)
            self._signal(signal.SIGKILL)
        if self._runner is not None:
            await self._runner

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                # Before it heeds signals there is nothing that could be saved.
                self._process.send_signal(number if self._heeds else signal.SIGKILL)

    def _changed(self, job: Job) -> None:
        job.version += 1
        self.version += 1

    # -- running ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        while job := next((job for job in self.jobs if job.status == "waiting"), None):
            job.status = "reading"
            self._changed(job)
            try:
                await self._run(job)
            except Exception:
                log.exception("A training failed.")
                job.sentence = "The server met an error of its own; its log says more."
                job.status = "failed"
            self._changed(job)

    async def _run(self, job: Job) -> None:
        order = Order(str(job.text), job.family, job.minutes, str(self._runs_dir))
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "serve.training_process", limit=MOST_LINE,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                # Ctrl-C at the server's terminal is for the server, which tells the trainee in its own way.
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            job.status, job.sentence = "failed", f"The training cannot be started: {error.strerror or error}."
            return
        self._heeds = False
        try:
            if job.stopping or self._closing:
                self._signal(signal.SIGKILL)
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            with contextlib.suppress(ConnectionError):
                process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
                await process.stdin.drain()
            said, _ = await asyncio.gather(_tail(process.stderr), self._listen(job, process.stdout))
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
            self._process = None
        await self._close_job(job, code, said)

    async def _listen(self, job: Job, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line beyond MOST_LINE
                continue
            if not line:
                return
            # Half a line, where a signal came between.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event["event"] == "ready":
                    self._heeds = True
                else:
                    job.take(event)
                    self._changed(job)

    async def _close_job(self, job: Job, code: int, said: str) -> None:
        job.share = None
        if job.report is not None and job.run is not None:
            try:
                await self._models.include(job.run)
            except (LMError, OSError) as error:
                log.error("Run %r cannot be offered. %s", job.run, error)
            job.status = "stopped" if job.reason == "interrupted" else "done"
        elif job.sentence is not None:
            job.status = "failed"
        elif job.stopping or self._closing:
            job.status = "stopped"
        else:
            job.status, job.sentence = "failed", _obituary(job, code)
            log.error("A training died.", extra={"fields": {"run": job.run, "exit_code": code, "stderr": said}})


async def _tail(stream: asyncio.StreamReader) -> str:
    """The end of what a stream says."""
    text = ""
    while block := await stream.read(1 << 16):
        text = (text + block.decode(errors="replace"))[-MOST_LOGGED:]
    return text


def _obituary(job: Job, code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "broke off"
    why = ", perhaps because memory ran short" if code == -signal.SIGKILL else ""
    kept = f" What it had saved is kept in run {job.run}." if job.run else ""
    return f"The training {how}{why}; the server's log may say more.{kept}"
