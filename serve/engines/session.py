"""One request for text, from the model to the last token. The API and the page share it; it knows no HTTP.

    async with await GenerationSession.open(models, options, "shakespeare-gru") as session:
        prompt = await session.tokenize("ROMEO:")
        session.start([Request(prompt, SamplingOptions(seed=7))], live=True)
        async for events in session.updates(list):
            for prompt_index, event in events:
                print(event.text, end="")
    print(session.usage)

The session keeps the model loaded until it is closed, and ends the request when it takes too long, when the engine
dies, or on `cancel`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from lm.generation.request import Event, Generation, Request
from lm.tokenizers.base import UnknownPolicy
from serve.engines.limits import check_length
from serve.engines.model_pool import Lease, Model, ModelPool
from serve.engines.worker import EngineDeadError, Job, QueueFullError
from serve.event_loop import run_in_thread_if_large
from serve.http_errors import RequestError, engine_died, too_many_requests
from serve.settings import ServeOptions, retry_after

T = TypeVar("T")

Events = list[tuple[int, Event]]
"""New events, each with the index of its request in `start`."""


@dataclass(frozen=True)
class SessionUsage:
    """Tokens of a session."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens from the prefix cache."""


class GenerationSession:
    """A leased model and the job that runs on it. Used from the event loop, except `encode`."""

    def __init__(self, lease: Lease, options: ServeOptions) -> None:
        self._lease, self.options = lease, options
        self.model: Model = lease.model
        self.cancelled = False
        self.first_text_seconds: float | None = None
        """Seconds from `start` to the first event."""
        self._job: Job | None = None
        self._prompt_tokens = 0
        self._started = time.monotonic()

    @classmethod
    async def open(cls, models: ModelPool, options: ServeOptions, model: str | None) -> Self:
        """Lease a model; None is the first one.

        Raises:
            RequestError: 404 no such model, 503 no memory for it, 500 it cannot be loaded.
        """
        return cls(await models.lease(model), options)

    @property
    def generations(self) -> Sequence[Generation]:
        """One for each request given to `start`."""
        return () if self._job is None else self._job.generations

    @property
    def done(self) -> bool:
        """Whether the engine has finished every generation."""
        return self._job is not None and self._job.done

    @property
    def seconds(self) -> float:
        """Seconds since `start`."""
        return time.monotonic() - self._started

    @property
    def usage(self) -> SessionUsage:
        """Tokens so far."""
        usages = [generation.usage for generation in self.generations]
        cached = min(sum(usage.cached_tokens for usage in usages), self._prompt_tokens)
        return SessionUsage(self._prompt_tokens, sum(usage.drawn_tokens for usage in usages), cached)

    def encode(self, prompt: str | Sequence[int], unknown: UnknownPolicy | None = None) -> tuple[int, ...]:
        """Ids of a prompt: the start token and the tokens of a text, or the given ids. Runs in any thread.

        Raises:
            RequestError: the prompt is too long.
            TokenizerError, ConfigError: it cannot be tokenized.
        """
        if isinstance(prompt, str):
            return self.model.tokens.read_from(prompt, unknown, check=lambda n: check_length(n, self.options))
        check_length(len(prompt), self.options)
        self.model.tokenizer.checked(prompt)
        return tuple(prompt)

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> tuple[str, tuple[int, ...]]:
        """The text and the ids of a chat by the model's chat template. Runs in any thread.

        Args:
            turns: role and content; a developer is the system for a template.

        Raises:
            RequestError: the chat is too long.
            TokenizerError: the template refuses the messages.
        """
        roles = {"developer": "system"}
        tokenizer = self.model.tokenizer
        text = tokenizer.render_chat([{"role": roles.get(role, role), "content": said} for role, said in turns])
        ids = tokenizer.encode_rendered(text)
        check_length(len(ids), self.options)
        return text, tuple(ids.tolist())

    async def tokenize(self, prompt: str | Sequence[int], unknown: UnknownPolicy | None = None) -> tuple[int, ...]:
        """`encode`, in a thread if the prompt is long."""
        return await run_in_thread_if_large(len(prompt), lambda: self.encode(prompt, unknown))

    def start(self, requests: Sequence[Request], *, live: bool, prompt_tokens: int | None = None) -> None:
        """Give the requests to the engine, once.

        Args:
            requests: all of them run at the same time.
            live: `updates` gives events as they are made; otherwise it gives the events of a request at its end.
            prompt_tokens: for `usage`; None counts every id that the engine reads.

        Raises:
            RequestError: 429 the queue is full, 500 the engine died.
            ConfigError: the engine cannot run a request.
        """
        assert self._job is None, "a session starts once"
        try:
            self._job = self.model.worker.start(requests, live=live)
        except QueueFullError:
            retry = retry_after(self.model.request_seconds)
            raise too_many_requests(retry, "The queue is full. Retry after the time in Retry-After.") from None
        except EngineDeadError:
            raise engine_died(self.model.name) from None
        self._started = time.monotonic()
        self._prompt_tokens = sum(len(r.prompt) for r in requests) if prompt_tokens is None else prompt_tokens

    async def updates(self, convert: Callable[[Events], T]) -> AsyncGenerator[T, None]:
        """Give `convert(events)` for each batch of new events, until every request ends or `cancel` is called.

        `convert` runs in a thread if the batch is large. The engine pauses a live job with too many unread tokens, and
        continues it when the next batch is requested.

        Raises:
            RequestError: 500 the engine died, 504 the time limit has passed.
        """
        job, done = self._job, False
        assert job is not None, "call start first"
        while not done:
            try:
                async with asyncio.timeout(max(0.0, self.options.timeout_seconds - self.seconds)):
                    await job.wait()
            except TimeoutError:
                raise self._timed_out() from None
            except EngineDeadError:
                raise engine_died(self.model.name) from None
            if self.cancelled:
                return
            # Read before the events are taken: later events wake the job again.
            done = job.done
            yield await run_in_thread_if_large(self._unread_numbers(), lambda: convert(self.take()))

    async def wait(self) -> None:
        """Wait for the end of every request; `generations` has the results.

        Raises:
            RequestError: as `updates`.
        """
        async for _ in self.updates(lambda events: None):
            pass

    def take(self) -> Events:
        """The unread events; of a job that is not live, only those of finished requests.

        Raises:
            RequestError: 500 the engine failed.
        """
        assert self._job is not None, "call start first"
        events = [
            (index, event)
            for index, generation in enumerate(self._job.generations)
            if self._job.live or generation.done
            for event in generation.take()
        ]
        if any(event.finish_reason == "error" for _, event in events):
            raise engine_died(self.model.name)
        if events and self.first_text_seconds is None:
            self.first_text_seconds = self.seconds
        return events

    def check_time(self) -> None:
        """Check the time limit, for a consumer that waits for its client.

        Raises:
            RequestError: 504.
        """
        if self.seconds > self.options.timeout_seconds:
            raise self._timed_out()

    def _timed_out(self) -> RequestError:
        return RequestError(
            504, f"The request took longer than {self.options.timeout_seconds:g} seconds and was stopped. "
            "Request fewer tokens, or retry when the server is less busy.", code="timeout",
        )  # fmt: skip

    def _unread_numbers(self) -> int:
        """Tokens and alternatives in the next batch."""
        assert self._job is not None
        unread = sum(generation.behind for generation in self.generations)
        if self.first_text_seconds is None or not self._job.live:
            unread += sum(len(g.prompt_scores) * (1 + (g.request.options.logprobs or 0)) for g in self.generations)
        return unread

    def cancel(self) -> None:
        """End `updates`; the slots are free after the engine's next step. Unread events can still be taken."""
        self.cancelled = True
        if self._job is not None:
            self._job.close()
            self._job.notify()

    def close(self) -> None:
        """Cancel what still runs, and give the model back. May be called twice."""
        if self._job is not None:
            self._job.close()
        self._lease.close()

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close the session if the block raises."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    async def aclose(self) -> None:
        """`close`, then free the results, in a thread if there are many."""
        self.close()
        size = sum(len(g.prompt_scores) + len(g.records) for g in self.generations)
        await run_in_thread_if_large(size, self._free)

    def _free(self) -> None:
        """Free scores one at a time: to free a long list blocks every thread."""
        for generation in self.generations:
            scores = list(generation.prompt_scores)
            generation.prompt_scores = ()
            while scores:
                scores.pop()
            while generation.records:
                generation.records.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()
