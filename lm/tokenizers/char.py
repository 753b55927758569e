"""Characters (Unicode code points) as tokens.

tokenizer = CharTokenizer.train(["hello\n"], CharOptions())      # "\n", "e", "h", "l", "o" and <unk>
tokenizer.encode("hello?")                                       # array([2, 1, 3, 3, 4, 5], dtype=uint8)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lm.errors import TokenizerError, UnsupportedExportError
from lm.tokenizers.base import (
    REPLACEMENT,
    ByteFreeOptions,
    Ids,
    Tokenizer,
    UnknownPolicy,
    spans_of_sizes,
    unknown_symbol,
    utf8_sizes,
    visible,
)
from lm.tokenizers.llama_cpp import NORMAL, SPACE, UNKNOWN, LlamaCppVocabulary

if TYPE_CHECKING:
    import tokenizers as huggingface

REGISTERS = {"char": "CharTokenizer"}

_BLOCK = 1 << 18  # characters processed at a time: fits the caches, and amortises the calls
_UNICODE = 0x110000
_UNK = "<unk>"
_SURROGATES = slice(0xD800, 0xE000)


class CharOptions(ByteFreeOptions):
    """Options of the character tokenizer."""

    type: Literal["char"] = "char"
    min_count: int = Field(1, ge=1, description="Characters that occur less often in the training split become <unk>.")


class CharTokenizer(Tokenizer):
    """The distinct characters of the training split in order of code point, and `<unk>` as the last id.

    The newline, which is the start token, is always among them. `<unk>` decodes to U+FFFD.
    """

    Options = CharOptions
    type = "char"
    lossless = True

    unknown_id: int

    def __init__(self, options: CharOptions, vocabulary: str) -> None:
        """Build from the characters of the vocabulary, sorted, without repeats, with a newline among them."""
        self.options = options
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary) + 1
        self.start_id = vocabulary.index("\n")
        self.unknown_id = len(vocabulary)
        known = _codes(vocabulary)
        # One entry more than the highest code point: higher code points are clipped to it, and are unknown.
        self._ids = np.full(int(known[-1]) + 2, self.unknown_id, dtype=self.dtype)
        self._ids[known] = np.arange(len(known))
        self._codes = np.append(known, ord(REPLACEMENT)).astype("<u4")
        latin = np.full(256, self.unknown_id, dtype=self.dtype)
        latin[: min(256, len(self._ids))] = self._ids[:256]
        self._latin = latin
        self._latin_bytes = latin.tobytes() if self.dtype == np.uint8 else None

    @classmethod
    def train(cls, texts: Iterable[str], options: CharOptions) -> Self:
        """Collect the characters of the training split.

        Raises:
            TokenizerError: the text is empty.
        """
        counts = np.zeros(_UNICODE, dtype=np.int64)
        few: Counter[str] = Counter()
        for text in texts:
            if len(text) < _BLOCK // 8:
                few.update(text)  # short pieces: faster than an array over the code points
            for block in _blocks(text) if len(text) >= _BLOCK // 8 else ():
                found = np.bincount(_codes(block))
                counts[: len(found)] += found
        for char, count in few.items():
            counts[ord(char)] += count
        if not counts.any():
            raise TokenizerError("The training text is empty: give a text.")
        counts[_SURROGATES] = 0  # not characters, and UTF-8 has no bytes for them
        counts[ord("\n")] = max(counts[ord("\n")], options.min_count)
        kept = np.flatnonzero(counts >= options.min_count)
        return cls(options, kept.astype("<u4").tobytes().decode("utf-32-le"))

    def encode(
        self, text: str, *, unknown: UnknownPolicy | None = None, unknown_counts: Counter[str] | None = None
    ) -> Ids:
        """Ids (N,) of the characters of `text`; see `Tokenizer.encode`."""
        policy = self.policy(unknown)
        if len(text) <= _BLOCK:
            ids = self._lookup(text)
        else:
            ids = np.empty(len(text), dtype=self.dtype)
            for index, block in enumerate(_blocks(text)):
                ids[index * _BLOCK : index * _BLOCK + len(block)] = self._lookup(block)
        is_unknown = ids == self.unknown_id
        if is_unknown.any():
            positions = np.flatnonzero(is_unknown)
            if unknown_counts is not None:
                unknown_counts.update(text[position] for position in positions.tolist())
            if policy == "error":
                first = int(positions[0])
                raise unknown_symbol(
                    text, first, text[first], remedy="Set unknown to replace or skip, or train on text that has it."
                )
            if policy == "skip":
                ids = ids[~is_unknown]
        return ids

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The characters of the ids; `<unk>` gives U+FFFD."""
        return self._codes[self.checked(ids)].tobytes().decode("utf-32-le")

    def pieces(self, ids: Sequence[int] | Ids) -> list[str]:
        """Each character for display; `<unk>` as itself."""
        return [
            _UNK if token == self.unknown_id else visible(self.vocabulary[token])
            for token in self.checked(ids).tolist()
        ]

    def to_huggingface(self) -> huggingface.Tokenizer:
        """See `Tokenizer.to_huggingface`: each character is looked up as a word."""
        import tokenizers as huggingface
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

        vocabulary = {char: token for token, char in enumerate(self.vocabulary)}
        converted = huggingface.Tokenizer(models.WordLevel({**vocabulary, _UNK: self.unknown_id}, unk_token=_UNK))
        if self.options.unknown == "skip":
            known = "".join(f"\\x{{{ord(char):X}}}" for char in self.vocabulary)
            converted.normalizer = normalizers.Replace(Regex(f"[^{known}]"), "")
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        converted.decoder = decoders.Sequence([decoders.Replace(_UNK, REPLACEMENT), decoders.Fuse()])
        return converted

    def to_gguf(self) -> LlamaCppVocabulary:
        """See `Tokenizer.to_gguf`: unigram tokens of one character each.

        Raises:
            UnsupportedExportError: the vocabulary has a character that llama.cpp cannot hold.
        """
        for char in ("\0", SPACE):
            if char in self.vocabulary:
                raise UnsupportedExportError(
                    f"llama.cpp cannot hold the character U+{ord(char):04X} of this vocabulary: train on a text "
                    "without it, or with --set tokenizer.type=byte."
                )
        return LlamaCppVocabulary(
            model="t5",
            tokens=[*self.vocabulary.replace(" ", SPACE), _UNK],
            types=[NORMAL] * len(self.vocabulary) + [UNKNOWN],
            end_id=self.unknown_id,
            # All are equal: a character has one token.
            scores=[-1.0] * self.vocab_size,
            unknown_id=self.unknown_id,
            notes=(
                "A run of characters outside the vocabulary becomes one unknown token there, whatever the policy is.",
                "The unknown token ends a text there.",
                f"The character {SPACE} (U+2581) is read as a space there.",
            ),
        )

    def byte_spans(self, text: str, ids: Sequence[int] | Ids) -> npt.NDArray[np.int64]:
        """See `Tokenizer.byte_spans`; each token is a character."""
        sizes = utf8_sizes(text)
        # Fewer tokens than characters: symbols were left out.
        return spans_of_sizes(sizes[: len(ids)], text)

    def to_page(self) -> dict[str, Any]:
        """See `Tokenizer.to_page`."""
        return self.payload()

    def payload(self) -> dict[str, Any]:
        """The characters by id, as one string, without `<unk>`, which is last."""
        return {"vocabulary": self.vocabulary}

    @classmethod
    def from_payload(cls, options: CharOptions, payload: dict[str, Any]) -> Self:
        """The tokenizer of these characters.

        Raises:
            ValueError: they are not distinct characters in order of code point, or have no newline.
        """
        vocabulary = payload["vocabulary"]
        if not isinstance(vocabulary, str) or "\n" not in vocabulary:
            raise ValueError("the vocabulary is not a string with a newline in it.")
        codes = _codes(vocabulary).astype(np.int64)
        if (np.diff(codes) <= 0).any() or ((codes >= _SURROGATES.start) & (codes < _SURROGATES.stop)).any():
            raise ValueError("the vocabulary is not a string of distinct characters in order of code point.")
        return cls(options, vocabulary)

    def _lookup(self, text: str) -> Ids:
        """Ids of one block, by table."""
        if self._latin_bytes is not None:
            try:
                # A bytearray, so that the array is writable.
                return np.frombuffer(bytearray(text, "latin-1").translate(self._latin_bytes), dtype=np.uint8)
            except UnicodeEncodeError:
                pass
        return self._ids.take(_codes(text), mode="clip")


def _blocks(text: str) -> Iterable[str]:
    return (text[start : start + _BLOCK] for start in range(0, len(text), _BLOCK))


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """Code points (N,) of `text`, lone surrogates included."""
    try:
        return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    except UnicodeEncodeError:
        # The codec calls its error handler for each surrogate: 20 times slower, and no other thread runs meanwhile.
        return np.array([text], dtype=f"<U{len(text)}").view("<u4")
