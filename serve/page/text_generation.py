"""Generate and score texts for the page, through the session that the API uses too.

    async for result in generate(page, "shakespeare-gru", "ROMEO:", SamplingOptions(seed=7)):
        print(result.texts[0], result.tokens_per_second)

The same request gives the same text on the command line and in the API.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lm.generation.options import SamplingOptions
from lm.generation.request import Generation, Request, Score
from serve.engines.limits import check_length, check_sampling
from serve.engines.model_pool import Model
from serve.engines.session import Events, GenerationSession
from serve.http_errors import RequestError
from serve.page.context import Page

UPDATE_SECONDS = 0.08
"""Time between two updates of a text on the page."""

MAX_CHARACTERS_PER_TOKEN = 16
"""Average of the longest text that the page accepts."""

Prompt = str | tuple[int, ...]
"""A text, read after the start token; or the ids to read, start token included."""


def longest_text(page: Page) -> int:
    """Characters of the longest text to measure. It travels in the body of a request, not as a file."""
    return min(MAX_CHARACTERS_PER_TOKEN * page.options.max_prompt_tokens, int(page.options.max_body) // 4)


@dataclass
class GeneratedText:
    """What a request has generated so far; each list has one item a sample."""

    model: Model
    texts: list[str]
    tokens: list[list[int]]
    scores: list[list[Score]]
    """Empty unless `logprobs` is set."""
    finish_reasons: list[str | None]
    """Why each sample ended ("length", "stop"); None while it runs."""
    seconds: float = 0.0
    stopped: bool = False
    """Whether `stop` ended the request."""

    @property
    def done(self) -> bool:
        """Whether every sample is complete."""
        return None not in self.finish_reasons

    @property
    def ended(self) -> bool:
        """Whether this is the last update."""
        return self.done or self.stopped

    @property
    def max_length(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """Speed of all samples together."""
        return sum(map(len, self.tokens)) / max(self.seconds, 1e-9)

    def add(self, events: Events) -> None:
        """Append new events."""
        for _, event in events:
            self.texts[event.index] += event.text
            self.tokens[event.index] += event.tokens
            self.scores[event.index] += event.scores
            # A cancelled sample is not complete.
            self.finish_reasons[event.index] = None if event.finish_reason == "cancelled" else event.finish_reason


@dataclass(frozen=True)
class ScoredText:
    """A text with the log-probability of each token."""

    model: Model
    text: str
    tokens: tuple[int, ...]
    """(N,) without the start token."""
    scores: tuple[Score, ...]
    """(N,)"""
    offsets: list[int] = field(repr=False)
    """(N,) position in the text at which each token begins, in characters."""


class GenerationLock:
    """Runs at most one generation of a visitor at a time; used from the event loop."""

    def __init__(self) -> None:
        self._stops: list[asyncio.Event] = []
        self._lock = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a generation runs or waits."""
        return bool(self._stops)

    def stop(self) -> None:
        """Stop the running generation and those that wait. Each still gives its last update."""
        for stop in self._stops:
            stop.set()

    async def stop_and_wait(self) -> None:
        """Stop, and wait until no generation runs."""
        self.stop()
        async with self._lock:
            pass

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[asyncio.Event]:
        """Stop the others, wait for their end, and hold the lock; gives the event that stops this generation."""
        self.stop()
        stop = asyncio.Event()
        self._stops.append(stop)
        try:
            async with self._lock:
                yield stop
        finally:
            self._stops.remove(stop)


async def generate(
    page: Page, name: str | None, prompt: Prompt, options: SamplingOptions, *, stop: asyncio.Event | None = None
) -> AsyncGenerator[GeneratedText, None]:
    """Give the text so far every UPDATE_SECONDS, and at the end. To close the generator frees the slots.

    Args:
        page: for its models and options.
        name: of the model; None is the first one.
        prompt: what the model continues.
        options: of the sampler.
        stop: ends the request; the last update is then `stopped`, with all that was generated.

    Raises:
        RequestError, LMError: the request is invalid, or the model cannot be used.
    """
    check_sampling(options, page.options, 1, stream=True)
    async with await GenerationSession.open(page.models, page.options, name) as session:
        ids, n = await _tokenize(page, session, prompt), options.n
        session.start([Request(ids, options)], live=True)
        result = GeneratedText(session.model, [""] * n, [[] for _ in range(n)], [[] for _ in range(n)], [None] * n)
        stopping = asyncio.create_task(_cancel_after(stop or asyncio.Event(), session))
        try:
            shown = None
            async for _ in session.updates(result.add):
                if not result.done and (shown is None or session.seconds - shown >= UPDATE_SECONDS):
                    result.seconds = shown = session.seconds
                    yield result
            result.add(session.take())
            result.seconds, result.stopped = session.seconds, not result.done
            yield result
        finally:
            stopping.cancel()


async def _cancel_after(stop: asyncio.Event, session: GenerationSession) -> None:
    await stop.wait()
    session.cancel()


async def score(page: Page, name: str | None, text: str, *, top: int = 0) -> ScoredText:
    """The log-probability of each token of a text, with `top` alternatives each.

    Raises:
        RequestError, LMError: the text is empty or too long, or the model cannot be used.
    """
    async with await GenerationSession.open(page.models, page.options, name) as session:
        ids = await _tokenize(page, session, text)
        if len(ids) == 1:
            raise RequestError(400, "The text is empty. Paste a text first.")
        options = SamplingOptions(max_tokens=0, logprobs=top)
        generation = await _prefill(session, Request(ids, options, score_prompt=True))
        scores = tuple(score for score in generation.prompt_scores if score is not None)
        _, offsets = session.model.tokens.offsets(ids[1:])
        return ScoredText(session.model, text, ids[1:], scores, offsets)


async def next_logits(page: Page, name: str | None, prompt: Prompt) -> tuple[Model, npt.NDArray[np.float32]]:
    """The model, and its logits (1, V) of the token after a prompt.

    Raises:
        RequestError, LMError: the model cannot be used, or the prompt is too long.
    """
    async with await GenerationSession.open(page.models, page.options, name) as session:
        ids = await _tokenize(page, session, prompt)
        generation = await _prefill(session, Request(ids, SamplingOptions(max_tokens=0), keep_logits=True))
        assert generation.logits is not None, "keep_logits is set"
        return session.model, generation.logits


async def tokenize(page: Page, name: str | None, text: str) -> tuple[Model, tuple[int, ...]]:
    """The model, and the ids of a text, start token included.

    Raises:
        RequestError, LMError: the model cannot be used, or the text is too long.
    """
    async with await GenerationSession.open(page.models, page.options, name) as session:
        return session.model, await _tokenize(page, session, text)


async def _prefill(session: GenerationSession, request: Request) -> Generation:
    session.start([request], live=False)
    await session.wait()
    return session.generations[0]


async def _tokenize(page: Page, session: GenerationSession, prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, str):
        limit = MAX_CHARACTERS_PER_TOKEN * page.options.max_prompt_tokens
        if len(prompt) > limit:
            # Checked first: to tokenize a text takes time.
            raise RequestError(400, f"The text has {len(prompt):,} characters. The limit is {limit:,}.")
        return await session.tokenize(prompt)
    check_length(len(prompt) - 1, page.options)
    session.model.tokenizer.checked(prompt)
    return prompt
