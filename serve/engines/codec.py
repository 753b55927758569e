"""Text to ids and back, as the API shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.errors import TokenizerError
from lm.tokenizers.base import REPLACEMENT, Tokenizer, UnknownPolicy

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role']|capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""How a chat becomes a text, as Jinja for clients that do it themselves; `chat_text` does the same."""
TURN_ENDS = ("\nUser:", "\nSystem:", "\nDeveloper:", "\nAssistant:")
"""A reply ends where another turn would begin."""
MOST_AT_ONCE = 16_384
"""Tokens that are worked on in one call of C, in which no other thread runs."""
LONGEST_LINE = 250_000
"""Characters of a line, for tokenizers that cut each line into tokens in one call: about 10 milliseconds."""


def chat_text(turns: Sequence[tuple[str, str]]) -> str:
    """The text that a model goes on from: a line "Role: content" a turn, then "Assistant:"."""
    return "".join(f"{role.capitalize()}: {content}\n" for role, content in turns) + "Assistant:"


def numbers(ids: npt.NDArray[np.integer[Any]]) -> Iterator[int]:
    """The ids of an array (T,), each part short work."""
    for begin in range(0, len(ids), MOST_AT_ONCE):
        yield from ids[begin : begin + MOST_AT_ONCE].tolist()


class TokenCodec:
    """The tokens of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self.start_text = self._start_text()

    def _start_text(self) -> str:
        start = self._tokenizer.start_id
        for text in (self._tokenizer.pieces([start])[0], self._tokenizer.decode([start])):
            if self._tokenizer.encode(text).tolist() == [start]:
                return text
        return self._tokenizer.pieces([start])[0]

    def check_lines(self, text: str) -> None:
        """Refuse a text for which the tokenizer would hold up all other threads.

        Raises:
            TokenizerError: a line is too long to be cut into tokens while others wait.
        """
        begin = 0
        while self._tokenizer.whole_lines and len(text) - begin > LONGEST_LINE:
            end = text.rfind("\n", begin, begin + LONGEST_LINE + 1)
            if end < 0:
                raise TokenizerError(
                    f"The text has a line of more than {LONGEST_LINE:,} characters, which this server does not cut "
                    "into tokens: break it into lines."
                )
            begin = end + 1

    def encode_array(self, text: str, unknown: UnknownPolicy | None = None) -> npt.NDArray[np.integer[Any]]:
        """Ids of a text (T,), without the start token. An array is made and freed faster than a list of as many ids.

        Raises:
            UnknownSymbolError, ConfigError: as the policy says.
            TokenizerError: a line is too long to be cut into tokens while others wait.
        """
        self.check_lines(text)
        return self._tokenizer.encode(text, unknown=unknown)

    def encode(self, text: str, unknown: UnknownPolicy | None = None) -> list[int]:
        """The same as a list."""
        return [*numbers(self.encode_array(text, unknown))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        if len(ids) <= MOST_AT_ONCE:
            return self._tokenizer.decode(ids)
        for begin in range(0, len(ids), MOST_AT_ONCE):
            self._tokenizer.checked(ids[begin : begin + MOST_AT_ONCE])
        return self.offsets(ids)[0]

    def read_from(
        self, text: str, unknown: UnknownPolicy | None = None, *, check: Callable[[int], None] | None = None
    ) -> tuple[int, ...]:
        """Ids of a prompt, the start token in front: what a model reads before it continues.

        Args:
            text: the prompt.
            unknown: what unknown symbols become.
            check: called with the number of the text's tokens before they are made Python's numbers, which takes long
                where there are many; may raise.
        """
        ids = self.encode_array(text, unknown)
        if check is not None:
            check(len(ids))
        return (self._tokenizer.start_id, *numbers(ids))

    def text(self, token: int) -> str:
        """A token's own text; its name where it has none, such as "<eos>" or "<0xE2>"."""
        known = self._texts.get(token)
        if known is None:
            known = self._tokenizer.decode([token])
            if not known or REPLACEMENT in known:
                known = self._tokenizer.pieces([token])[0]
            self._texts[token] = known
        return known

    def unknown_text(self) -> str | None:
        """The name of the unknown token."""
        unknown = self._tokenizer.unknown_id
        return None if unknown is None else self._tokenizer.pieces([unknown])[0]

    def offsets(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of some ids, and where in it each begins."""
        stream, parts, length, offsets = self._tokenizer.stream(), [], 0, []
        for token in ids:
            offsets.append(length)
            part = stream.feed(token)
            parts.append(part)
            length += len(part)
        parts.append(stream.end())
        return "".join(parts), offsets
