"""The entry point of `lm`: what Ctrl-C does is settled here, before anything that takes long is imported."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""


def main() -> None:
    """Run the program; Ctrl-C ends it without a traceback, whatever is being imported or computed."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        # Not an exception yet: libraries catch those of their imports, and go on.
        signal.signal(signal.SIGINT, _leave)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _leave_if_interrupted
    from cli import program

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program.run()
    except KeyboardInterrupt:
        # Another one must not show how Python ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(INTERRUPTED)


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)


def _leave_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """Where an exception cannot be raised, as in a finalizer, Python would show it and go on."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    main()
