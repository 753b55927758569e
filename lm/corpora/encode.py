"""Text → tokens: counts, hash, spelling cost and notices of unknown symbols."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.corpora.corpus import logger
from lm.corpora.text import regroup, utf8
from lm.errors import CorpusError
from lm.spelling import Spelling, spelling_nats, white_space
from lm.tokenizers.base import Ids, Tokenizer

MAX_SYMBOLS_IN_NOTICE = 8
MAX_COUNTED_SYMBOLS = 200_000


@dataclass(frozen=True)
class Counts:
    """Length of a split in every unit that perplexity is given in; of conversations, that of their answers."""

    characters: int
    """Unicode code points."""
    bytes: int
    """Of the UTF-8 text."""
    words: int
    """`len(text.split())`."""
    lines: int
    """Newlines."""
    lm_eval_words: int
    """`len(re.split(r"\\s+", text))`, as the LM evaluation harness counts."""
    tokens: int
    """N, without the start token."""
    unknown_tokens: int
    """How many of the N are the unknown token."""
    crlf_lines: int = 0
    """Newlines that follow a carriage return; 0 also if an older Inkling did not count them."""
    spelling_nats: float | None = None
    """Nats of the text that the tokens do not determine (`lm.spelling`). Infinite if symbols were left out, None if an
    older Inkling did not measure it."""
    context_tokens: int = 0
    """Tokens that are context alone, of conversations; they are not among the N."""

    @property
    def all_tokens(self) -> int:
        """The tokens that a model reads: the N, and those that are context alone."""
        return self.tokens + self.context_tokens

    def whole_nats(self, token_nats: float) -> float | None:
        """Nats of the text, given the nats of its tokens; None if the spelling cost is unknown or infinite."""
        spelling = self.spelling_nats
        return None if spelling is None or math.isinf(spelling) else token_nats + spelling

    def bits_per_byte(self, loss: float) -> float | None:
        """Bits per byte of the text, given nats per token; None if the spelling cost is unknown or infinite."""
        spelled = self.whole_nats(0.0)
        if spelled is None:
            return None
        return loss / math.log(2) * self.tokens / self.bytes + spelled / math.log(2) / self.bytes


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split."""

    name: str
    ids: Ids
    """(N+1,) the start token, then the N tokens; memory-mapped if it was prepared."""
    counts: Counts
    sha256: str
    """Of the split's text in UTF-8."""
    marks: npt.NDArray[np.uint8] | None = None
    """(N+1,) the mark of each token, if the split holds conversations: see `lm.corpora.answers`."""


class Measure:
    """Hash and counts of a UTF-8 text that comes in pieces, cut anywhere between two characters."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._characters = self._bytes = self._words = self._lines = self._crlf_lines = 0
        self._starts_with_space = self._after_return = False
        self._after_space = True

    def update(self, data: bytes) -> None:
        """Add the next piece."""
        if not data:
            return
        codes = np.frombuffer(data, np.uint8)
        space = white_space(codes)
        if not self._bytes:
            self._starts_with_space = bool(space[0])
        self._words += int(np.count_nonzero(space[:-1] > space[1:])) + (self._after_space and not space[0])
        self._after_space = bool(space[-1])
        self._hash.update(data)
        # Bytes 0x80 to 0xBF continue a character; as signed numbers they are -128 to -65.
        self._characters += int(np.count_nonzero(codes.view(np.int8) > -65))
        self._bytes += len(data)
        self._lines += int(np.count_nonzero(codes == ord("\n")))
        self._crlf_lines += self._after_return and data[0] == ord("\n")
        # A search for one byte is much faster than for two, and most texts have no carriage return.
        self._crlf_lines += data.count(b"\r\n") if b"\r" in data else 0
        self._after_return = data[-1] == ord("\r")

    @property
    def sha256(self) -> str:
        """Of all pieces so far."""
        return self._hash.hexdigest()

    def counts(self, *, tokens: int = 0, unknown_tokens: int = 0, spelling_nats: float | None = None) -> Counts:
        """The counts of all pieces so far."""
        # A split at runs of white space gives one part more than there are runs; a run at an end gives an empty part.
        ends = (self._starts_with_space + self._after_space) if self._bytes else 1
        return Counts(
            characters=self._characters,
            bytes=self._bytes,
            words=self._words,
            lines=self._lines,
            lm_eval_words=self._words + ends,
            tokens=tokens,
            unknown_tokens=unknown_tokens,
            crlf_lines=self._crlf_lines,
            spelling_nats=spelling_nats,
        )


class UnknownSymbolCounter:
    """Counts symbols outside the vocabulary; memory stays bounded."""

    def __init__(self) -> None:
        self.total = 0
        self._counts: Counter[str] = Counter()

    def add(self, counts: Counter[str]) -> None:
        """Add the counts of one call of the tokenizer."""
        self.total += counts.total()
        self._counts.update(counts)
        if len(self._counts) > MAX_COUNTED_SYMBOLS:
            self._counts = Counter(dict(self._counts.most_common(MAX_COUNTED_SYMBOLS // 2)))

    def most_common(self) -> list[tuple[str, int]]:
        """The most frequent symbols, as many as a notice names."""
        return self._counts.most_common(MAX_SYMBOLS_IN_NOTICE)


def warn_of_unknown(name: str, tokenizer: Tokenizer, total: int, common: Iterable[tuple[str, int]]) -> None:
    """Log a warning that names the most frequent symbols outside the vocabulary; nothing if `total` is 0."""
    if not total:
        return
    action = {
        "replace": "replaced by the unknown token",
        "skip": "left out",
        "byte": "encoded as bytes",
        "error": "refused",
    }[tokenizer.options.unknown]
    listed = ", ".join(f"{symbol!r} ({count:,}×)" for symbol, count in common)
    times = "once" if total == 1 else f"{total:,} times"
    logger.warning("%s: symbols outside the vocabulary were found %s and %s: %s.", name, times, action, listed)


class Encoder:
    """Encodes a split chunk by chunk and counts its tokens."""

    def __init__(self, tokenizer: Tokenizer, unknown: UnknownSymbolCounter) -> None:
        self._tokenizer = tokenizer
        self._unknown = unknown
        self._spelling = Spelling(tokenizer)
        self.tokens = 0
        self.unknown_tokens = 0
        self.characters = 0

    def start(self) -> Ids:
        """(1,) the start token, with which a token file begins."""
        return np.array([self._tokenizer.start_id], self._tokenizer.dtype)

    def encode(self, chunk: str) -> Ids:
        """The tokens of the next chunk."""
        unknown_counts: Counter[str] = Counter()
        ids = self._tokenizer.encode(chunk, unknown_counts=unknown_counts)
        if unknown_counts:
            self._unknown.add(unknown_counts)
        self._spelling.add(chunk, ids, unknown_counts)
        self.tokens += len(ids)
        self.characters += len(chunk)
        self.unknown_tokens += _count_unknown(self._tokenizer, ids)
        return ids

    def counts(self, measure: Measure) -> Counts:
        """The counts of the encoded text, which `measure` has read too."""
        return measure.counts(**self.counts_of_tokens())

    def counts_of_tokens(self) -> dict[str, Any]:
        """The counts that depend on the tokens, as fields of `Counts`."""
        return {
            "tokens": self.tokens, "unknown_tokens": self.unknown_tokens, "spelling_nats": self._spelling.nats()
        }  # fmt: skip


def _count_unknown(tokenizer: Tokenizer, ids: Ids) -> int:
    return 0 if tokenizer.unknown_id is None else int(np.count_nonzero(ids == tokenizer.unknown_id))


def encode_text(name: str, text: str | Iterable[str], tokenizer: Tokenizer) -> TokenSplit:
    """Tokens of a text, in memory; warns of unknown symbols as `prepare` does.

    Args:
        name: of the split, and of the text in warnings.
        text: the text, or its pieces in order (such as `split.chunks()`).
        tokenizer: a trained tokenizer.

    Raises:
        CorpusError: the text gives no token.
    """
    measure, unknown = Measure(), UnknownSymbolCounter()
    encoder = Encoder(tokenizer, unknown)
    parts = [encoder.start()]
    for chunk in regroup([text] if isinstance(text, str) else text):
        measure.update(utf8(chunk))
        parts.append(encoder.encode(chunk))
    if not encoder.tokens:
        raise CorpusError(f"{name} is empty: it has no token to score.")
    warn_of_unknown(name, tokenizer, unknown.total, unknown.most_common())
    return TokenSplit(name, np.concatenate(parts), encoder.counts(measure), measure.sha256)


def measure_text(text: str, tokenizer: Tokenizer, ids: Ids, unknown_counts: Mapping[str, int]) -> tuple[Counts, str]:
    """Counts and hash of a text that is already encoded, as `encode_text` gives them; without a warning.

    Args:
        text: the text.
        tokenizer: its tokenizer.
        ids: (N,) its tokens.
        unknown_counts: the symbols outside the vocabulary, as `Tokenizer.encode` counted them.

    Raises:
        CorpusError: the text holds half of a surrogate pair.
    """
    measure = Measure()
    measure.update(utf8(text))
    nats = spelling_nats(tokenizer, text, ids, unknown_counts)
    counts = measure.counts(tokens=len(ids), unknown_tokens=_count_unknown(tokenizer, ids), spelling_nats=nats)
    return counts, measure.sha256
