"""Text from models and files on a terminal: control characters, which could move the cursor, become escapes.

In a pipe the text is unchanged.
"""

from __future__ import annotations

import re
from typing import TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
"""All except newline, tab, and a carriage return before a newline."""


def visible(text: str) -> str:
    r"""The text with its control characters as escapes, such as \x1b."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Shown:
    """A text that is printed in pieces, with control characters escaped on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._terminal = stream.isatty()
        self._held = ""

    def feed(self, text: str) -> str:
        """The next piece to print; a carriage return at its end waits for the piece after it."""
        if not self._terminal:
            return text
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        return visible(text.removesuffix(self._held))

    def end(self) -> str:
        """The rest to print."""
        held, self._held = self._held, ""
        return visible(held)


def shown(text: str, stream: TextIO) -> str:
    """A whole text, with control characters escaped if the stream is a terminal."""
    return visible(text) if stream.isatty() else text
