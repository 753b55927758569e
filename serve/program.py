"""The server as a program: its socket, its signals, its end.

SIGTERM and SIGINT: no new connections, requests in work end within `drain_seconds`, exit code 0; a second one ends at
once. SIGHUP: swaps in runs that were trained again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from lm.errors import ConfigError
from serve.connection import connection_class
from serve.settings import ServeOptions

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048


def listen(options: ServeOptions, *, or_next: int = 0) -> socket.socket:
    """A socket that listens at the address that was asked for.

    Args:
        options: the address.
        or_next: how many of the following ports will do as well, where that one is in use.

    Raises:
        ConfigError: the address is in use, or not of this machine.
    """
    for port in range(options.port, min(options.port + or_next, 65535)):
        with contextlib.suppress(_InUseError):
            return _listen(options, port)
    return _listen(options, min(options.port + or_next, 65535))


class _InUseError(ConfigError):
    """Somebody else listens there."""


def _listen(options: ServeOptions, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # With its protocol named, which connections inherit: asyncio turns Nagle's delay off for those alone.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Inherited by each connection: the system drops a peer that takes nothing for so long.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * options.stall_seconds))
        listening.bind((options.host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        kind = _InUseError if error.errno == errno.EADDRINUSE else ConfigError
        raise kind(
            f"Cannot listen on {options.host}, port {port}: {(error.strerror or str(error)).lower()}. "
            "Choose another --port (0 takes a free one) or --host."
        ) from None
    listening.setblocking(False)
    return listening


def run(app: FastAPI, options: ServeOptions, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serve until a signal ends it; `started` is called once requests are answered."""
    # asyncio's own loop accepts all connections that wait, uvloop one a turn: while turns take long, they would queue.
    config = uvicorn.Config(
        app, loop="asyncio", http=connection_class(options), ws="none", access_log=False, log_config=None,
        server_header=False,
        # The gate finds the client of a request that comes through a proxy.
        proxy_headers=False,
        backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=options.drain_seconds,  # type: ignore[arg-type]
    )  # fmt: skip
    # What was made so far stays: collecting garbage need not look at it again.
    gc.collect()
    gc.freeze()
    _Server(config, app, started).run(sockets=[listening])
    gc.unfreeze()


class _Server(uvicorn.Server):
    """uvicorn's server with signals of our own: ending as asked is no failure."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._started_call = app, started
        self._reloading: set[asyncio.Task[object]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers: dict[int, Callable[[], None]] = {signal.SIGTERM: self._end, signal.SIGINT: self._end}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._reload
        for number, handler in handlers.items():
            try:
                loop.add_signal_handler(number, handler)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_, act=handler: loop.call_soon_threadsafe(act))
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started_call()

    def _end(self) -> None:
        if self.should_exit:
            self.force_exit = True
        log.info("Draining.")
        self._app.state.draining.set()
        self.should_exit = True

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._app.state.models.reload())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)
