"""Work of requests in threads: it ends before anybody else uses its data, and leaves threads for others."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from serve.event_loop import run_in_thread_if_large


def test_work_that_has_begun_is_over_when_a_timeout_ends_its_request() -> None:
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        time.sleep(0.2)
        ended.set()
        raise IndexError("of a request that nobody waits for")

    async def story() -> None:
        request = asyncio.create_task(run_in_thread_if_large(2, work, limit=1))
        assert await asyncio.to_thread(started.wait, 30)
        # As a timeout does.
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert ended.is_set()

    asyncio.run(story())


def test_requests_cannot_fill_the_threads_of_others_and_can_be_cancelled_while_they_wait() -> None:
    go_on, done = threading.Event(), []

    async def story() -> None:
        async with asyncio.timeout(30):
            held = [asyncio.create_task(run_in_thread_if_large(2, go_on.wait, limit=1)) for _ in range(40)]
            late = asyncio.create_task(run_in_thread_if_large(2, lambda: done.append("late"), limit=1))
            try:
                # What models are loaded with, and what is done at once.
                assert await asyncio.to_thread(lambda: 1) == 1
                assert await run_in_thread_if_large(1, lambda: 2, limit=1) == 2
                late.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await late
            finally:
                go_on.set()
            assert await asyncio.gather(*held) == [True] * 40
        assert not done

    asyncio.run(story())


def test_an_exception_of_the_work_is_raised() -> None:
    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            await run_in_thread_if_large(2, lambda: 1 // 0, limit=1)

    asyncio.run(story())
