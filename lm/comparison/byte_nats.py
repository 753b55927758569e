"""The nats of each byte of a text, from the nats of its tokens: comparable across tokenizers.

The nats of a token are spread evenly over the bytes that it covers. The spelling cost (`lm.spelling`) is at its
place: an unknown word's on the word, white space's on the white space. So the sum over all bytes, divided by their
number, is the report's bits per byte.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lm.spelling import BYTE_NATS, adaptive_costs, characters_of
from lm.tokenizers.base import Ids, Tokenizer

Floats = npt.NDArray[np.float64]
Spans = npt.NDArray[np.int64]


def byte_nats(tokenizer: Tokenizer, text: str, ids: Ids, token_nats: Floats) -> Floats:
    """The nats of each byte of a text, spelling cost included.

    Args:
        tokenizer: of the tokens.
        text: the whole text.
        ids: (N,) its tokens.
        token_nats: (N,) minus the natural logarithm of each token's probability.

    Returns:
        (B,) of each UTF-8 byte.

    Raises:
        TokenizerError: symbols were left out, so the tokens do not determine the text.
    """
    spans = tokenizer.byte_spans(text, ids)
    data = text.encode("utf-8")
    nats = np.zeros(len(data))
    spread(nats, spans, token_nats)
    if tokenizer.words is not None:
        _spell_words(nats, tokenizer, data, ids, spans)
    elif tokenizer.unknown_id is not None:
        unknown = spans[np.asarray(ids) == tokenizer.unknown_id]
        spread(nats, unknown, BYTE_NATS * (unknown[:, 1] - unknown[:, 0]))
    return nats


def spread(nats: Floats, spans: Spans, values: Floats) -> None:
    """Add each value evenly to the bytes of its span; that of an empty span to the next byte, or to the last."""
    begins, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    covered = lengths > 0
    inside, size = lengths[covered], int(lengths.sum())
    offsets = np.arange(size) - np.repeat(np.cumsum(inside) - inside, inside)
    nats[np.repeat(begins[covered], inside) + offsets] += np.repeat(values[covered] / inside, inside)
    np.add.at(nats, np.minimum(begins[~covered], len(nats) - 1), values[~covered])


def _spell_words(nats: Floats, tokenizer: Tokenizer, data: bytes, ids: Ids, spans: Spans) -> None:
    """Add the spelling cost of a tokenizer of words, as `Spelling` sums it: unknown words, literal marks, gaps."""
    ids = np.asarray(ids)
    unknown = np.flatnonzero(ids == tokenizer.unknown_id)
    spelled = [data[begin:end].decode("utf-8") for begin, end in spans[unknown].tolist()]
    assert tokenizer.words is not None and tokenizer.unknown_id is not None
    literal = [word == tokenizer.words[tokenizer.unknown_id] for word in spelled]
    spread(nats, spans[unknown], adaptive_costs(["literal" if each else "word" for each in literal], "word"))
    words = [word for word, each in zip(spelled, literal, strict=True) if not each]
    if words:
        costs = dict(zip(distinct := [*dict.fromkeys(words)], characters_of(tokenizer).nats(distinct), strict=True))
        spread(nats, spans[unknown[~np.array(literal)]], np.array([costs[word] for word in words]))
    starts = np.flatnonzero(ids == tokenizer.start_id)
    marks = ["newline" if data[begin] == ord("\n") else "start" for begin in spans[starts, 0].tolist()]
    spread(nats, spans[starts], adaptive_costs(marks, "newline"))
    _spell_gaps(nats, data, spans)


def _spell_gaps(nats: Floats, data: bytes, spans: Spans) -> None:
    """Add the cost of the white space before each token and after the last one."""
    gaps = np.stack([np.append(0, spans[:, 1]), np.append(spans[:, 0], len(data))], axis=1)
    newline = np.frombuffer(data, np.uint8)[spans[:, 0]] == ord("\n")
    # The text's start and end count as newlines.
    kinds = 2 * np.append(True, newline) + np.append(newline, True)
    for kind in range(4):
        own = gaps[kinds == kind]
        spaces = (data[begin:end] for begin, end in own.tolist())
        costs = adaptive_costs(spaces, b"" if kind else b" ", lambda gap: (len(gap) + 1) * BYTE_NATS)
        spread(nats, own, costs)


def bits(nats: float, count: int) -> float:
    """Bits for each of `count` units."""
    return nats / math.log(2) / max(count, 1)
