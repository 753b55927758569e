"""Conversations → tokens, with a mark for each token: context, part of an answer, or the start of a conversation.

    ids     <start> 2 + 3 = ? \\n   5  \\n \\n   <start> …
    marks    START   CONTEXT       ANSWER        START  …

The model learns the tokens marked ANSWER: the answers, and the end token (or the blank line) after each. All counts of
such a split but `context_tokens` are those of its answers. Their bytes are those of the answers' own text, without
ends, so that bits per byte are comparable whatever renders the turns.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.corpora.corpus import Split
from lm.corpora.encode import Counts, Encoder, TokenSplit, UnknownSymbolCounter, warn_of_unknown
from lm.corpora.text import regroup, utf8
from lm.errors import CorpusError, TokenizerError
from lm.tokenizers.base import Ids, Tokenizer
from lm.tokenizers.turns import Conversation, Turn, plain_parts, plain_text

CONTEXT, ANSWER, START = range(3)
"""Marks of tokens."""
Marks = npt.NDArray[np.uint8]
_WHITE_SPACE = re.compile(r"\s+")


class AnswerMeasure:
    """Hash of conversations, and counts of their answers."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.conversations = 0
        self.characters = self.bytes = self._words = self._lines = self._lm_eval_words = 0

    def update(self, conversation: Conversation) -> None:
        """Add the next conversation."""
        self._hash.update(utf8(conversation.to_json()))
        self.conversations += 1
        for answer in conversation.answers:
            self.characters += len(answer)
            self.bytes += len(utf8(answer))
            self._words += len(answer.split())
            self._lines += answer.count("\n")
            self._lm_eval_words += len(_WHITE_SPACE.split(answer))

    @property
    def sha256(self) -> str:
        """Of all conversations so far."""
        return self._hash.hexdigest()

    def counts(self, **tokens: Any) -> Counts:
        """The counts of all answers so far; `tokens` are the other fields."""
        return Counts(
            characters=self.characters, bytes=self.bytes, words=self._words, lines=self._lines,
            lm_eval_words=self._lm_eval_words, **{"tokens": 0, "unknown_tokens": 0, **tokens},
        )  # fmt: skip


class AnswerEncoder:
    """Encodes conversations one by one, and counts the tokens of their answers."""

    def __init__(self, tokenizer: Tokenizer, unknown: UnknownSymbolCounter) -> None:
        self._tokenizer, self._unknown = tokenizer, unknown
        self._answers = Encoder(tokenizer, unknown)
        self._answer_tokens = self._context_tokens = 0

    def encode(self, conversation: Conversation) -> tuple[Ids, Marks]:
        """The tokens of the next conversation and their marks, both (N,).

        Plain turns follow a start token. The text of a chat template begins as the template says.

        Raises:
            CorpusError: the chat template refuses it.
        """
        if self._tokenizer.chat_template is None:
            ids, marks = self._plain(conversation)
        else:
            try:
                ids, marks = _rendered(conversation.turns, self._tokenizer)
            except TokenizerError as error:
                raise CorpusError(f"{conversation.where}: {error}") from None
        answers = int(np.count_nonzero(marks == ANSWER))
        self._answer_tokens += answers
        self._context_tokens += len(ids) - answers
        return ids, marks

    def _plain(self, conversation: Conversation) -> tuple[Ids, Marks]:
        start = np.array([self._tokenizer.start_id], self._tokenizer.dtype)
        ids, marks = [start], [np.array([START], np.uint8)]
        for part in plain_parts(conversation.turns):
            own = self._answers.encode(part.text) if part.learned else self._context(part.text)
            ids.append(own)
            marks.append(np.full(len(own), ANSWER if part.learned else CONTEXT, np.uint8))
        return np.concatenate(ids), np.concatenate(marks)

    def _context(self, text: str) -> Ids:
        counts: Counter[str] = Counter()
        ids = self._tokenizer.encode(text, unknown_counts=counts)
        if counts:
            self._unknown.add(counts)
        return ids

    def counts(self, measure: AnswerMeasure) -> Counts:
        """The counts of the encoded answers, which `measure` has read too."""
        own = self._answers.counts_of_tokens()
        # The first token of a split is not among its N tokens.
        return measure.counts(**{**own, "tokens": self._answer_tokens, "context_tokens": self._context_tokens - 1})


def _rendered(turns: tuple[Turn, ...], tokenizer: Tokenizer) -> tuple[Ids, Marks]:
    """The tokens of a conversation by the chat template, and their marks.

    Before each answer they are those that `lm chat` shows to the model; the answer ends with its first end token.

    Raises:
        TokenizerError: the template refuses the turns, or writes the turns before an answer otherwise once it is there.
    """
    # White space at the ends of an answer could become one token with what the template writes around it.
    messages = [
        {"role": turn.role, "content": turn.content.strip() if turn.role == "assistant" else turn.content}
        for turn in turns
    ]
    whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
    marks = np.zeros(len(whole), np.uint8)
    for number, turn in enumerate(turns):
        if not turn.learned:
            continue
        before = tokenizer.encode_chat(messages[:number])
        if not np.array_equal(whole[: len(before)], before):
            raise TokenizerError(
                f"the chat template of the model renders the messages before answer {number + 1} otherwise once the "
                "answer is there: give a row for each answer, as prompt and completion."
            )
        ends = np.flatnonzero(np.isin(whole[len(before) :], list(tokenizer.end_ids)))
        end = len(before) + int(ends[0]) + 1 if len(ends) else len(whole)
        marks[len(before) : end] = ANSWER
    marks[0] = START
    return whole.astype(tokenizer.dtype), marks


def encode_conversations(name: str, conversations: Iterable[Conversation], tokenizer: Tokenizer) -> TokenSplit:
    """Tokens of conversations, in memory; arguments and errors as `lm.corpora.encode.encode_text`."""
    measure, unknown = AnswerMeasure(), UnknownSymbolCounter()
    encoder = AnswerEncoder(tokenizer, unknown)
    parts: list[tuple[Ids, Marks]] = []
    for conversation in conversations:
        measure.update(conversation)
        parts.append(encoder.encode(conversation))
    warn_of_unknown(name, tokenizer, unknown.total, unknown.most_common())
    ids, marks = (np.concatenate(each) for each in zip(*parts, strict=True))
    return TokenSplit(name, ids, encoder.counts(measure), measure.sha256, marks)


def beginning(split: TokenSplit, tokens: int | None) -> tuple[Ids, Marks | None]:
    """The first tokens of a split and their marks; of conversations, whole ones.

    Args:
        split: of a corpus.
        tokens: how many, without the first start token; None: all.
    """
    if tokens is None or tokens >= len(split.ids) - 1:
        return split.ids, split.marks
    if split.marks is None:
        return split.ids[: tokens + 1], None
    begins = np.append(np.flatnonzero(np.asarray(split.marks) == START), len(split.ids))
    # At least one conversation.
    end = int(begins[max(1, int(np.searchsorted(begins, tokens + 1, side="right")) - 1)])
    return split.ids[:end], split.marks[:end]


def part_of(split: TokenSplit, tokens: int) -> TokenSplit:
    """`beginning` as a split; its counts and hash are those of the whole."""
    ids, marks = beginning(split, tokens)
    return replace(split, ids=ids, marks=marks)


def answer_notes(split: TokenSplit) -> Iterator[str]:
    """A note on what is learned of conversations."""
    if split.marks is not None:
        yield f"answers only: {split.counts.tokens:,} of {split.counts.all_tokens:,} tokens of {split.name} are learned"


def without_system(split: Split) -> Split:
    """A split of conversations without their system messages, which are often the same in all of them."""
    conversations = split.conversations
    if conversations is None:
        return split

    def texts() -> Iterator[str]:
        for each in conversations():
            yield plain_text([turn for turn in each.turns if turn.role != "system"])

    return replace(split, chunks=lambda: regroup(texts()))
