"""Bytes as tokens: 256 of them, without training and without unknown symbols.

ByteTokenizer(ByteOptions()).encode("é\n")        # array([195, 169, 10], dtype=uint8)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from lm.errors import TokenizerError
from lm.tokenizers.base import (
    Ids,
    StreamDecoder,
    Tokenizer,
    TokenizerOptions,
    UnknownPolicy,
    Utf8StreamDecoder,
    spans_of_sizes,
    visible_byte,
    without_surrogates,
)
from lm.tokenizers.llama_cpp import NORMAL, LlamaCppVocabulary

if TYPE_CHECKING:
    import tokenizers as huggingface

REGISTERS = {"byte": "ByteTokenizer"}

_BYTES = [bytes([value]) for value in range(256)]


class ByteOptions(TokenizerOptions):
    """Options of the byte tokenizer."""

    type: Literal["byte"] = "byte"


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes of the text; the id is the byte. The start token is the newline, byte 10."""

    Options = ByteOptions
    type = "byte"
    lossless = True

    vocab_size = 256
    start_id = 10
    unknown_id = None

    def __init__(self, options: ByteOptions) -> None:
        """A byte tokenizer has no vocabulary to give."""
        self.options = options

    @classmethod
    def train(cls, texts: Iterable[str], options: ByteOptions) -> Self:
        """Checks only that there is text.

        Raises:
            TokenizerError: the text is empty.
        """
        if not any(texts):
            raise TokenizerError("The training text is empty: give a text.")
        return cls(options)

    def encode(
        self, text: str, *, unknown: UnknownPolicy | None = None, unknown_counts: Counter[str] | None = None
    ) -> Ids:
        """UTF-8 bytes (N,) uint8 of `text`; see `Tokenizer.encode`."""
        policy = self.policy(unknown)
        try:
            raw = bytearray(text, "utf-8")
        except UnicodeEncodeError:
            raw = bytearray(without_surrogates(text, policy, unknown_counts), "utf-8")
        # A bytearray, so that the array is writable.
        return np.frombuffer(raw, dtype=np.uint8)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of the bytes; those that are not UTF-8 become U+FFFD."""
        return self.checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def pieces(self, ids: Sequence[int] | Ids) -> list[str]:
        """ASCII characters as themselves, other bytes as "<0xE2>"."""
        return [visible_byte(value) for value in self.checked(ids).tolist()]

    def stream(self, *, after: Sequence[int] | Ids = ()) -> StreamDecoder:
        """A decoder that gives whole characters."""
        return Utf8StreamDecoder(self, _BYTES)

    def to_huggingface(self) -> huggingface.Tokenizer:
        """See `Tokenizer.to_huggingface`: byte-level BPE without merges, numbered by byte."""
        import tokenizers as huggingface
        from tokenizers import decoders, models, pre_tokenizers

        alphabet = byte_alphabet()
        converted = huggingface.Tokenizer(models.BPE({alphabet[value]: value for value in range(256)}, []))
        converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        converted.decoder = decoders.ByteLevel()
        return converted

    def to_gguf(self) -> LlamaCppVocabulary:
        """See `Tokenizer.to_gguf`: byte-level BPE without merges, numbered by byte."""
        return LlamaCppVocabulary(
            model="gpt2",
            tokens=byte_alphabet(),
            types=[NORMAL] * 256,
            end_id=0,
            # The list must not be empty: no text has these characters of the alphabet.
            merges=["\u0200 \u0201"],
            # Without merges any rule does; with this one no spaces are taken out of decoded text.
            split="qwen2",
            notes=("The byte 0 ends a text there.",),
        )

    def byte_spans(self, text: str, ids: Sequence[int] | Ids) -> npt.NDArray[np.int64]:
        """See `Tokenizer.byte_spans`; each token is a byte."""
        return spans_of_sizes(np.ones(len(ids), np.int64), text)

    def to_page(self) -> dict[str, Any]:
        """See `Tokenizer.to_page`."""
        return {}

    def payload(self) -> dict[str, Any]:
        """Empty: all byte tokenizers are equal."""
        return {}

    @classmethod
    def from_payload(cls, options: ByteOptions, payload: dict[str, Any]) -> Self:
        """The byte tokenizer."""
        return cls(options)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE of the library `tokenizers`, as in GPT-2.

    Printable bytes of Latin-1 stand for themselves; the others are U+0100 and following, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return [chr(value) if value in printable else chr(256 + others.index(value)) for value in range(256)]
