"""One thread a model, which steps its engine; and the way of the news from there to the event loop.

    job = worker.start([Request(...)], live=True)
    try:
        while not job.done:
            await job.wait()
            for generation in job.generations:
                events = generation.take()
    finally:
        job.close()                                     # frees the slots of what has not ended

The engine's thread never waits for the event loop, and wakes it at most once a step: at once for the first text of a
job and for its end, and every `JOIN_SECONDS` for what comes between. A live job whose news pile up pauses, without
slots, until `news` is called again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from lm.generation.engine import Engine, Generation, Request

log = logging.getLogger(__name__)

JOIN_SECONDS = 0.02
"""Tokens that are ready within this time travel together."""
MOST_BEHIND = 40_000
"""Tokens and alternatives that are drawn before somebody takes them: then the job pauses. About 4 MB."""
LEAST_BEHIND = 2_000
"""What each of many prompts may have of them."""
STUCK_SECONDS = 120.0
"""A step that takes longer than this will not end."""


class EngineDeadError(Exception):
    """The engine met an error that it cannot go on from."""


class QueueFullError(Exception):
    """No more texts may wait."""


class Job:
    """The generations of one request; used from the event loop."""

    def __init__(
        self, worker: Worker, loop: asyncio.AbstractEventLoop, *, live: bool, count: int, sequences: int
    ) -> None:
        self.generations: list[Generation] = []
        self.live = live
        self.began = False
        """Whether its first news has been told; belongs to the engine's thread."""
        self.paused: set[Generation] = set()
        """Those that continue once their news are taken."""
        self.loop = loop
        self.count = count
        """Generations it will have."""
        self.sequences = sequences
        self._worker = worker
        self._told = asyncio.Event()
        self._closed = False

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return all(generation.done for generation in self.generations)

    async def wait(self) -> None:
        """Wait until there may be something to take. Who calls has taken, and passed on, what there was before.

        Raises:
            EngineDeadError: nothing will come any more.
        """
        if self.paused:
            self._worker.resume(self)
        await self._told.wait()
        self._told.clear()
        self._worker.check()

    def notify(self) -> None:
        """Wake who waits for news; on the event loop."""
        self._told.set()

    def close(self) -> None:
        """Give up what has not ended; its slots are free after the engine's next step."""
        if not self._closed:
            self._closed = True
            self._worker.finish(self)


class Worker:
    """The thread of one engine."""

    def __init__(self, engine: Engine, name: str, *, max_sequences: int) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        """What the engine died of."""
        self._max_sequences = max_sequences
        self._sequences = 0
        self._jobs: set[Job] = set()
        self._wake = threading.Event()
        self._stopping = False
        self._step_began: float | None = None
        # These belong to the engine's thread.
        self._now: set[Job] = set()
        self._soon: set[Job] = set()
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    # -- from the event loop --------------------------------------------------------------------

    @property
    def sequences(self) -> int:
        """Texts that are running or waiting."""
        return self._sequences

    @property
    def healthy(self) -> bool:
        """False once the engine has died, or hangs."""
        began = self._step_began
        stuck = began is not None and time.monotonic() - began > STUCK_SECONDS
        return self.error is None and not stuck and (self._thread.is_alive() or self._stopping)

    def check(self) -> None:
        """Raise EngineDeadError if the engine has died or was stopped: it would never answer."""
        if self.error is not None or self._stopping or not self._thread.is_alive():
            raise EngineDeadError

    def start(self, requests: Sequence[Request], *, live: bool) -> Job:
        """Hand requests to the engine.

        Args:
            requests: of one HTTP request.
            live: whether pieces are wanted as they are made, or only the end.

        Raises:
            EngineDeadError: there is nobody to hand them to.
            QueueFullError: too many texts are waiting.
            ConfigError: the engine refuses one of them.
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
                job.generations.append(self.engine.submit(request, lambda generation: self._note(job, generation)))
            # It may have died since it was asked, and then told nobody.
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
        """Continue what was paused."""
        while job.paused:
            self.engine.resume(job.paused.pop())
        self._wake.set()

    def stop(self) -> None:
        """End the thread after its step; what still runs is lost."""
        self._stopping = True
        self._wake.set()

    def join(self, seconds: float = 5.0) -> None:
        """Wait for the end of the thread."""
        self._thread.join(seconds)

    # -- the engine's thread ----------------------------------------------------------------------

    def _note(self, job: Job, generation: Generation) -> None:
        if job.live and not generation.done and generation.behind > max(LEAST_BEHIND, MOST_BEHIND // job.count):
            # What nobody reads must not fill the memory. The job is woken after this, and resumes it.
            self.engine.pause(generation)
            job.paused.add(generation)
        if generation.done or not job.began:
            if job.live or generation.done:
                job.began = True
                self._now.add(job)
        elif job.live:
            self._soon.add(job)

    def _run(self) -> None:
        told = time.monotonic()
        try:
            while not self._stopping:
                # Cleared before the step: who submits after it has looked finds the thread awake.
                self._wake.clear()
                self._step_began = now = time.monotonic()
                busy = self.engine.step()
                self._step_began = None
                if self._soon and (not busy or now - told >= JOIN_SECONDS):
                    self._now |= self._soon
                    self._soon.clear()
                    told = now
                if self._now:
                    self._notify(self._now)
                    self._now = set()
                if not busy:
                    self._wake.wait()
        except BaseException as error:
            self.error = error
            log.critical("The engine died.", exc_info=error)
        # Nothing more comes: whoever still waits is woken now.
        self._notify(set(self._jobs))

    @staticmethod
    def _notify(jobs: set[Job]) -> None:
        loops = {job.loop for job in jobs}
        for loop in loops:
            mine = [job for job in jobs if job.loop is loop]
            # A loop that is closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_notify_all, mine)


def _notify_all(jobs: list[Job]) -> None:
    for job in jobs:
        job.notify()
