"""Long work of a request runs in a thread, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LARGE = 4096
"""Characters or numbers above which work leaves the event loop."""


async def run_in_thread_if_large(size: int, work: Callable[[], T], *, limit: int = LARGE) -> T:
    """The result of `work`; it runs in a thread if `size` is above `limit`."""
    return await asyncio.to_thread(work) if size > limit else work()
