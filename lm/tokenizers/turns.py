r"""The turns of a conversation, and the text that a model reads of them.

A tokenizer with a chat template renders them with it. Without one they are plain turns, as `lm chat` writes them: the
user's text and a newline, then the answer and a blank line.

    2 + 3 = ?\n5\n\n

The model learns the answers and their ends. All other text is context.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
NEWLINE = "\n"
"""Ends the user's text in plain turns."""
BLANK_LINE = "\n\n"
"""Ends an answer in plain turns."""
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    content: str
    learned: bool = False
    """Whether it is an answer that the model learns."""


@dataclass(frozen=True)
class Part:
    """A piece of the text of a conversation."""

    text: str
    learned: bool


def plain_parts(turns: Sequence[Turn]) -> Iterator[Part]:
    """The text of plain turns. A blank line in a text becomes one newline, because a blank line ends an answer."""
    for turn in turns:
        text = one_paragraph(turn.content)
        yield Part(text + (NEWLINE if turn.role == "user" else BLANK_LINE), turn.learned)


def one_paragraph(text: str) -> str:
    """A text without blank lines, and without white space at its ends."""
    return _BLANK_LINES.sub(NEWLINE, text.replace("\r\n", NEWLINE).strip())


def plain_text(turns: Sequence[Turn]) -> str:
    """The text of `plain_parts`."""
    return "".join(part.text for part in plain_parts(turns))


@dataclass(frozen=True)
class Conversation:
    """A conversation with at least one answer to learn; it ends with an answer."""

    turns: tuple[Turn, ...]
    where: str
    """Its place, for errors: the file and the line."""

    @property
    def text(self) -> str:
        """Its plain turns."""
        return plain_text(self.turns)

    @property
    def answers(self) -> list[str]:
        """The texts that the model learns, without their ends."""
        return [turn.content.strip() for turn in self.turns if turn.learned]

    def to_json(self) -> str:
        """One line; equal conversations give equal lines."""
        return json.dumps([[turn.role, turn.content, turn.learned] for turn in self.turns], ensure_ascii=False) + "\n"
