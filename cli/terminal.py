"""Text that others made, on a terminal: control characters, which could move the cursor, are shown and not sent.

In a pipe everything stays as it is.
"""

from __future__ import annotations

import re
from typing import TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
"""All but newline, tab, and a carriage return before a newline."""


def visible(text: str) -> str:
    r"""The text with its control characters as escapes, such as \x1b."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Shown:
    """A text that comes in pieces, as a stream may show it."""

    def __init__(self, stream: TextIO) -> None:
        self._terminal = stream.isatty()
        self._held = ""

    def feed(self, text: str) -> str:
        """What to write of the next piece; a carriage return at its end waits for what follows it."""
        if not self._terminal:
            return text
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        return visible(text.removesuffix(self._held))

    def end(self) -> str:
        """What is still held back."""
        held, self._held = self._held, ""
        return visible(held)


def shown(text: str, stream: TextIO) -> str:
    """A whole text, as a stream may show it."""
    return visible(text) if stream.isatty() else text
