"""From a request's generations to the answer, whole or as a stream; and what ends it early: a client that goes away
or stalls, a request that takes too long, an engine that dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.errors import RequestError, dead_engine, shutting_down
from serve.formats import Format, Piece, blocks, encode, encode_in_parts
from serve.models import Lease
from serve.settings import ServeOptions
from serve.worker import EngineDeadError, Job

T = TypeVar("T")

LONG = 4096
"""What has more characters or numbers than this is worked on beside the event loop."""
_WORKERS = ThreadPoolExecutor(4, thread_name_prefix="request")
"""What requests need threads for. Models are loaded in asyncio's own threads, which requests cannot fill."""
GONE = 499
"""The status in the log where nobody was left to read one."""


@dataclass(frozen=True)
class Prompt:
    """What one generation began from."""

    ids: tuple[int, ...]
    """Without the start token that the server puts in front."""
    echo: str | None = None
    """The text to repeat."""
    offsets: Sequence[int] = ()
    """Where in it each token begins, where tokens are scored."""


async def beside(size: int, work: Callable[[], T], *, most: int = LONG) -> T:
    """The result of `work`, done in a thread where `size` says that it may take long: where it is above `most`.

    Work that has begun is over when this returns or raises, also where the caller is cancelled: nobody else uses its
    data at the same time.
    """
    if size <= most:
        return work()
    job = _WORKERS.submit(work)
    result = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(result)
    except asyncio.CancelledError:
        if not job.cancel():
            await asyncio.wait((result,))
            # Looked at: an exception for which nobody waits any more is not logged.
            result.exception()
        raise


class Form(Protocol):
    """What an answer is made with."""

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer."""


class Writing:
    """One request for text: its job, and how it is told."""

    def __init__(
        self,
        lease: Lease,
        job: Job,
        prompts: Sequence[Prompt],
        form: Form,
        options: ServeOptions,
        facts: dict[str, Any],
    ) -> None:
        self._lease, self._job, self._prompts, self._form = lease, job, prompts, form
        self._options, self._facts = options, facts
        sampling = job.generations[0].request.options
        self._n = sampling.n
        self._numbers_a_token = 1 + (sampling.logprobs or 0)
        self._began = time.monotonic()
        self._gone = False
        self._opened: set[int] = set()
        self._pieces: dict[int, Piece] = {}
        """What a whole answer is made of."""
        self._reasons: set[str] = set()

    # -- both ways --------------------------------------------------------------------------------

    def close(self) -> None:
        """Free what is held."""
        self._job.close()
        self._lease.close()

    @contextlib.asynccontextmanager
    async def _watched(self, receive: Receive) -> AsyncIterator[None]:
        """Give up as soon as the client is gone, and free what is held in any case."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._gone = True
            self._job.close()
            self._job.tell()

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            usage = self._usage()
            self._facts.update({name: usage[name] for name in ("prompt_tokens", "completion_tokens")})
            if self._gone:
                self._facts["code"] = "client_gone"
            self.close()
            await beside(self._size(), self._forget)

    async def _news(self, use: Callable[[dict[int, Piece]], T]) -> tuple[bool, T | None]:
        """Whether this was the last, and what `use` makes of what is new, by choice.

        Raises:
            RequestError: the engine died.
        """
        try:
            await self._job.news()
        except EngineDeadError:
            raise dead_engine(self._lease.model.name) from None
        if self._gone:
            return True, None
        # Before anything is taken: what comes after that is told again.
        done = self._job.done
        return done, await beside(self._size(), lambda: use(self._take()))

    def _size(self) -> int:
        """Tokens and alternatives that are not sent yet."""
        tokens = sum(len(piece.tokens) for piece in self._pieces.values())
        if not self._opened or not self._job.live:
            tokens += sum(len(generation.prompt_scores) for generation in self._job.generations)
        return self._numbers_a_token * tokens + sum(generation.behind for generation in self._job.generations)

    def _forget(self) -> None:
        """Let the scores go one by one: as one list they would take as long as they are many, and hold up the loop."""
        for generation in self._job.generations:
            scores = list(generation.prompt_scores)
            generation.prompt_scores = ()
            while scores:
                scores.pop()
            while generation.records:
                generation.records.popleft()
        for piece in self._pieces.values():
            while piece.scores:
                piece.scores.pop()

    def _take(self) -> dict[int, Piece]:
        """What is new, by choice."""
        found = {}
        for number, generation in enumerate(self._job.generations):
            # A whole answer takes each text whole.
            for event in generation.take() if self._job.live or generation.done else ():
                if event.finish_reason == "error":
                    raise dead_engine(self._lease.model.name)
                index = number * self._n + event.index
                piece = Piece() if index in self._opened else self._echo(number)
                self._opened.add(index)
                piece.add(event, len(self._prompts[number].echo or ""))
                self._reasons.add(str(event.finish_reason or ""))
                found[index] = piece
        if found and "first_text_seconds" not in self._facts:
            self._facts["first_text_seconds"] = round(time.monotonic() - self._began, 6)
        return found

    def _echo(self, number: int) -> Piece:
        """The prompt, at the beginning of a choice."""
        prompt, generation = self._prompts[number], self._job.generations[number]
        if prompt.echo is None:
            return Piece()
        if not generation.request.score_prompt:
            return Piece(prompt.echo, list(prompt.ids))
        # The first token of a text has no log-probability, as OpenAI has it, though the start token predicts it.
        scores = generation.prompt_scores[len(generation.request.prompt) - len(prompt.ids) :]
        return Piece(prompt.echo, list(prompt.ids), [None, *scores[1:]][: len(prompt.ids)], list(prompt.offsets))

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        cached = sum(generation.usage.cached_tokens for generation in self._job.generations)
        drawn = sum(generation.usage.drawn_tokens for generation in self._job.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        }

    def _too_long(self) -> RequestError:
        return RequestError(
            504,
            f"The request took longer than {self._options.timeout_seconds:g} seconds and was given up. "
            "Ask for fewer tokens, or come back when the server is less busy.",
            code="timeout",
        )

    # -- whole --------------------------------------------------------------------------------------

    async def whole(self, request: HTTPRequest) -> Response:
        """The answer once it is complete."""
        async with self._watched(request.receive):
            try:
                async with asyncio.timeout(self._options.timeout_seconds):
                    done = False
                    while not done:
                        done, _ = await self._news(self._pieces.update)
            except TimeoutError:
                raise self._too_long() from None
            if self._gone:
                return Response(status_code=GONE)
            usage = self._usage()
            told = [self._pieces[index] for index in sorted(self._pieces)]
            return await beside(self._size(), lambda: Body(self._form.whole(told, usage)))

    # -- a stream -----------------------------------------------------------------------------------

    async def stream(self, receive: Receive, send: Send) -> None:
        """Write the answer as server-sent events."""

        async def write(body: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(self._options.stall_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async with self._watched(receive):
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            try:
                async with asyncio.timeout(self._options.timeout_seconds) as limit:
                    await self._write_all(write)
            except TimeoutError:
                if not limit.expired():
                    # A client that does not read: the answer stays incomplete, so that the connection is closed.
                    self._facts["code"] = "client_stalled"
                    return
                await self._fail(write, self._too_long())
            except RequestError as error:
                await self._fail(write, error)
            except asyncio.CancelledError:
                # The server ends and the time for it is over.
                await self._fail(write, shutting_down())
                raise

    async def _write_all(self, write: Callable[..., Awaitable[None]]) -> None:
        form, done = self._form, False
        assert isinstance(form, Format), "only texts are streamed"
        opened: set[int] = set()

        def events(found: dict[int, Piece]) -> Iterator[str]:
            for index, piece in found.items():
                if index not in opened:
                    opened.add(index)
                    yield form.opening(index)
                yield from form.event(index, piece)

        while not done:
            done, written = await self._news(lambda found: [*blocks(events(found))])
            if self._gone:
                return
            for block in written or ():
                await write(block)
        await write(form.closing(self._usage()).encode("utf-8"), more=False)

    async def _fail(self, write: Callable[..., Awaitable[None]], error: RequestError) -> None:
        self._facts["code"] = error.code
        with contextlib.suppress(TimeoutError):
            await write(f"data: {encode(error.body())}\n\n".encode(), more=False)


EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """The stream of a Writing."""

    media_type = "text/event-stream"

    def __init__(self, writing: Writing) -> None:
        """Nothing is sent before the call."""
        super().__init__()
        self._writing = writing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await self._writing.stream(receive, send)


class Body(Response):
    """JSON of any length, sent as the client reads it; half a surrogate pair of a prompt does not matter."""

    media_type = "application/json"

    def __init__(self, content: Any) -> None:
        """Encode `content`; see `encode_in_parts`."""
        self._blocks = [*blocks(encode_in_parts(content))]
        super().__init__(headers={"content-length": str(sum(map(len, self._blocks)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that does not read is cut off, and the log says so."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._blocks.reverse()
        try:
            while self._blocks:
                # Forgotten one by one: the connection has its copy.
                body = self._blocks.pop()
                async with asyncio.timeout(scope["app"].state.options.stall_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": bool(self._blocks)})
        except TimeoutError:
            scope["state"]["facts"]["code"] = "client_stalled"
