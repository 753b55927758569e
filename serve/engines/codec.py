"""Text to token ids and back, in parts so short that other threads can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.errors import TokenizerError
from lm.tokenizers.base import REPLACEMENT, Tokenizer, UnknownPolicy
from lm.tokenizers.turns import Role, Turn, plain_text

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role']|capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The chat format of models without their own, in Jinja, for clients that apply it themselves. See `chat_text`."""
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content']|trim }}{{ '\n' if message['role'] == 'user' else '\n\n' }}"
    "{% endfor %}"
)
"""That of models that learned conversations without a template, except for blank lines inside a message."""
TURN_ENDS = ("\nUser:", "\nSystem:", "\nDeveloper:", "\nAssistant:")
"""Stop strings of a reply: the starts of the next message."""
MAX_PART = 16_384
"""Tokens in one call of a C function, which blocks all other threads."""
MAX_LINE = 250_000
"""Characters of a line, for tokenizers that encode a line in one call: about 10 milliseconds."""


def chat_text(turns: Sequence[tuple[str, str]]) -> str:
    """The text that a model of plain text continues: a line "Role: content" for each message, then "Assistant:"."""
    return "".join(f"{role.capitalize()}: {content}\n" for role, content in turns) + "Assistant:"


def plain_chat_text(turns: Sequence[tuple[str, str]]) -> str:
    """The text that a model continues which learned conversations without a template: plain turns."""
    roles: dict[str, Role] = {"user": "user", "assistant": "assistant"}
    return plain_text([Turn(roles.get(role, "system"), content) for role, content in turns])


def numbers(ids: npt.NDArray[np.integer[Any]]) -> Iterator[int]:
    """The ids of an array (T,), converted in parts."""
    for begin in range(0, len(ids), MAX_PART):
        yield from ids[begin : begin + MAX_PART].tolist()


class TokenCodec:
    """Encodes and decodes for one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self.start_text = self._start_text()
        end = tokenizer.end_id
        self.end_text = self.start_text if end is None else tokenizer.pieces([end])[0]
        self.named = {self.start_text: tokenizer.start_id}
        """Start and end token by their names, which a text that is only such a name stands for."""
        if end is not None:
            self.named.setdefault(self.end_text, end)

    def _start_text(self) -> str:
        start = self._tokenizer.start_id
        for text in (self._tokenizer.pieces([start])[0], self._tokenizer.decode([start])):
            if self._tokenizer.encode(text).tolist() == [start]:
                return text
        return self._tokenizer.pieces([start])[0]

    def check_lines(self, text: str) -> None:
        """Check that the tokenizer does not block other threads for long.

        Raises:
            TokenizerError: a line is too long.
        """
        begin = 0
        while self._tokenizer.whole_lines and len(text) - begin > MAX_LINE:
            end = text.rfind("\n", begin, begin + MAX_LINE + 1)
            if end < 0:
                raise TokenizerError(
                    f"The text has a line of more than {MAX_LINE:,} characters, the limit of this server: break it "
                    "into lines."
                )
            begin = end + 1

    def encode_array(self, text: str, unknown: UnknownPolicy | None = None) -> npt.NDArray[np.integer[Any]]:
        """Ids of a text (T,), without the start token.

        Raises:
            UnknownSymbolError, ConfigError: from the policy for unknown symbols.
            TokenizerError: a line is too long.
        """
        self.check_lines(text)
        return self._tokenizer.encode(text, unknown=unknown)

    def encode(self, text: str, unknown: UnknownPolicy | None = None) -> list[int]:
        """`encode_array` as a list."""
        return [*numbers(self.encode_array(text, unknown))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        if len(ids) <= MAX_PART:
            return self._tokenizer.decode(ids)
        for begin in range(0, len(ids), MAX_PART):
            self._tokenizer.checked(ids[begin : begin + MAX_PART])
        return self.offsets(ids)[0]

    def read_from(
        self, text: str, unknown: UnknownPolicy | None = None, *, check: Callable[[int], None] | None = None
    ) -> tuple[int, ...]:
        """Ids of a prompt after the start token.

        Args:
            text: the prompt.
            unknown: the policy for unknown symbols.
            check: called with the number of tokens, before the slow conversion to a tuple. May raise.
        """
        ids = self.encode_array(text, unknown)
        if check is not None:
            check(len(ids))
        return (self._tokenizer.start_id, *numbers(ids))

    def text(self, token: int) -> str:
        """The text of a token, or its name if it has no text, such as "<eos>" or "<0xE2>"."""
        text = self._texts.get(token)
        if text is None:
            text = self._tokenizer.decode([token])
            if not text or REPLACEMENT in text:
                text = self._tokenizer.pieces([token])[0]
            self._texts[token] = text
        return text

    def unknown_text(self) -> str | None:
        """The name of the unknown token."""
        unknown = self._tokenizer.unknown_id
        return None if unknown is None else self._tokenizer.pieces([unknown])[0]

    def offsets(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of some ids, and the position of each token in it."""
        stream, parts, length, offsets = self._tokenizer.stream(), [], 0, []
        for token in ids:
            offsets.append(length)
            part = stream.feed(token)
            parts.append(part)
            length += len(part)
        parts.append(stream.end())
        return "".join(parts), offsets
