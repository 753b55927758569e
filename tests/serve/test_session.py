"""A generation session, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from serve.engines.model_pool import ModelPool
from serve.engines.session import Events, GenerationSession
from serve.http_errors import RequestError
from serve.settings import ServeOptions

pytestmark = pytest.mark.slow

Open = Callable[[], Coroutine[Any, Any, GenerationSession]]


def with_sessions(runs: Path, use: Callable[[Open], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run `use` with a function that opens sessions. At the end no model is in use."""
    options = ServeOptions(runs=("gru",), runs_dir=runs, **settings)
    models = ModelPool(options)

    async def main() -> None:
        await use(lambda: GenerationSession.open(models, options, None))
        assert not models.in_use

    try:
        asyncio.run(main())
    finally:
        models.close()


def join(events: Events) -> str:
    return "".join(event.text for _, event in events)


def test_the_events_join_to_the_text_and_the_usage_counts_the_tokens(runs: Path):
    async def use(open_session: Open) -> None:
        for live in (True, False):
            async with await open_session() as session:
                prompt = await session.tokenize("the cat")
                session.start([Request(prompt, SamplingOptions(max_tokens=20, seed=3))], live=live, prompt_tokens=7)
                assert "".join([text async for text in session.updates(join)]) == expected and session.done
            assert (session.usage.prompt_tokens, session.usage.completion_tokens) == (7, 20)
            assert session.first_text_seconds is not None and session.first_text_seconds <= session.seconds

    expected = lm.load("gru", runs_dir=runs).sample("the cat", max_tokens=20, seed=3)
    with_sessions(runs, use)


def test_a_cancelled_session_ends_and_its_unread_events_can_be_taken(runs: Path):
    async def use(open_session: Open) -> None:
        async with await open_session() as session:
            session.start([Request(session.encode("the"), SamplingOptions(max_tokens=16_000, seed=3))], live=True)
            text = ""
            async for part in session.updates(join):
                text += part
                await asyncio.sleep(0.1)
                session.cancel()
            assert session.cancelled and text and expected.startswith(text + join(session.take()))

    expected = lm.load("gru", runs_dir=runs).sample("the", max_tokens=16_000, seed=3)
    with_sessions(runs, use)


def test_a_session_beyond_its_time_limit_is_a_504(runs: Path):
    async def use(open_session: Open) -> None:
        async with await open_session() as session:
            session.start([Request(session.encode("the"), SamplingOptions(max_tokens=16_000))], live=False)
            with pytest.raises(RequestError, match=r"took longer than 0\.05 seconds") as raised:
                await session.wait()
            assert (raised.value.status_code, raised.value.code) == (504, "timeout")
            with pytest.raises(RequestError, match="took longer"):
                session.check_time()

    with_sessions(runs, use, timeout_seconds=0.05)


def test_a_prompt_that_is_refused_gives_the_model_back(runs: Path):
    async def use(open_session: Open) -> None:
        session = await open_session()
        with pytest.raises(RequestError, match="has 51 tokens"), session.closed_on_error():
            await session.tokenize("a" * 51)
        # Given ids count as they are, the start token included.
        with pytest.raises(RequestError, match="has 51 tokens"):
            session.encode([0] * 51)
        assert len(session.encode("a" * 50)) == 51

    with_sessions(runs, use, max_prompt_tokens=50)
