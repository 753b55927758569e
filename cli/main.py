"""The entry point of `lm`: handles Ctrl-C before slow imports begin."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main() -> None:
    """Run the program; Ctrl-C ends it without a traceback, also during imports."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        # Exit without an exception: libraries catch exceptions of their imports.
        signal.signal(signal.SIGINT, _leave)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _leave_if_interrupted
    from cli import program

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program.run()
    except KeyboardInterrupt:
        # A second Ctrl-C must not print a traceback of the interpreter's exit.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(INTERRUPTED)


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)


def _leave_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """Exit where Python would print and ignore the interrupt, as in a finalizer."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    main()
