"""From what a visitor asks for to the engine, and what comes back while it is made.

    async for written in write(page, "shakespeare-gru", "ROMEO:", SamplingOptions(seed=7)):
        print(written.texts[0], written.tokens_per_second)

The text is the one that the command line and the API give for the same request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lm.generation.options import SamplingOptions
from lm.generation.request import Generation, Request, Score
from serve.api.streaming import beside
from serve.engines.limits import check_length, check_sampling
from serve.engines.model_pool import Lease, Model
from serve.engines.worker import EngineDeadError, Job
from serve.http_errors import RequestError, engine_died
from serve.page.site import Page

PACE_SECONDS = 0.08
"""Between two looks at a text that is being written: quick to the eye, and little work for many visitors."""

LONGEST_TOKEN = 16
"""Characters of a token, on average, in the longest text that is read."""

Prompt = str | tuple[int, ...]
"""A text, read after the model's start token; or exactly the ids to read."""


@dataclass
class Written:
    """What a request has given so far."""

    prompt: tuple[int, ...]
    """The ids that were read, the start token included."""
    texts: list[str]
    """One a sample."""
    tokens: list[list[int]]
    scores: list[list[Score]]
    """Where `logprobs` was asked for."""
    reasons: list[str | None]
    """Why each ended: "length", "stop"."""
    seconds: float = 0.0
    done: bool = False
    stopped: bool = False
    """Whether whoever listens had enough before it was done."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.done or self.stopped

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """Of all samples together."""
        return sum(map(len, self.tokens)) / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Reading:
    """A text that was read, with how much each token surprised."""

    model: Model
    text: str
    tokens: tuple[int, ...]
    """Without the start token."""
    scores: tuple[Score, ...]
    """One a token."""
    offsets: list[int] = field(repr=False)
    """Where in the text each token begins, in characters."""


class Turns:
    """The texts that one visitor has written in a tab: at most one at a time; used from the event loop."""

    def __init__(self) -> None:
        self._stops: list[asyncio.Event] = []
        self._turn = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """Whether anything is written, or waits to be."""
        return bool(self._stops)

    def stop(self) -> None:
        """End the writing, and those that wait to begin. Each still gives what it has."""
        for stop in self._stops:
            stop.set()

    async def rest(self) -> None:
        """Stop, and wait until nothing is written any more."""
        self.stop()
        async with self._turn:
            pass

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[asyncio.Event]:
        """The time of one writing, which begins when the last one has ended; gives the event that ends it."""
        self.stop()
        stop = asyncio.Event()
        self._stops.append(stop)
        try:
            async with self._turn:
                yield stop
        finally:
            self._stops.remove(stop)


@contextlib.asynccontextmanager
async def leased(page: Page, name: str | None) -> AsyncIterator[Lease]:
    """The model, loaded, for as long as it is used.

    Raises:
        RequestError: it is not on offer, or cannot be loaded; or there is none at all.
    """
    lease = await page.models.lease(name)
    try:
        yield lease
    finally:
        lease.close()


async def write(
    page: Page, name: str | None, prompt: Prompt, options: SamplingOptions, *, stop: asyncio.Event | None = None
) -> AsyncGenerator[Written, None]:
    """What is written so far, every PACE_SECONDS, and at the end; who stops listening frees the slots.

    Args:
        page: with the models.
        name: of the model; None is the first.
        prompt: what stands before.
        options: how to draw.
        stop: ends it early; what was written until then comes once more, as `stopped`.

    Raises:
        RequestError, LMError: what was asked for cannot be done.
    """
    check_sampling(options, page.options, 1, stream=True)
    async with leased(page, name) as lease:
        ids = await _ids(page, lease.model, prompt)
        job = lease.model.worker.start([Request(ids, options)], live=True)
        stop = stop or asyncio.Event()
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: job.notify())
        try:
            generation, n = job.generations[0], options.n
            written = Written(ids, [""] * n, [[] for _ in range(n)], [[] for _ in range(n)], [None] * n)
            begun = shown = time.monotonic()
            while not written.ended:
                await _news(page, lease, job, begun)
                written.done = job.done
                written.stopped = stop.is_set() and not written.done
                _take(generation, written)
                now = time.monotonic()
                if written.ended or now - shown >= PACE_SECONDS or shown == begun:
                    written.seconds, shown = now - begun, now
                    yield written
        finally:
            stopping.cancel()
            job.close()


def _take(generation: Generation, written: Written) -> None:
    for event in generation.take():
        written.texts[event.index] += event.text
        written.tokens[event.index] += event.tokens
        written.scores[event.index] += event.scores
        written.reasons[event.index] = event.finish_reason
        if event.finish_reason == "error":
            raise RequestError(500, "The engine failed while it wrote; the server's log says more.")


async def read(page: Page, name: str | None, text: str, *, top: int = 0) -> Reading:
    """Read a text, and tell how likely each token was, with `top` alternatives each.

    Raises:
        RequestError, LMError: the text is empty or too long, or the model cannot be used.
    """
    async with leased(page, name) as lease:
        ids = await _ids(page, lease.model, text)
        if len(ids) == 1:
            raise RequestError(400, "There is no text to read: paste some.")
        generation = await _prefill(
            page, lease, Request(ids, SamplingOptions(max_tokens=0, logprobs=top), score_prompt=True)
        )
        scores = tuple(score for score in generation.prompt_scores if score is not None)
        _, offsets = lease.model.tokens.offsets(ids[1:])
        return Reading(lease.model, text, ids[1:], scores, offsets)


async def next_logits(page: Page, name: str | None, prompt: Prompt) -> tuple[Model, npt.NDArray[np.float32]]:
    """The model, and its logits (1, V) of what follows a prompt.

    Raises:
        RequestError, LMError: the model cannot be used, or the prompt is too long.
    """
    async with leased(page, name) as lease:
        ids = await _ids(page, lease.model, prompt)
        generation = await _prefill(page, lease, Request(ids, SamplingOptions(max_tokens=0), keep_logits=True))
        assert generation.logits is not None, "what was asked for is there"
        return lease.model, generation.logits


async def _prefill(page: Page, lease: Lease, request: Request) -> Generation:
    job = lease.model.worker.start([request], live=False)
    try:
        begun = time.monotonic()
        while not job.done:
            await _news(page, lease, job, begun)
        return job.generations[0]
    finally:
        job.close()


async def _ids(page: Page, model: Model, prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, str):
        most = LONGEST_TOKEN * page.options.max_prompt_tokens
        if len(prompt) > most:
            # Before it is cut into tokens, which takes time.
            raise RequestError(400, f"The text has {len(prompt):,} characters: the page reads at most {most:,}.")
        ids = await beside(len(prompt), lambda: model.tokens.read_from(prompt))
    else:
        ids = prompt
        model.tokenizer.checked(ids)
    check_length(len(ids) - 1, page.options)
    return ids


async def _news(page: Page, lease: Lease, job: Job, begun: float) -> None:
    try:
        async with _until(begun + page.options.timeout_seconds):
            await job.wait()
    except EngineDeadError:
        raise engine_died(lease.model.name) from None


@contextlib.asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise RequestError(504, "That took too long and was given up. Ask for less.", code="timeout") from None
