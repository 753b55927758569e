"""Conversations: the rows of tables that hold instruction data, in place of a column of text.

A row has `messages`, a list of {role, content}; or `prompt` and `completion`, each a text or such a list. The model
learns the assistant's messages, and of `prompt` and `completion` the completion alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from lm.corpora.corpus import logger
from lm.corpora.table_files import MAX_LINES_IN_WARNING, Rows, TableText
from lm.corpora.text import EMPTY, Text, regroup, utf8
from lm.errors import CorpusError
from lm.tokenizers.turns import ROLES, Conversation, Role, Turn

COLUMNS = "messages", "prompt", "completion"


class ConversationText(Text):
    """The conversations of one or more tables; as a text, their plain turns."""

    def __init__(self, where: str, tables: Sequence[Rows], *, share: tuple[int, int] = (0, 1)) -> None:
        """`share` (NUMBER, SHARES) is every SHARES-th row, from row NUMBER on."""
        self.where = where
        self.size_bytes = sum(table.size_bytes for table in tables) if all(t.size_bytes for t in tables) else 0
        self._tables = tables
        self._share = share
        self.warned = False
        """Whether the warning of rows that are left out was given."""
        self.conversations = self._conversations

    def chunks(self, skip: int = 0) -> Iterator[str]:
        """See `Text.chunks`."""
        return islice(regroup(self.documents()), skip, None)

    def documents(self) -> Iterator[str]:
        """The plain turns of each conversation."""
        return (conversation.text for conversation in self._conversations())

    def _conversations(self) -> Iterator[Conversation]:
        """The conversations in order; a warning names the rows that are none.

        Raises:
            CorpusError: a table cannot be read, or most rows are no conversations; names the line.
        """
        number, shares = self._share
        columns: dict[str, None] = {}
        found = bad = count = 0
        examples: list[str] = []
        for table in self._tables:
            for line, cells in table.rows(COLUMNS, columns):
                count += 1
                if (count - 1) % shares != number:
                    continue
                where = f"{table.where}, {table.unit} {line:,}"
                turns = read_turns(dict(zip(COLUMNS, cells, strict=True)))
                if not isinstance(turns, str):
                    found += 1
                    _check(turns, where)
                    yield Conversation(turns, where)
                    continue
                bad += 1
                if len(examples) < MAX_LINES_IN_WARNING:
                    file = "" if len(self._tables) == 1 else f"{Path(table.where).name}, "
                    examples.append(f"{file}{table.unit} {line:,}: {turns}")
        if not found and not bad:
            raise CorpusError(f"{self.where} is empty: there is no conversation to read.", kind=EMPTY)
        listed = "; ".join(examples) + ("; …" if bad > len(examples) else "")
        if bad > found:
            raise CorpusError(
                f"{self.where}: {bad:,} of {found + bad:,} rows are no conversations ({listed}). A row needs messages, "
                "a list of {role, content}; or prompt and completion.",
                kind="no conversations",
            )
        if bad and not self.warned:
            self.warned = True
            logger.warning(
                "%s: %d %s no conversation and %s left out (%s).",
                self.where, bad, "row is" if bad == 1 else "rows are", "was" if bad == 1 else "were", listed,
            )  # fmt: skip


def open_tables(where: str, tables: Sequence[Rows], column: str, *, share: tuple[int, int] = (0, 1)) -> Text:
    """Tables as conversations, if the first one has their columns and no column of text; else as text."""
    columns = tables[0].columns() if tables else []
    if column not in columns and ("messages" in columns or {"prompt", "completion"} <= set(columns)):
        return ConversationText(where, tables, share=share)
    return TableText(where, tables, column, share=share)


def read_turns(row: dict[str, Any]) -> tuple[Turn, ...] | str:
    """The turns of a row up to its last answer, or what is wrong with it in a few words.

    Args:
        row: with a value or None for each of `COLUMNS`.
    """
    messages, prompt, completion = (row[column] for column in COLUMNS)
    if messages is not None:
        turns = _messages(messages, "messages")
    elif prompt is None and completion is None:
        return "it has neither messages nor prompt and completion"
    elif prompt is None or completion is None:
        return f"it has no {'prompt' if prompt is None else 'completion'}"
    else:
        before, after = _side(prompt, "prompt", "user"), _side(completion, "completion", "assistant")
        if isinstance(before, str):
            return before
        if isinstance(after, str):
            return after
        turns = [*(Turn(turn.role, turn.content) for turn in before), *after]
    if isinstance(turns, str):
        return turns
    last = max((number for number, turn in enumerate(turns) if turn.learned), default=None)
    if last is None:
        return "it has no message of the assistant"
    return tuple(turns[: last + 1])


def _side(value: Any, column: str, role: Role) -> list[Turn] | str:
    """A prompt or a completion: a text, or messages."""
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, column)


def _messages(value: Any, column: str) -> list[Turn] | str:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return f"{column} is no list of messages with role and content"
    turns: list[Turn] = []
    for number, message in enumerate(value, start=1):
        name = f"message {number} of {column}" if len(value) > 1 else f"the message of {column}"
        role, content = message.get("role"), message.get("content")
        if missing := [key for key in ("role", "content") if message.get(key) is None]:
            return f"{name} has no {missing[0]}"
        if role not in ROLES:
            return f"{name} has the role {role!r}, which is none of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"the content of {name} is no text"
        if role == "assistant" and not content.strip():
            return f"{name} is an empty answer"
        turns.append(Turn(cast(Role, role), content, learned=role == "assistant"))
    return turns


def _check(turns: Sequence[Turn], where: str) -> None:
    """Refuse text that no text file can hold."""
    for turn in turns:
        if "\0" in turn.content:
            raise CorpusError(f"{where}: the text holds a zero character, as binary files do: remove it.")
        try:
            utf8(turn.content)
        except CorpusError as error:
            raise CorpusError(f"{where}: {error}") from None
