"""What every request passes: an id, the key, the limits of body and number; and what is logged and counted of it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import RequestError, of_exception, too_busy
from serve.metrics import Metrics
from serve.settings import ServeOptions

log = logging.getLogger("serve.requests")

OPEN_PATHS = ("/health", "/health/ready", "/docs", "/openapi.json")
"""What needs no key, and is answered however busy the server is."""
DISCARD_SECONDS = 5.0
"""How long the rest of a refused body is read, so that the client gets to see why."""
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


class Gate:
    """ASGI middleware; the outermost."""

    def __init__(self, app: ASGIApp, *, options: ServeOptions, keys: tuple[bytes, ...], metrics: Metrics) -> None:
        self._app, self._options, self._keys, self._metrics = app, options, keys, metrics
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body = _Body(receive, self._options)
        visit = _Visit(scope, headers, body, send)
        self._open += 1
        self._metrics.open.inc()
        try:
            await self._serve(scope, headers, body, visit)
        except asyncio.CancelledError:
            visit.facts.setdefault("code", "cut_off")
            raise
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("A request failed.", extra={"facts": {"request_id": visit.id}})
            if not visit.status:
                await body.discard()
                await visit.refuse(of_exception(error))
        finally:
            self._open -= 1
            self._metrics.open.dec()
            self._tell(scope, visit)

    async def _serve(self, scope: Scope, headers: dict[bytes, bytes], body: _Body, visit: _Visit) -> None:
        open_to_all = scope["path"] in OPEN_PATHS
        if self._open > self._options.max_requests and not open_to_all:
            raise too_busy(1, "Too many requests at once. Come back in a moment.")
        if self._keys and not open_to_all and scope["method"] != "OPTIONS":
            self._check_key(headers.get(b"authorization", b""))
        body.check_length(headers.get(b"content-length"))
        await self._app(scope, body.receive, visit.send)

    def _check_key(self, header: bytes) -> None:
        scheme, _, given = header.partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        # All are compared, so that the time tells neither how far nor which.
        right = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(right):
            said = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise RequestError(401, f"{said} Send it as Authorization: Bearer KEY.", code="invalid_api_key")

    def _tell(self, scope: Scope, visit: _Visit) -> None:
        seconds = time.monotonic() - visit.began
        route = getattr(scope.get("route"), "path", "other")
        status = visit.status or 499
        self._metrics.answered(route, scope["method"] if route != "other" else "any", status, seconds, visit.facts)
        log.info(
            "request",
            extra={"facts": {
                "request_id": visit.id, "method": scope["method"], "path": scope["path"], "status": status,
                "seconds": round(seconds, 6), "client": (scope.get("client") or ("",))[0], **visit.facts,
            }},
        )  # fmt: skip


class _Visit:
    """One request: its id, its facts, and what was answered."""

    def __init__(self, scope: Scope, headers: dict[bytes, bytes], body: _Body, send: Send) -> None:
        given = headers.get(b"x-request-id", b"")
        self.id = given.decode("ascii") if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        self.began = time.monotonic()
        self.status = 0
        self.facts: dict[str, Any] = {}
        self._scope, self._send = scope, send
        scope.setdefault("state", {}).update(facts=self.facts, discard=body.discard)

    async def send(self, message: Message) -> None:
        """Pass an answer on, with the id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode("ascii"))]
        await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error."""
        self.facts["code"] = error.code
        await error.response()(self._scope, _nothing, self.send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


class _Body:
    """A request's body, counted and timed while it is read."""

    def __init__(self, receive: Receive, options: ServeOptions) -> None:
        self._receive, self._limit, self._seconds = receive, int(options.max_body), options.stall_seconds
        self._read = 0
        self._whole = False
        self._deadline = time.monotonic() + options.stall_seconds

    def check_length(self, stated: bytes | None) -> None:
        """Refuse what says itself that it is too long."""
        if stated is not None and stated.isdigit() and int(stated) > self._limit:
            raise self._too_long()

    def _too_long(self) -> RequestError:
        return RequestError(413, f"The body is longer than {self._limit:,} bytes.", code="request_too_large")

    async def receive(self) -> Message:
        """The next part."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise RequestError(
                408, f"The body did not arrive within {self._seconds:g} seconds.", code="request_timeout"
            ) from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._read > self._limit:
                raise self._too_long()
        return message

    async def discard(self) -> None:
        """Read on for a while without keeping anything: a client that still writes would miss the answer."""
        try:
            async with asyncio.timeout(min(DISCARD_SECONDS, self._seconds)):
                while not self._whole and self._read < 16 * self._limit:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            pass
