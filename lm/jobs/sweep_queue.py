"""The queue of a sweep: its runs in processes, some of them at the same time.

    waiting ──► running (a process: lm.jobs.sweep_process) ──► finished | failed | stopped

A run that fails is recorded with its reason, and the queue continues. A full disk and Ctrl-C stop it: the running
trainings are saved, and the same queue continues them later.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lm.errors import RunError, RunLockedError
from lm.host import usable_threads
from lm.jobs.follow import Follower
from lm.jobs.sweep_process import RunTask
from lm.jobs.sweep_record import ENDED, Status, SweepFolder, SweepRun
from lm.training.callbacks import Callback, End, Row, Start, Tick, TimeLeft

POLL_SECONDS = 0.25
ORPHAN_SECONDS = 60.0
"""How long a sweep waits for a process of an earlier sweep that was killed: it saves its run and ends."""


@dataclass
class RunProgress(Callback):
    """One run as a table shows it; receives the events of its training."""

    run: SweepRun
    stage: str = "waiting"
    """waiting, preparing, training, measuring (the report), finished, failed or stopped."""
    share: float = 0.0
    """Of its plan, 0 to 1."""
    step: int = 0
    seconds: float = 0.0
    """Training time."""
    train_loss: float | None = None
    """Nats per token."""
    bits_per_byte: float | None = None
    """The lowest of the validations so far."""
    seconds_left: float | None = None
    _time_left: TimeLeft | None = field(default=None, repr=False)

    def on_start(self, start: Start) -> None:
        """See `Callback.on_start`."""
        self.stage, self._time_left, self.bits_per_byte = "training", TimeLeft(start), None

    def on_step(self, tick: Tick) -> None:
        """See `Callback.on_step`."""
        self.share, self.step, self.seconds = tick.progress, tick.step, tick.seconds

    def on_log(self, row: Row) -> None:
        """See `Callback.on_log`."""
        self.train_loss = row.get("train_loss") or self.train_loss
        bits = row.get("valid_bits_per_byte")
        if bits is not None and (self.bits_per_byte is None or bits < self.bits_per_byte):
            self.bits_per_byte = bits
        if self._time_left is not None:
            self._time_left.add(row)
            self.seconds_left = self._time_left.seconds(row["step"], row["seconds"])
        if self.share >= 1.0:
            self.stage, self.seconds_left = "measuring", None

    def on_end(self, end: End) -> None:
        """See `Callback.on_end`."""
        self.seconds = end.seconds


OnUpdate = Callable[[Sequence[RunProgress]], None]
"""Called several times a second with all runs, in the order of the queue."""


def threads_of(jobs: int) -> int:
    """CPU threads of each of `jobs` processes: OMP_NUM_THREADS, or a share of all."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(given) if given.isdigit() and int(given) > 0 else max(1, usable_threads() // jobs)


def run_queue(folder: SweepFolder, *, jobs: int = 1, on_update: OnUpdate | None = None) -> None:
    """Train the runs of a sweep that are not finished; the caller holds its lock.

    Args:
        folder: of the sweep; each change of a status is written.
        jobs: processes at the same time. They share the CPU threads evenly, unless OMP_NUM_THREADS is set.
        on_update: shows the progress.

    Raises:
        RunError: the disk is full.
        RunLockedError: a process that is not of this sweep trains one of its runs.
        KeyboardInterrupt: after the running trainings are saved.
    """
    queue = _Queue(folder, jobs, on_update)
    try:
        queue.run()
    except BaseException:
        queue.stop()
        raise


class _Process:
    """A run in training."""

    def __init__(self, folder: SweepFolder, progress: RunProgress, threads: int, *, was_started: bool) -> None:
        run, record = progress.run, folder.record
        config = record.config_of(run).model_dump(mode="json")
        task = RunTask(run.run, str(folder.runs_dir), config, record.data_dir, was_started)
        self._follower = Follower(folder.run_folder(run), progress)
        # Closed in `result`.
        self._out, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lm.jobs.sweep_process"], stdin=subprocess.PIPE, stdout=self._out,
            stderr=self._errors, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            # Ctrl-C in the terminal must not reach the process: the queue stops it.
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        # A process that ended already has its reason on stderr.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
            self._process.stdin.flush()

    def has_ended(self) -> bool:
        """Whether the process is over; reads new lines of the metrics."""
        # Checked before the lines are read, so that the last ones are not missed.
        ended = self._process.poll() is not None
        self._follower.read()
        return ended

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Let the process save its run and end; SIGKILL ends it at once."""
        self._process.send_signal(number)

    def result(self) -> dict[str, Any]:
        """The last line that the process wrote, after its end."""
        code = self._process.wait()
        texts = []
        for file in (self._out, self._errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace").strip().splitlines())
            file.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        lines, errors = texts
        if lines:
            found: dict[str, Any] = json.loads(lines[-1])
            return found
        if code < 0:
            name = signal.Signals(-code).name
            why = " Perhaps the memory was not enough." if -code == signal.SIGKILL else ""
            return {"event": "failed", "sentence": f"The process was ended by {name}.{why}"}
        return {"event": "failed", "sentence": errors[-1] if errors else f"The process ended with code {code}."}


class _Queue:
    def __init__(self, folder: SweepFolder, jobs: int, on_update: OnUpdate | None) -> None:
        self._folder, self._jobs, self._on_update = folder, jobs, on_update
        self._threads = threads_of(jobs)
        self._progress = [RunProgress(run, stage=run.status) for run in folder.record.runs]
        self._running: dict[int, _Process] = {}

    def run(self) -> None:
        """Train all runs that wait."""
        waiting = deque(place for place, each in enumerate(self._progress) if each.run.status not in ENDED)
        for each in self._progress:
            self._show_earlier(each)
        self._await_orphans([self._progress[place].run for place in waiting])
        while waiting or self._running:
            while waiting and len(self._running) < self._jobs:
                self._start(waiting.popleft())
            for place, process in list(self._running.items()):
                if process.has_ended():
                    self._finish(place)
            self._update()
            if waiting or self._running:
                time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Save and end all running trainings; a second Ctrl-C ends them at once."""
        for process in self._running.values():
            process.stop()
        try:
            while not all(process.has_ended() for process in self._running.values()):
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            for process in self._running.values():
                process.stop(signal.SIGKILL)
        for place, process in list(self._running.items()):
            self._set(place, "finished" if process.result()["event"] == "finished" else "stopped")
            del self._running[place]
        self._update()

    def _update(self) -> None:
        if self._on_update is not None:
            self._on_update(self._progress)

    def _show_earlier(self, progress: RunProgress) -> None:
        """Read the metrics of a run that an earlier process trained."""
        if progress.run.status != "waiting":
            Follower(self._folder.run_folder(progress.run), progress).read()
            progress.stage = progress.run.status if progress.run.status in ENDED else "waiting"

    def _await_orphans(self, runs: Sequence[SweepRun]) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        for run in runs:
            while self._folder.run_folder(run).is_training:
                if time.monotonic() > deadline:
                    raise RunLockedError(f"Another process trains run {run.run!r}: wait for it, or stop it.")
                time.sleep(POLL_SECONDS)

    def _start(self, place: int) -> None:
        progress = self._progress[place]
        was_started = progress.run.status != "waiting"
        # Recorded before it begins: after a kill, a folder of that name is known as the sweep's own.
        self._set(place, "running")
        try:
            self._running[place] = _Process(self._folder, progress, self._threads, was_started=was_started)
        except OSError as error:
            raise RunError(f"The process of {progress.run.run!r} cannot start: {error.strerror or error}.") from error

    def _finish(self, place: int) -> None:
        result = self._running.pop(place).result()
        match result["event"]:
            case "finished":
                self._set(place, "finished")
            case "failed" if result.get("is_disk_full"):
                self._set(place, "stopped", result["sentence"])
                raise RunError(
                    f"{result['sentence']} The sweep stopped. Make room, then continue it: lm sweep --resume "
                    f"{self._folder.record.name}"
                )
            case "failed":
                self._set(place, "failed", result["sentence"])
            case _:
                # Somebody else sent the signal.
                self._set(place, "stopped", "Somebody stopped its process.")

    def _set(self, place: int, status: Status, sentence: str | None = None) -> None:
        self._folder.set_status(place, status, sentence)
        progress = self._progress[place]
        progress.run = self._folder.record.runs[place]
        progress.stage = "preparing" if status == "running" else status
        if status != "running":
            progress.seconds_left = None
