"""Writing in the background: the training thread copies, and another thread packs, writes and syncs.

Jobs run one by one in the order of `write`, so the files on disk are always those of some moment of training.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

log = logging.getLogger(__name__)

MAX_WAITING = 3
"""Jobs not done: the best weights, a kept checkpoint and `last/` of one validation. It bounds the memory."""

Job = Callable[[], None]


class Writer:
    """A context manager with one thread that writes; it exits after everything is written.

    The next call raises the error of a job. Jobs after a failed one are not run: a `last/` that refers to missing best
    weights would be worse than an old one.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._jobs: deque[tuple[Future[None], Job | None]] = deque()
        self._failed = False

    def write(self, job: Job, then: Job | None = None) -> None:
        """Run `job` after all jobs before it; a later call of this thread then runs `then`.

        Waits if `MAX_WAITING` jobs are not done.
        """
        self.poll()
        while len(self._jobs) >= MAX_WAITING:
            self._take()
        self._jobs.append((self._thread.submit(self._run, job), then))

    def poll(self) -> None:
        """Raise the error of a job, without waiting."""
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
            # Training failed: its jobs are still written, but its own error is raised.
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

    def _run(self, job: Job) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise
