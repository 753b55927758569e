"""One thread for each model: it steps the engine and notifies the event loop.

    job = worker.start([Request(...)], live=True)
    try:
        while not job.done:
            await job.wait()
            for generation in job.generations:
                events = generation.take()
    finally:
        job.close()                                     # frees the slots

The engine's thread never waits for the event loop. It wakes the loop at most once a step: at once for the first event
and the last event of a job, and every `BATCH_SECONDS` for the events in between. A live job with too many unread events
pauses and frees its slots, until the next call of `wait`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Sequence

from lm.generation.engine import Engine, Generation, Request

log = logging.getLogger(__name__)

BATCH_SECONDS = 0.02
"""Events within this time are delivered together."""
MAX_UNREAD = 40_000
"""Unread tokens and alternatives of a job before it pauses: about 4 MB."""
MIN_UNREAD = 2_000
"""The share of that for each prompt of a job with many."""
STUCK_SECONDS = 120.0
"""An engine is dead if one step takes longer."""


class EngineDeadError(Exception):
    """The engine has failed and cannot continue."""


class QueueFullError(Exception):
    """The queue of texts is full."""


class Job:
    """The generations of one request. Used from the event loop."""

    def __init__(
        self, worker: Worker, loop: asyncio.AbstractEventLoop, *, live: bool, count: int, sequences: int
    ) -> None:
        self.generations: list[Generation] = []
        self.live = live
        self.loop = loop
        self.count = count
        """Number of generations."""
        self.sequences = sequences
        """Number of texts."""
        self.has_notified = False
        """Whether the first event was announced. Only the engine's thread uses it."""
        self.paused: set[Generation] = set()
        self._worker = worker
        self._event = asyncio.Event()
        self._closed = False

    @property
    def done(self) -> bool:
        """Whether every generation has ended."""
        return all(generation.done for generation in self.generations)

    async def wait(self) -> None:
        """Wait for new events. The caller has read the previous ones: paused generations continue.

        Raises:
            EngineDeadError: there will be no more events.
        """
        if self.paused:
            self._worker.resume(self)
        await self._event.wait()
        self._event.clear()
        self._worker.check()

    def notify(self) -> None:
        """Wake `wait`. On the event loop."""
        self._event.set()

    def close(self) -> None:
        """Cancel what still runs; its slots are free after the engine's next step."""
        if not self._closed:
            self._closed = True
            self._worker.finish(self)


class Worker:
    """The thread of one engine."""

    def __init__(self, engine: Engine, name: str, *, max_sequences: int) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        """The error that ended the engine."""
        self._max_sequences = max_sequences
        self._sequences = 0
        """Texts that run or wait."""
        self._jobs: set[Job] = set()
        self._wake = threading.Event()
        self._stopping = False
        self._step_started: float | None = None
        # Jobs to notify after this step, and with the next batch. Only the engine's thread uses them.
        self._due: set[Job] = set()
        self._batched: set[Job] = set()
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the engine has not failed and no step hangs."""
        started = self._step_started
        stuck = started is not None and time.monotonic() - started > STUCK_SECONDS
        return self.error is None and not stuck and (self._thread.is_alive() or self._stopping)

    def check(self) -> None:
        """Raise EngineDeadError if the engine has failed or was stopped."""
        if self.error is not None or self._stopping or not self._thread.is_alive():
            raise EngineDeadError

    def start(self, requests: Sequence[Request], *, live: bool) -> Job:
        """Give requests to the engine.

        Args:
            requests: of one HTTP request.
            live: notify for each new event, or only at the end.

        Raises:
            EngineDeadError: the engine has failed.
            QueueFullError: too many texts wait.
            ConfigError: the engine cannot run a request.
        """
        self.check()
        texts = sum(max(r.options.n, r.options.best_of or 1, r.options.num_beams or 1) for r in requests)
        if self._sequences + texts > self._max_sequences:
            raise QueueFullError
        job = Job(self, asyncio.get_running_loop(), live=live, count=len(requests), sequences=texts)
        self._sequences += texts
        self._jobs.add(job)
        try:
            for request in requests:
                job.generations.append(self.engine.submit(request, lambda generation: self._on_event(job, generation)))
            # The engine may have failed since the first check, when it did not know the job.
            self.check()
        except BaseException:
            job.close()
            raise
        self._wake.set()
        return job

    def finish(self, job: Job) -> None:
        """See `Job.close`."""
        self._jobs.discard(job)
        self._sequences -= job.sequences
        for generation in job.generations:
            if not generation.done:
                self.engine.cancel(generation)
        self._wake.set()

    def resume(self, job: Job) -> None:
        """Continue the paused generations of a job."""
        while job.paused:
            self.engine.resume(job.paused.pop())
        self._wake.set()

    def stop(self) -> None:
        """End the thread after its step. Running texts are lost."""
        self._stopping = True
        self._wake.set()

    def join(self, seconds: float = 5.0) -> None:
        """Wait for the end of the thread."""
        self._thread.join(seconds)

    # -- the engine's thread ----------------------------------------------------------------------

    def _on_event(self, job: Job, generation: Generation) -> None:
        if job.live and not generation.done and generation.behind > max(MIN_UNREAD, MAX_UNREAD // job.count):
            # Unread events must not fill the memory. The job is notified below, and its next wait resumes it.
            self.engine.pause(generation)
            job.paused.add(generation)
        if generation.done or (job.live and not job.has_notified):
            job.has_notified = True
            self._due.add(job)
        elif job.live:
            self._batched.add(job)

    def _run(self) -> None:
        last_batch = time.monotonic()
        try:
            while not self._stopping:
                # Cleared before the step: a request that arrives during the step wakes the thread again.
                self._wake.clear()
                self._step_started = now = time.monotonic()
                busy = self.engine.step()
                self._step_started = None
                if self._batched and (not busy or now - last_batch >= BATCH_SECONDS):
                    self._due |= self._batched
                    self._batched.clear()
                    last_batch = now
                if self._due:
                    self._notify(self._due)
                    self._due = set()
                if not busy:
                    self._wake.wait()
        except BaseException as error:
            self.error = error
            log.critical("The engine died.", exc_info=error)
        # Wake every job that waits: there will be no more events.
        self._notify(set(self._jobs))

    @staticmethod
    def _notify(jobs: Iterable[Job]) -> None:
        for loop in {job.loop for job in jobs}:
            # A closed loop has no waiting jobs.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_notify_all, [job for job in jobs if job.loop is loop])


def _notify_all(jobs: list[Job]) -> None:
    for job in jobs:
        job.notify()
