"""What runs are compared on: a text, or the answers of conversations, each after its question.

    of_text("To be, or not to be")
    of_conversations(conversations)        # the questions are context: no figure counts them

Models read conversations in different ways: by the chat template of a tokenizer, or as plain turns. The answers are the
same for all, so each byte of an answer gets its nats, and its last byte those of the answer's end. The sum over all
bytes, divided by their number, is the report's bits per byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm.comparison.bootstrap import Blocks, Floats, text_blocks
from lm.comparison.byte_nats import byte_nats, spread
from lm.corpora import TokenSplit, encode_text
from lm.corpora.answers import ANSWER, encode_conversations
from lm.corpora.batches import conversation_bounds
from lm.tokenizers.base import Tokenizer, utf8_sizes
from lm.tokenizers.turns import Conversation, plain_parts

NEWLINE = "\n"


@dataclass(frozen=True, eq=False)
class ComparedText:
    """A text with the bytes of each character."""

    text: str
    """As it is shown: of conversations, each answer and a newline."""
    sizes: npt.NDArray[np.int64]
    """(C,) UTF-8 bytes of each character; 0 of a newline after an answer, which is not measured."""
    conversations: tuple[Conversation, ...] | None = None
    """None: a text."""

    def blocks(self) -> Blocks:
        """Blocks of whole lines; of conversations, of whole answers."""
        if self.conversations is None:
            return text_blocks(self.text.encode("utf-8"))
        answers = [answer.encode("utf-8") for each in self.conversations for answer in each.answers]
        return text_blocks(b"".join(answers), ends=np.cumsum([len(answer) for answer in answers]))

    def encode(self, name: str, tokenizer: Tokenizer) -> TokenSplit:
        """Its tokens.

        Raises:
            CorpusError: there is none.
        """
        if self.conversations is None:
            return encode_text(name, self.text, tokenizer)
        return encode_conversations(name, self.conversations, tokenizer)

    def byte_nats(self, tokenizer: Tokenizer, part: TokenSplit, token_nats: Floats) -> Floats:
        """(B,) the nats of each byte, spelling cost included.

        Args:
            tokenizer: of the tokens.
            part: of `encode`.
            token_nats: (N,) of each scored token.

        Raises:
            TokenizerError: symbols were left out, so the tokens do not determine the text.
        """
        if self.conversations is None:
            return byte_nats(tokenizer, self.text, part.ids[1:], token_nats)
        of_turns = _plain_nats if tokenizer.chat_template is None else _rendered_nats
        found = of_turns(self.conversations, tokenizer, part, token_nats)
        return np.concatenate(
            [
                _moved(nats, text, "".join(each.answers))
                for each, (text, nats) in zip(self.conversations, found, strict=True)
            ]
        )


def of_text(text: str) -> ComparedText:
    """A text, of which all tokens count."""
    return ComparedText(text, utf8_sizes(text))


def of_conversations(conversations: Iterable[Conversation]) -> ComparedText:
    """Conversations, of which the answers count."""
    kept = tuple(conversations)
    answers = [answer for each in kept for answer in each.answers]
    sizes = [np.append(utf8_sizes(answer), 0) for answer in answers]
    return ComparedText("".join(answer + NEWLINE for answer in answers), np.concatenate(sizes), kept)


def _plain_nats(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, part: TokenSplit, token_nats: Floats
) -> Iterator[tuple[str, Floats]]:
    """The answers of each conversation with their ends, as plain turns, and the nats of each byte of them."""
    learned = [[turn.text for turn in plain_parts(each.turns) if turn.learned] for each in conversations]
    ids = np.asarray(part.ids)[np.asarray(part.marks) == ANSWER]
    texts = [text for each in learned for text in each]
    if tokenizer.words is None:
        ends = np.cumsum([len(tokenizer.encode(text, unknown_counts=Counter())) for text in texts])
        pieces = zip(texts, np.split(ids, ends[:-1]), np.split(token_nats, ends[:-1]), strict=True)
        whole = np.concatenate([byte_nats(tokenizer, *piece) for piece in pieces])
    else:
        # The cost of an unknown word depends on the words before it.
        whole = byte_nats(tokenizer, "".join(texts), ids, token_nats)
    begin = 0
    for each in learned:
        text = "".join(each)
        end = begin + len(text.encode("utf-8"))
        yield text, whole[begin:end]
        begin = end


def _rendered_nats(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, part: TokenSplit, token_nats: Floats
) -> Iterator[tuple[str, Floats]]:
    """As `_plain_nats`, of turns by the chat template, whose end tokens have no text."""
    marks, done = np.asarray(part.marks), 0
    unknown = part.counts.spelling_nats or 0.0
    ids = np.asarray(part.ids)
    symbols = max(1, int(np.count_nonzero(ids[marks == ANSWER] == tokenizer.unknown_id)))
    for begin, end in zip(*conversation_bounds(marks), strict=True):
        tokens = ids[begin:end][marks[begin:end] == ANSWER]
        nats = token_nats[done : done + len(tokens)] + np.where(tokens == tokenizer.unknown_id, unknown / symbols, 0)
        done += len(tokens)
        stream = tokenizer.stream()
        pieces = [stream.feed(token) for token in tokens.tolist()]
        pieces[-1] += stream.end()
        ends = np.cumsum([len(piece.encode("utf-8")) for piece in pieces])
        found = np.zeros(max(1, ends[-1]))
        # A token without text is part of the character after it; an end token belongs to the answer before it.
        begins = np.append(0, ends[:-1])
        begins[np.isin(tokens, list(tokenizer.end_ids))] -= 1
        spread(found, np.stack([np.maximum(begins, 0), ends], axis=1), nats)
        yield "".join(pieces), found


def _moved(nats: Floats, spelled: str, answers: str) -> Floats:
    """The nats (S,) of the bytes of one text, on the bytes (B,) of another that differs in white space alone.

    A byte of white space that the other text has not goes to the byte before it. If more differs, bytes are moved in
    proportion.
    """
    size = len(answers.encode("utf-8"))
    if spelled == answers:
        return nats
    there, here = _solid(spelled), _solid(answers)
    places = np.arange(len(nats))
    if len(there) == len(here):
        last = np.searchsorted(there, places, side="right")
        begins = np.append(0, here)[last]
        ends = np.append(here, size)[last]
        targets = np.minimum(begins + places - np.append(0, there)[last], np.maximum(ends - 1, begins))
    else:
        targets = places * size // len(nats)
    return np.bincount(np.minimum(targets, size - 1), nats, minlength=size).astype(np.float64)


def _solid(text: str) -> npt.NDArray[np.int64]:
    """The places of the bytes of a text that are no white space."""
    is_solid = np.array([not char.isspace() for char in text], np.bool_)
    return np.flatnonzero(np.repeat(is_solid, utf8_sizes(text)))
