"""Saving beside training: what is saved is copied by the thread that trains, and packed, written and synced by another.

Jobs are done one by one in the order of asking, so that the files on disk are at every instant those of some instant of
training without this thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

log = logging.getLogger(__name__)

MOST_WAITING = 3
"""Jobs handed over and not done: the best weights, kept weights and `last/` of one validation. Bounds the memory."""

Job = Callable[[], None]


class Writer:
    """One thread that writes; a context manager, which does not end before everything is written.

    What fails is raised by the next call, and nothing that was handed over after it is written: a `last/` that speaks
    of best weights which are not there would be worse than an old one.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._jobs: deque[tuple[Future[None], Job | None]] = deque()
        self._failed = False

    def write(self, job: Job, then: Job | None = None) -> None:
        """Have `job` done, after all jobs before it; `then` is called by this thread once that is known.

        Waits where too many jobs are waiting.
        """
        self.poll()
        while len(self._jobs) >= MOST_WAITING:
            self._take()
        self._jobs.append((self._thread.submit(self._do, job), then))

    def poll(self) -> None:
        """Raise what failed since the last call; waits for nothing."""
        while self._jobs and self._jobs[0][0].done():
            self._take()

    def finish(self) -> None:
        """Wait until everything is written."""
        while self._jobs:
            self._take()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
                return
            # Whatever ends the training, what it had handed over is written; that error is the one to raise.
            wait([job for job, _ in self._jobs])
            for job, _ in self._jobs:
                if (failure := job.exception()) is not None:
                    log.warning("%s", failure)
        finally:
            self._thread.shutdown()

    def _take(self) -> None:
        job, then = self._jobs.popleft()
        job.result()
        if then is not None:
            then()

    def _do(self, job: Job) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise
