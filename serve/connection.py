"""uvicorn's connection with limits that it has not: on the time and the size of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serve.settings import ServeOptions

MOST_HEAD_BYTES = 65_536


def connection_class(options: ServeOptions) -> type[asyncio.Protocol]:
    """The protocol that one app's connections speak."""
    base: Any = AutoHTTPProtocol
    longest = max(int(options.max_body), int(options.max_upload))

    class Connection(base):  # type: ignore[misc]
        """Closed where a request's head does not come within `stall_seconds`, or does not end."""

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # Most of what arrives makes a request whole: then there is nothing to wait for.
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
                return
            self._head_bytes += len(data)
            # A body whose request was answered already is read to its end, or the client would miss the answer.
            answered = self.cycle is not None and self.cycle.more_body
            if self._head_bytes > (longest if answered else MOST_HEAD_BYTES):
                self.transport.abort()
            elif self._head_timer is None:
                self._await_head()

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(options.stall_seconds, self.transport.abort)

        def _stop_waiting(self) -> None:
            self._head_bytes = 0
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Connection
