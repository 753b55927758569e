"""The spelling cost: nats of the parts of a text that its tokens do not determine.

A model gives the nats of a text's tokens. If the tokens do not determine the bytes of the text, bits per byte are
comparable only with the cost of two parts added:

- unknown symbols: the model predicts `<unk>`, not the symbol itself;
- the white space between words, if the tokenizer drops it.

    spelling = Spelling(tokenizer)
    ids = tokenizer.encode(text, unknown_counts=unknown_counts)
    spelling.add(text, ids, unknown_counts)
    spelling.nats()                          # 0.0 if the tokens determine the text, infinite if symbols were left out

Both costs are the lengths of decodable codes, which need no training text:

- **A word** costs its characters and an end mark, by 5-gram counts of the characters of the vocabulary's words. A
  character that is in none of these costs an escape and 8 bits per UTF-8 byte.
- **A symbol** of a tokenizer without words (an unknown character) costs 8 bits per UTF-8 byte.
- **A gap** between two tokens costs an adaptive code. The code learns from the text itself, separately for four kinds
  of gaps: between two words, before a newline or the text's end, after a newline or the text's start, between two of
  these. After n gaps, white space that was there c times costs -log(c / (n + 1 + NEW)). New white space has the weight
  NEW, and costs 8 bits per byte and 8 bits for its end in addition. At the start, each kind has one gap: a space
  between two words, nothing next to a newline.
- If the text itself spells `<unk>` or the start token, the same adaptive code separates the two meanings.

Sources: Chen and Goodman 1999 for the counts (`lm.models.kneser_ney`); the adaptive code is the sequential form of the
Dirichlet-multinomial distribution, so that its total depends on the counts alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from lm.models.kneser_ney import count_text
from lm.tokenizers.base import Ids, Tokenizer

ORDER = 5
"""Of the character counts."""
NEW = 1 / 16
"""Weight of all new white space; white space that occurred once has weight 1."""
BYTE_NATS = math.log(256)
MAX_PENDING = 100_000
"""Distinct unknown words whose cost is computed together."""
PACKED = 7
"""Bytes of white space that are compared as one number."""

_Symbol = TypeVar("_Symbol", bound=Hashable)


class Spelling:
    """Sums the spelling cost of a text that comes in pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._gaps = None if tokenizer.lossless else _Gaps()
        self._starts = self._literal_unknown = self._unknown_bytes = 0
        self._unknown_nats = 0.0
        self._unknown_words = 0
        self._pending: Counter[str] = Counter()
        self._lost = not tokenizer.lossless and tokenizer.words is None

    def add(self, text: str, ids: Ids, unknown_counts: Mapping[str, int]) -> None:
        """Add the next piece of the text.

        Args:
            text: cut at a boundary of tokens.
            ids: (N,) its tokens.
            unknown_counts: its symbols outside the vocabulary, as `Tokenizer.encode` counts them.
        """
        if unknown_counts and self._tokenizer.options.unknown == "skip":
            self._lost = True
        if self._gaps is None:
            self._unknown_bytes += sum(len(_utf8(symbol)) * count for symbol, count in unknown_counts.items())
        elif not self._lost:
            self._gaps.add(_utf8(text))
            self._starts += int(np.count_nonzero(ids == self._tokenizer.start_id))
            unknown = sum(unknown_counts.values())
            self._unknown_words += unknown
            self._literal_unknown += int(np.count_nonzero(ids == self._tokenizer.unknown_id)) - unknown
            self._pending.update(unknown_counts)
            if len(self._pending) > MAX_PENDING:
                self._spell_pending()

    def nats(self) -> float:
        """The cost of all pieces so far; infinite if symbols were left out."""
        if self._lost:
            return math.inf
        if self._gaps is None:
            return self._unknown_bytes * BYTE_NATS
        self._spell_pending()
        newlines = self._gaps.newlines
        literals = adaptive_nats({"newline": newlines, "start": self._starts - newlines}, "newline")
        literals += adaptive_nats({"word": self._unknown_words, "literal": self._literal_unknown}, "word")
        return self._gaps.nats() + literals + self._unknown_nats

    def _spell_pending(self) -> None:
        if self._pending:
            counts = np.fromiter(self._pending.values(), np.int64, len(self._pending))
            self._unknown_nats += float(characters_of(self._tokenizer).nats([*self._pending]) @ counts)
            self._pending.clear()


def spelling_nats(tokenizer: Tokenizer, text: str, ids: Ids, unknown_counts: Mapping[str, int]) -> float:
    """The cost of a whole text; see `Spelling`."""
    spelling = Spelling(tokenizer)
    spelling.add(text, ids, unknown_counts)
    return spelling.nats()


def spelling_rule(tokenizer: Tokenizer) -> str:
    """The rule of `Spelling` as text."""
    if tokenizer.words is None:
        return "an unknown symbol costs 8 bits per UTF-8 byte"
    return (
        f"an unknown word costs its characters by {ORDER}-gram counts over the words of the vocabulary (8 bits per "
        "byte for a character in none of them), white space costs an adaptive code of the gaps in this text"
    )


def adaptive_nats(
    counts: Mapping[_Symbol, int], usual: _Symbol, spell: Callable[[_Symbol], float] = lambda symbol: 0.0
) -> float:
    """Nats of a sequence under an adaptive code that starts with one count of `usual`.

    Args:
        counts: how often each symbol is in the sequence; the order does not matter.
        usual: the expected symbol.
        spell: nats of the first occurrence of another symbol.
    """
    total = sum(counts.values())
    nats = math.lgamma(total + 1 + NEW) - math.lgamma(1 + NEW)
    for symbol, count in counts.items():
        if symbol == usual:
            nats -= math.lgamma(count + 1)
        elif count:
            nats += spell(symbol) - math.log(NEW) - math.lgamma(count)
    return nats


def adaptive_costs(
    symbols: Iterable[_Symbol], usual: _Symbol, spell: Callable[[_Symbol], float] = lambda symbol: 0.0
) -> npt.NDArray[np.float64]:
    """(S,) nats of each symbol of a sequence under the same code; their sum is `adaptive_nats` of the counts."""
    counts: dict[_Symbol, int] = {usual: 1}
    costs = []
    for before, symbol in enumerate(symbols):
        count = counts.get(symbol, 0)
        counts[symbol] = count + 1
        weight = math.log(count) if count else math.log(NEW) - spell(symbol)
        costs.append(math.log(before + 1 + NEW) - weight)
    return np.array(costs, np.float64)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# -- unknown words ------------------------------------------------------------------------------------


class Characters:
    """The cost of a word's characters, by counts over a list of distinct words."""

    def __init__(self, words: Sequence[str]) -> None:
        codes = _codes(words)
        self._alphabet = np.unique(codes)
        self._end, self._escape = int(self._alphabet.searchsorted(ord("\n"))), len(self._alphabet)
        self._counts = count_text(self._alphabet.searchsorted(codes), order=ORDER, vocab_size=self._escape + 1)
        # No word is empty: the probability of an empty word goes to the first characters.
        empty = self._counts.log_probabilities_of(np.full(ORDER, self._end))[-1]
        self._never_empty = math.log1p(-math.exp(empty))

    def nats(self, words: Sequence[str]) -> npt.NDArray[np.float64]:
        """(W,) nats of each word, its end included."""
        codes = _codes(words)
        indices = np.minimum(self._alphabet.searchsorted(codes), self._escape - 1)
        new = self._alphabet[indices] != codes
        nats = -self._counts.log_probabilities_of(np.where(new, self._escape, indices))
        codes, new = codes[1:], new[1:]
        sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
        nats += np.where(new, sizes * BYTE_NATS, 0)
        inside = codes != ord("\n")
        begins = np.flatnonzero(inside & ~np.append(False, inside[:-1]))
        # Only the first end mark after a word has a cost.
        nats[~inside & ~np.append(False, inside[:-1])] = 0
        return np.add.reduceat(nats, begins) + self._never_empty


def _codes(words: Sequence[str]) -> npt.NDArray[np.uint32]:
    """The code points of words, with ORDER - 1 newlines between them, so that no context has parts of two words."""
    mark = "\n" * (ORDER - 1)
    return np.frombuffer(f"{mark}{mark.join(words)}{mark}".encode("utf-32-le", "surrogatepass"), dtype="<u4")


_characters: WeakKeyDictionary[Tokenizer, Characters] = WeakKeyDictionary()


def characters_of(tokenizer: Tokenizer) -> Characters:
    """The character counts of a tokenizer's words, without start and unknown token; cached."""
    if tokenizer not in _characters:
        special = (tokenizer.start_id, tokenizer.unknown_id)
        _characters[tokenizer] = Characters([w for i, w in enumerate(tokenizer.words or ()) if i not in special])
    return _characters[tokenizer]


# -- white space --------------------------------------------------------------------------------------

_WIDE = [chr(code).encode("utf-8") for code in range(0x80, 0x3001) if chr(code).isspace()]
_WIDE_SPACES = {size: np.array([int.from_bytes(each, "big") for each in _WIDE if len(each) == size]) for size in (2, 3)}


def white_space(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which bytes of UTF-8 text belong to white space, as `str.split` defines it."""
    # ASCII: 9 to 13 and 28 to 32. uint8 wraps around, so that one comparison bounds both sides.
    result: npt.NDArray[np.bool_] = (codes - np.uint8(9)) < 5
    result |= (codes - np.uint8(28)) < 5
    # All wider white space begins with the byte C2, or E1 to E3.
    wide = (codes - np.uint8(0xE1)) < 3
    wide |= codes == 0xC2
    positions = np.flatnonzero(wide)
    if len(positions):
        padded = np.append(codes, np.zeros(2, np.uint8))
        two = padded[positions].astype(np.int64) << 8 | padded[positions + 1]
        three = two << 8 | padded[positions + 2]
        for value, size in ((two, 2), (three, 3)):
            starts = positions[np.isin(value, _WIDE_SPACES[size])]
            for offset in range(size):
                result[starts + offset] = True
    return result


class _Gaps:
    """The white space between words and newlines, by its neighbours."""

    def __init__(self) -> None:
        self._counts: list[Counter[bytes]] = [Counter() for _ in range(4)]
        """Of gaps with 0: a word on both sides, 1: a newline after, 2: a newline before, 3: newlines on both sides."""
        self._held = b""
        """White space at the end of the last piece; the next piece may extend it."""
        self._after_newline = True
        self._begun = False
        self.newlines = 0

    def add(self, data: bytes) -> None:
        """Add the next piece of the text."""
        self._begun = self._begun or bool(data)
        data = self._held + data
        codes = np.frombuffer(data, np.uint8)
        newline = codes == ord("\n")
        self.newlines += int(np.count_nonzero(newline))
        # Padded with word boundaries.
        bounds = np.ones(len(codes) + 2, dtype=np.bool_)
        bounds[1:-1] = white_space(codes)
        inside = ~bounds[1:-1]
        starts = np.flatnonzero(newline | (inside & bounds[:-2]))
        if not len(starts):
            self._held = data
            return
        ends = np.flatnonzero(newline | (inside & bounds[2:])) + 1
        begins = np.append(0, ends[:-1])
        is_newline = newline[starts]
        kinds = 2 * np.append(self._after_newline, is_newline[:-1]) + is_newline
        self._count(data, codes, begins, starts - begins, kinds)
        self._held, self._after_newline = data[ends[-1] :], bool(is_newline[-1])

    def _count(
        self,
        data: bytes,
        codes: npt.NDArray[np.uint8],
        begins: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        kinds: npt.NDArray[np.int64],
    ) -> None:
        """Count empty gaps and single spaces, then short gaps as numbers, then long gaps."""
        empty = lengths == 0
        space = (lengths == 1) & (codes[begins] == ord(" "))
        for which, gap in ((empty, b""), (space, b" ")):
            for kind, count in enumerate(np.bincount(kinds[which], minlength=4).tolist()):
                self._counts[kind][gap] += count
        others = np.flatnonzero(~(empty | space))
        short = others[lengths[others] <= PACKED]
        packed, length = np.zeros(len(short), np.int64), lengths[short]
        for offset in range(int(length.max(initial=0))):
            has = length > offset
            packed[has] |= codes[begins[short[has]] + offset].astype(np.int64) << (8 * offset)
        found, counts = np.unique(packed << 2 | kinds[short], return_counts=True)
        for number, count in zip(found.tolist(), counts.tolist(), strict=True):
            # White space has no zero byte, so the highest non-zero byte is the last one.
            value = number >> 2
            self._counts[number & 3][value.to_bytes((value.bit_length() + 7) // 8, "little")] += count
        for gap_index in others[lengths[others] > PACKED].tolist():
            self._counts[kinds[gap_index]][data[begins[gap_index] : begins[gap_index] + lengths[gap_index]]] += 1

    def nats(self) -> float:
        """The cost of all gaps, the one at the end of the text included."""
        total = 0.0
        for kind, gaps in enumerate(self._counts):
            last = self._begun and kind == 2 * self._after_newline + 1
            counts = gaps + Counter({self._held: 1}) if last else gaps
            total += adaptive_nats(counts, b"" if kind else b" ", lambda gap: (len(gap) + 1) * BYTE_NATS)
        return total
