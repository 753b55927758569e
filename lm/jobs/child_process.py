"""What a process that trains for another process needs: its own stdout, and an end when its parent ends."""

from __future__ import annotations

import os
import signal
import threading
from typing import TextIO


def take_stdout() -> TextIO:
    """The stdout of this process, for lines of JSON; what else is printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def end_with_parent() -> None:
    """Send SIGTERM to this process at the end of its stdin, when its parent has ended."""
    threading.Thread(target=_await_end, daemon=True).start()


def _await_end() -> None:
    # The file descriptor: a thread that holds the lock of sys.stdin would keep Python from exiting.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
