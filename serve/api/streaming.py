"""Answers of a generation session: one JSON body, or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.response_formats import Format, Piece, blocks, encode, encode_in_parts
from serve.engines.session import Events, GenerationSession
from serve.event_loop import run_in_thread_if_large
from serve.event_loop import run_in_thread_if_large as beside  # noqa: F401 (the page's, until it uses the session)
from serve.http_errors import RequestError, shutting_down

CLIENT_GONE = 499
"""The logged status when the client disconnects first."""
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the answer shows it."""

    ids: tuple[int, ...]
    """Without the start token that the server adds."""
    echo: str | None = None
    """The text that each choice repeats."""
    offsets: Sequence[int] = ()
    """The position of each token in `echo`, if the tokens are scored."""


class BodyFormat(Protocol):
    """Builds a JSON body."""

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The body from all choices in order."""


class SessionAnswer(Response):
    """The answer to one request, as server-sent events or one body. It closes the session at the end.

    Args:
        session: started.
        prompts: one for each generation of the session.
        body_format: a `Format` for events.
        log_fields: of the access log; gets the usage and an error code.
    """

    def __init__(
        self,
        session: GenerationSession,
        prompts: Sequence[Prompt],
        body_format: BodyFormat,
        log_fields: dict[str, Any],
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._session, self._prompts, self._format = session, prompts, body_format
        self._log_fields = log_fields
        sampling = session.generations[0].request.options
        self._n = sampling.n
        self._numbers_per_token = 1 + (sampling.logprobs or 0)
        self._opened: set[int] = set()
        self._pieces: dict[int, Piece] = {}
        """By choice, for a JSON body."""

    async def respond(self, request: HTTPRequest, *, stream: bool) -> Response:
        """The response: this event stream, or the body when it is complete."""
        return self if stream else await self._whole(request)

    @contextlib.asynccontextmanager
    async def _until_disconnect(self, receive: Receive) -> AsyncGenerator[None, None]:
        """Cancel the session when the client disconnects; close it in any case."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._session.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            session = self._session
            self._log_fields.update({name: self._usage()[name] for name in ("prompt_tokens", "completion_tokens")})
            if session.first_text_seconds is not None:
                self._log_fields["first_text_seconds"] = round(session.first_text_seconds, 6)
            if session.cancelled:
                self._log_fields["code"] = "client_gone"
            session.close()
            await run_in_thread_if_large(self._size(), self._free)
            await session.aclose()

    def _collect(self, events: Events) -> dict[int, Piece]:
        """New events as pieces, by choice."""
        pieces = {}
        for prompt_index, event in events:
            index = prompt_index * self._n + event.index
            piece = Piece() if index in self._opened else self._echo(prompt_index)
            self._opened.add(index)
            piece.add(event, len(self._prompts[prompt_index].echo or ""))
            pieces[index] = piece
        return pieces

    def _echo(self, prompt_index: int) -> Piece:
        """The start of a choice: its prompt, if it is repeated."""
        prompt, generation = self._prompts[prompt_index], self._session.generations[prompt_index]
        if prompt.echo is None:
            return Piece()
        if not generation.request.score_prompt:
            return Piece(prompt.echo, list(prompt.ids))
        # As in OpenAI's API, the first token has no log-probability, though the start token predicts it.
        scores = generation.prompt_scores[len(generation.request.prompt) - len(prompt.ids) :]
        return Piece(prompt.echo, list(prompt.ids), [None, *scores[1:]][: len(prompt.ids)], list(prompt.offsets))

    def _size(self) -> int:
        """Tokens and alternatives of a JSON body."""
        tokens = sum(len(piece.tokens) for piece in self._pieces.values())
        return self._numbers_per_token * (tokens + sum(len(g.prompt_scores) for g in self._session.generations))

    def _free(self) -> None:
        """Free scores one at a time: to free a long list blocks every thread."""
        for piece in self._pieces.values():
            while piece.scores:
                piece.scores.pop()

    def _usage(self) -> dict[str, Any]:
        usage = self._session.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }

    async def _whole(self, request: HTTPRequest) -> Response:
        async with self._until_disconnect(request.receive):
            async for pieces in self._session.updates(self._collect):
                self._pieces.update(pieces)
            if self._session.cancelled:
                return Response(status_code=CLIENT_GONE)
            usage = self._usage()
            choices = [self._pieces[index] for index in sorted(self._pieces)]
            return await run_in_thread_if_large(self._size(), lambda: Body(self._format.whole(choices, usage)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer as server-sent events."""

        async def write(body: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(self._session.options.stall_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async with self._until_disconnect(receive):
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            try:
                await self._write_events(write)
            except TimeoutError:
                # The client does not read. The answer stays incomplete, so that the connection is closed.
                self._log_fields["code"] = "client_stalled"
            except RequestError as error:
                await self._write_error(write, error)
            except asyncio.CancelledError:
                # The server stops, and the time for open requests is over.
                await self._write_error(write, shutting_down())
                raise

    async def _write_events(self, write: Callable[..., Awaitable[None]]) -> None:
        event_format = self._format
        assert isinstance(event_format, Format), "only texts are streamed"
        opened: set[int] = set()

        def lines(events: Events) -> Iterator[str]:
            for index, piece in self._collect(events).items():
                if index not in opened:
                    opened.add(index)
                    yield event_format.opening(index)
                yield from event_format.event(index, piece)

        async for written in self._session.updates(lambda events: [*blocks(lines(events))]):
            for block in written:
                self._session.check_time()
                await write(block)
        if not self._session.cancelled:
            await write(event_format.closing(self._usage()).encode("utf-8"), more=False)

    async def _write_error(self, write: Callable[..., Awaitable[None]], error: RequestError) -> None:
        self._log_fields["code"] = error.code
        with contextlib.suppress(TimeoutError):
            await write(f"data: {encode(error.body())}\n\n".encode(), more=False)


class Body(Response):
    """JSON of any length, sent as fast as the client reads it. Lone surrogates become "?"."""

    media_type = "application/json"

    def __init__(self, content: Any) -> None:
        """Encode `content`; see `encode_in_parts`."""
        self._blocks = [*blocks(encode_in_parts(content))]
        super().__init__(headers={"content-length": str(sum(map(len, self._blocks)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body. A client that does not read is disconnected, and the log says so."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._blocks.reverse()
        try:
            while self._blocks:
                # Each block is freed when it is sent: the connection has a copy.
                body = self._blocks.pop()
                async with asyncio.timeout(scope["app"].state.options.stall_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": bool(self._blocks)})
        except TimeoutError:
            scope["state"]["log_fields"]["code"] = "client_stalled"
