"""Long work of a request runs in a thread, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LARGE = 4096
"""Characters or numbers above which work leaves the event loop."""
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="request")
"""For requests only: models load in asyncio's own threads, which requests must not fill."""


async def run_in_thread_if_large(size: int, work: Callable[[], T], *, limit: int = LARGE) -> T:
    """The result of `work`; it runs in a thread if `size` is above `limit`.

    Work that has started is finished when this returns or raises, also if the caller is cancelled. So no other code
    uses its data at the same time.
    """
    if size <= limit:
        return work()
    job = _THREADS.submit(work)
    result = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(result)
    except asyncio.CancelledError:
        if not job.cancel():
            await asyncio.wait((result,))
            # Read it, or asyncio logs an exception that no code reads.
            result.exception()
        raise
