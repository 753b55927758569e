"""The server as a program: its socket and its signals.

SIGTERM and SIGINT: no new connections, open requests have `drain_seconds` to end, exit code 0. A second signal ends the
server at once. SIGHUP: loads runs that were trained again.
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
    """A listening socket.

    Args:
        options: the address.
        or_next: how many of the following ports to try if the port is in use.

    Raises:
        ConfigError: the address is in use, or not an address of this machine.
    """
    for port in range(options.port, min(options.port + or_next, 65535)):
        with contextlib.suppress(_InUseError):
            return _listen(options, port)
    return _listen(options, min(options.port + or_next, 65535))


class _InUseError(ConfigError):
    """Another program uses the port."""


def _listen(options: ServeOptions, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # With the protocol named: asyncio turns off Nagle's algorithm only for such connections.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it: the system drops a peer that acknowledges nothing for this time.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * options.stall_seconds))
        listening.bind((options.host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        kind = _InUseError if error.errno == errno.EADDRINUSE else ConfigError
        raise kind(
            f"Cannot listen on {options.host}, port {port}: {(error.strerror or str(error)).lower()}. "
            "Choose another --port (0 is any free port) or --host."
        ) from None
    listening.setblocking(False)
    return listening


def run(app: FastAPI, options: ServeOptions, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serve until a signal; call `started` when the server accepts requests."""
    # asyncio accepts all waiting connections in one iteration; uvloop accepts one, so that connections would queue.
    config = uvicorn.Config(
        app, loop="asyncio", http=connection_class(options), ws="none", access_log=False, log_config=None,
        server_header=False,
        # The gate reads the headers of proxies.
        proxy_headers=False,
        backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=options.drain_seconds,  # type: ignore[arg-type]
    )  # fmt: skip
    # The garbage collector can skip all objects that exist now.
    gc.collect()
    gc.freeze()
    _Server(config, app, started).run(sockets=[listening])
    gc.unfreeze()


class _Server(uvicorn.Server):
    """uvicorn's server with other signal handlers: SIGTERM gives exit code 0."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._on_started = app, started
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
        self._on_started()

    def _end(self) -> None:
        if self.should_exit:
            self.force_exit = True
        log.info("Shutting down.")
        self._app.state.draining.set()
        self.should_exit = True

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._app.state.models.reload())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)
