"""What Ray's HTTP proxies do beyond passing requests on: try again what a dying replica left, and answer in JSON.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.ray_proxy:middlewares ray start --head

Without it Ray answers a request whose replica died with "Internal Server Error" as plain text.
"""

from __future__ import annotations

from collections import deque

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http_errors import RequestError

ATTEMPTS = 3
MOST_BYTES = 4 << 20
"""Of a body that is kept for another attempt; longer ones have one attempt."""


def middlewares() -> list[Middleware]:
    """What Ray puts around its proxies' app."""
    return [Middleware(Proxy)]


class Proxy:
    """ASGI middleware.

    A request changes nothing on a replica, so one that has no answer yet may be asked again. An answer that has begun
    breaks off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, up to `ATTEMPTS` times."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        kept = await _kept(receive)
        attempts = ATTEMPTS if kept and not kept[-1].get("more_body", False) else 1
        for _ in range(attempts):
            attempt = _Attempt(kept, receive, send)
            await self._app(scope, attempt.receive, attempt.send)
            if attempt.begun or attempt.gone:
                return
        error = RequestError(502, "The replica that answered went away: try again.", code="replica_gone").response()
        if (given := dict(scope["headers"]).get(b"x-request-id")) is not None:
            error.headers["x-request-id"] = given.decode("latin-1")
        await error(scope, receive, send)


async def _kept(receive: Receive) -> list[Message]:
    """The parts of a request's body, or as many of them as may be kept."""
    kept: list[Message] = []
    size = 0
    while size <= MOST_BYTES:
        message = await receive()
        kept.append(message)
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return kept


class _Attempt:
    """One passing on of a request."""

    def __init__(self, kept: list[Message], receive: Receive, send: Send) -> None:
        self._kept, self._receive, self._send = deque(kept), receive, send
        self._plain: Message | None = None
        self.begun = self.gone = False

    async def receive(self) -> Message:
        """What was kept, then what comes."""
        message = self._kept.popleft() if self._kept else await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Pass an answer on; an error of Ray's own, which is plain text, in the form of all others."""
        self.begun = True
        if message["type"] == "http.response.start" and message["status"] >= 400 and _is_plain(message):
            self._plain = message
            return
        if self._plain is not None:
            status = self._plain["status"]
            code = "rate_limit_exceeded" if status == 429 else "replica_gone" if status >= 500 else None
            said = message.get("body", b"").decode("utf-8", "replace")
            error = RequestError(status, said or "Ray could not pass the request on.", code=code).response()
            mine = [
                each for each in self._plain["headers"] if each[0].lower() not in (b"content-type", b"content-length")
            ]
            await self._send({**self._plain, "headers": [*mine, *error.raw_headers]})
            self._plain = None
            message = {"type": "http.response.body", "body": error.body}
        await self._send(message)


def _is_plain(start: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/plain") for name, value in start["headers"])
