"""Trainings that the page starts: one at a time, each in a separate process, the others in a queue.

    job = queue.submit(path, "letters.txt", family="gru", minutes=5)
    job.status, job.rows, job.samples, job.seconds_left
    queue.stop(job)                     # saves the run

Used from the server's event loop. A failed training does not harm the server: the process
(`serve.training_process`) only sends lines of JSON.
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
from serve.training_process import DEFAULT_FAMILY, TrainingSpec

log = logging.getLogger(__name__)

Status = Literal["waiting", "reading", "training", "validating", "done", "stopped", "failed"]

MAX_MINUTES = 120
MAX_WAITING = 10
"""Trainings in the queue."""
MAX_ENDED = 20
"""Ended trainings that the queue still lists."""
MAX_ROWS = 600
"""Points of a curve. Above that, every second point without a validation goes."""
MAX_SAMPLES = 20
MAX_LINE = 1 << 20
"""Bytes of one event."""
MAX_LOGGED = 4000
"""Characters of the stderr of a failed training in the log."""
CLOSE_SECONDS = 5.0
"""How long the end of the server waits until a training is saved."""
MAX_NAME, MAX_NAME_BYTES = 60, 120


def families() -> dict[str, str]:
    """The kinds of model to choose from, by their label: the default, and the model types that have a preset."""
    types = dict.fromkeys(read_preset(name)["model"]["type"] for name in preset_names())
    names = [DEFAULT_FAMILY, *types]
    return {name.upper() if len(name) <= 4 else name.capitalize(): name for name in names}


def safe_name(shown: str) -> str:
    """A file name without suffix from any text: letters, digits, and . _ - inside; never hidden, never a path."""
    stem = PurePosixPath(shown.replace("\\", "/")).stem
    name = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", stem)).strip("-.")[:MAX_NAME]
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip("-.") or "text"


def text_suffix(shown: str) -> str:
    """The suffix for an uploaded file: that of a table of texts, else ".txt".

    Packed files count as text, and fail when they are read: they could unpack to any size.
    """
    suffix = PurePosixPath(shown.replace("\\", "/")).suffix.lower()
    return suffix if suffix in (".jsonl", ".json", ".csv") else ".txt"


def keep_text(stream: BinaryIO, shown: str, max_bytes: int) -> Path:
    """Copy an uploaded text to the cache, where later evaluations of the run find it.

    Args:
        stream: the upload.
        shown: its name, which also names the run; see `safe_name`.
        max_bytes: the size limit.

    Raises:
        CorpusError: it is too long, empty, or not text.
    """
    folder = cache_folder() / "texts"
    digest, size = hashlib.sha256(), 0
    with workplace(folder) as place:
        copy = place / f"text{text_suffix(shown)}"
        try:
            with copy.open("wb") as file:
                while block := stream.read(1 << 20):
                    size += len(block)
                    if size > max_bytes:
                        raise CorpusError(f"{shown} is longer than {max_bytes:,} bytes, the limit of this server.")
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


@dataclass(frozen=True)
class Sample:
    """A text that the best weights at a step wrote."""

    step: int
    valid_loss: float
    text: str


@dataclass(eq=False)
class Job:
    """One training, from the queue to its end."""

    number: int
    text: Path
    shown: str
    """The user's name of the text."""
    family: str
    minutes: float
    status: Status = "waiting"
    stopping: bool = False
    version: int = 0
    """Increases with each change."""
    stage: str = ""
    """The stage of reading the text."""
    share: float | None = None
    """Progress of reading or validation, 0 to 1."""
    run: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Model, parameters, corpus, device."""
    steps: int = 0
    """Planned steps; an estimate, because the plan is by time."""
    step: int = 0
    seconds: float = 0.0
    left: float | None = None
    """Training time so far, and estimated from here."""
    loss: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Points of the curve: step, seconds, train_loss, valid_loss."""
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    """The newest is last."""
    reason: str | None = None
    """Why the training ended: `lm.training.callbacks.End.reason`."""
    report: dict[str, Any] | None = None
    sentence: str | None = None
    """Why it failed."""

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.status in ("done", "stopped", "failed")

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining training time; None if unknown."""
        if self.status not in ("training", "validating") or not self.step or self.reason:
            return None
        return self.left

    def apply(self, event: dict[str, Any]) -> None:
        """Update the job with an event of its process."""
        match event.pop("event"):
            case "reading":
                self.stage, self.share = str(event["stage"]), _share(event)
            case "started":
                self.run, self.steps = event.pop("run"), event.pop("steps")
                self.status, self.share, self.facts = "training", None, event
            case "progress":
                self.status, self.share = "training", None
                self.step, self.seconds, self.loss = event["step"], event["seconds"], event["loss"]
                self.steps, self.left = event.get("steps", self.steps), event["left"]
            case "validating":
                self.status, self.share = "validating", _share(event)
            case "row":
                self.status, self.share = "training", None
                self.step, self.seconds = event["step"], event["seconds"]
                self.rows.append(event)
                if len(self.rows) > MAX_ROWS:
                    self.rows = [row for i, row in enumerate(self.rows) if i % 2 or row["valid_loss"] is not None]
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


class TrainingQueue:
    """All trainings of one server."""

    def __init__(self, models: ModelPool, options: ServeOptions) -> None:
        self._models = models
        self._runs_dir = options.runs_dir.resolve()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._is_ready = False
        """Whether the process handles signals."""
        self._runner: asyncio.Task[None] | None = None
        self._closing = False
        self.version = 0
        """Increases with each change of any job."""

    @property
    def jobs(self) -> list[Job]:
        """All jobs, the oldest first."""
        return list(self._jobs.values())

    def find(self, number: int | None) -> Job | None:
        """The job with this number, if the queue still lists it."""
        return self._jobs.get(number) if number is not None else None

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return any(not job.ended for job in self.jobs)

    def ahead(self, job: Job) -> int:
        """The number of trainings before this one."""
        return sum(not other.ended for other in self.jobs if other.number < job.number)

    def submit(self, text: Path, shown: str, family: str, minutes: float) -> Job:
        """Add a training to the queue.

        Args:
            text: from `keep_text`.
            shown: the user's name of the text.
            family: a value of `families()`.
            minutes: training time.

        Raises:
            ConfigError: the family has no preset, or the time is out of range.
            TrainingError: the queue is full.
        """
        if family not in families().values():
            raise ConfigError(f"There is no kind of model {family!r}: choose one of {', '.join(families().values())}.")
        if not 0 < minutes <= MAX_MINUTES:
            raise ConfigError(f"{minutes:g} minutes: give more than 0, and at most {MAX_MINUTES}.")
        if sum(job.status == "waiting" for job in self.jobs) >= MAX_WAITING or self._closing:
            raise TrainingError(f"The queue is full with {MAX_WAITING} trainings: try again when one has ended.")
        job = Job(next(self._numbers), text, shown, family, minutes)
        self._jobs[job.number] = job
        self._changed(job)
        for other in [other for other in self.jobs if other.ended][:-MAX_ENDED]:
            self.forget(other)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_all())
        return job

    def stop(self, job: Job) -> None:
        """Remove a job from the queue, or stop its training and save the run."""
        if job.status == "waiting":
            job.status = "stopped"
        elif not job.ended and not job.stopping:
            job.stopping = True
            self._signal(signal.SIGINT)
        self._changed(job)

    def forget(self, job: Job) -> None:
        """Remove an ended job from the list. Its run stays."""
        if job.ended:
            self._jobs.pop(job.number, None)
            self.version += 1

    async def close(self) -> None:
        """Stop every job. A running training has CLOSE_SECONDS to save."""
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
                # Before the process is ready there is nothing to save.
                self._process.send_signal(number if self._is_ready else signal.SIGKILL)

    def _changed(self, job: Job) -> None:
        job.version += 1
        self.version += 1

    async def _run_all(self) -> None:
        while job := next((job for job in self.jobs if job.status == "waiting"), None):
            job.status = "reading"
            self._changed(job)
            try:
                await self._run(job)
            except Exception:
                log.exception("A training failed.")
                job.sentence = "An internal error of the server stopped the training. See the server's log."
                job.status = "failed"
            self._changed(job)

    async def _run(self, job: Job) -> None:
        spec = TrainingSpec(str(job.text), job.family, job.minutes, str(self._runs_dir))
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "serve.training_process", limit=MAX_LINE,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                # Ctrl-C in the server's terminal must not reach the process: the server stops it.
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            job.status, job.sentence = "failed", f"The training cannot start: {error.strerror or error}."
            return
        self._is_ready = False
        try:
            if job.stopping or self._closing:
                self._signal(signal.SIGKILL)
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            with contextlib.suppress(ConnectionError):
                process.stdin.write(json.dumps(asdict(spec)).encode() + b"\n")
                await process.stdin.drain()
            stderr, _ = await asyncio.gather(_read_end(process.stderr), self._read_events(job, process.stdout))
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
            self._process = None
        await self._finish(job, code, stderr)

    async def _read_events(self, job: Job, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than MAX_LINE
                continue
            if not line:
                return
            # A signal may cut a line.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event["event"] == "ready":
                    self._is_ready = True
                else:
                    job.apply(event)
                    self._changed(job)

    async def _finish(self, job: Job, code: int, stderr: str) -> None:
        job.share = None
        if job.report is not None and job.run is not None:
            try:
                await self._models.include(job.run)
            except (LMError, OSError) as error:
                log.error("Run %r cannot be served. %s", job.run, error)
            job.status = "stopped" if job.reason == "interrupted" else "done"
        elif job.sentence is not None:
            job.status = "failed"
        elif job.stopping or self._closing:
            job.status = "stopped"
        else:
            job.status, job.sentence = "failed", _exit_reason(job, code)
            log.error("A training failed.", extra={"fields": {"run": job.run, "exit_code": code, "stderr": stderr}})


async def _read_end(stream: asyncio.StreamReader) -> str:
    """The last MAX_LOGGED characters of a stream."""
    text = ""
    while block := await stream.read(1 << 16):
        text = (text + block.decode(errors="replace"))[-MAX_LOGGED:]
    return text


def _exit_reason(job: Job, code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = ", perhaps because the memory was full" if code == -signal.SIGKILL else ""
    saved = f" Run {job.run} has what was saved." if job.run else ""
    return f"The training {how}{why}. See the server's log.{saved}"
