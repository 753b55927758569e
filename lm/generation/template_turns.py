"""The turns of a conversation by a chat template, as the tokens that each adds to what the model has read."""

from __future__ import annotations

from typing import Any, NamedTuple

from lm.tokenizers.base import Tokenizer

Message = dict[str, Any]


class Turn(NamedTuple):
    """What the model reads before a reply."""

    ids: tuple[int, ...]
    from_begin: bool
    """Whether these are the tokens of the whole conversation, and not of its last turn alone."""


class TemplateTurns:
    """Messages, and their tokens turn by turn.

    Most templates only append: a turn is read after the turns before it. Where a template changes earlier turns (some
    remove a model's reasoning), the whole conversation is read again.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        """Start without messages.

        Args:
            tokenizer: with a chat template.
            continues: the model has read turns that are not known; each turn is read after them.
        """
        self._tokenizer = tokenizer
        self._continues = continues
        self.reset()

    def reset(self) -> None:
        """Remove all messages."""
        self._messages = [_message("user", "a"), _message("assistant", "b")] if self._continues else []
        self._first = len(self._messages)
        self._read: str | None = ""
        if self._first:
            self._read = self._tokenizer.render_chat(self._messages, add_generation_prompt=False)
        self._before: list[str | None] = []

    def user(self, text: str) -> Turn:
        """The tokens before the reply to a line of the user; `reply` or `undo` must follow.

        Raises:
            TokenizerError: the template refuses the messages.
        """
        messages = [*self._messages, _message("user", text)]
        rendered = self._tokenizer.render_chat(messages)
        appends = self._read is not None and rendered.startswith(self._read)
        if appends:
            added = rendered.removeprefix(self._read or "")
        else:
            added = self._tokenizer.render_chat(messages[-1:]) if self._continues else rendered
        ids = tuple(self._tokenizer.encode_rendered(added).tolist())
        self._before.append(self._read)
        self._messages, self._prompt = messages, rendered
        return Turn(ids, not appends and not self._continues)

    def reply(self, text: str) -> tuple[int, ...]:
        """Add the reply to the last line; returns the tokens that end it."""
        self._messages = [*self._messages, _message("assistant", text)]
        rendered = self._tokenizer.render_chat(self._messages, add_generation_prompt=False)
        end = self._tokenizer.end_id
        if rendered.startswith(self._prompt + text):
            self._read = rendered
            return tuple(self._tokenizer.encode_rendered(rendered[len(self._prompt + text) :]).tolist())
        self._read = None
        return () if end is None else (end,)

    def undo(self) -> None:
        """Remove the last line of the user, and its reply."""
        while len(self._messages) > self._first and self._messages.pop()["role"] != "user":
            pass
        self._read = self._before.pop()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
