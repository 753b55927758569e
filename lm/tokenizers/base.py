"""The Tokenizer contract: text ↔ token ids, saved to one readable file.

A tokenizer is trained on the training split alone, then never changes. Every tokenizer has a start token, from which
the first token of a text is predicted, so that all N tokens of a text are scored.

    tokenizer = CharTokenizer.train(["hello\n"], CharOptions())
    ids = tokenizer.encode("hello")        # array([...], dtype=uint8)
    tokenizer.decode(ids)                  # "hello"
"""

from __future__ import annotations

import codecs
import copy
import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from lm.config import Options, validate
from lm.errors import (
    ConfigError,
    FormatVersionError,
    LMError,
    TokenizerError,
    UnknownSymbolError,
    UnsupportedExportError,
)
from lm.registry import TOKENIZERS

if TYPE_CHECKING:
    import tokenizers as huggingface

    from lm.tokenizers.llama_cpp import LlamaCppVocabulary

TOKENIZER_FORMAT_VERSION = 1

UnknownPolicy = Literal["replace", "skip", "byte", "error"]
Ids = npt.NDArray[np.unsignedinteger[Any]]


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SURROGATE = re.compile("[\ud800-\udfff]")


class TokenizerOptions(Options):
    """Options that every tokenizer has; subclasses narrow `type` to their registered name."""

    type: str = Field(description="Registered name of the tokenizer.")
    unknown: UnknownPolicy = Field(
        "replace",
        description="Policy for symbols outside the vocabulary: replace (the unknown token), skip (nothing), "
        "byte (their UTF-8 bytes, if the vocabulary has them), error (refuse the text).",
    )


class ByteFreeOptions(TokenizerOptions):
    """Options of a tokenizer without bytes in its vocabulary: the policy `byte` is refused."""

    @field_validator("unknown")
    @classmethod
    def _no_bytes(cls, value: UnknownPolicy) -> UnknownPolicy:
        if value == "byte":
            raise ValueError("the vocabulary holds no bytes; choose replace, skip or error")
        return value


class Tokenizer(ABC):
    """Text ↔ ids. Subclasses set `options`, `vocab_size`, `start_id` and `unknown_id`.

    A lone surrogate (U+D800 to U+DFFF) is half of a UTF-16 pair, and has no UTF-8 bytes. Every tokenizer treats it as
    a symbol outside its vocabulary; with bytes in the vocabulary, `replace` and `byte` encode it as U+FFFD.
    """

    Options: ClassVar[type[TokenizerOptions]]
    type: ClassVar[str]
    lossless: bool
    """Whether `decode(encode(s)) == s` for every `s` without unknown symbols."""
    words: Sequence[str] | None = None
    """The tokens by id, if they are words separated by white space and each newline is the start token."""
    whole_lines: ClassVar[bool] = False
    """Whether `encode` processes a line in one call that blocks other threads, so that long lines block them long."""

    options: TokenizerOptions
    vocab_size: int
    start_id: int
    """The token before the first: `<eos>` for words and subwords, a newline for characters and bytes."""
    unknown_id: int | None
    """The token `<unk>`, which sampling should not emit; None if the vocabulary has none."""
    end_ids: tuple[int, ...] = ()
    """The tokens that end a text or a turn of a conversation, the model's own first; generation stops before one."""
    chat_template: str | None = None
    """A conversation as text, in the language Jinja; None: the model was trained without one."""

    @classmethod
    @abstractmethod
    def train(cls, texts: Iterable[str], options: Any) -> Self:
        """Learn the vocabulary from pieces of text, in order, in one pass and with constant memory.

        The pieces may be cut anywhere.

        Raises:
            TokenizerError: the text is empty, or the options do not fit it.
        """

    @abstractmethod
    def encode(
        self, text: str, *, unknown: UnknownPolicy | None = None, unknown_counts: Counter[str] | None = None
    ) -> Ids:
        """Ids (N,) of `text` in `self.dtype`, a new writable array.

        Args:
            text: any text. Pieces cut after a newline give the same ids as the whole.
            unknown: the policy for this call; None is `options.unknown`.
            unknown_counts: each symbol outside the vocabulary is counted here, with any policy.

        Raises:
            UnknownSymbolError: under the policy `error`; names the symbol and its line and column in `text`.
            ConfigError: the policy is `byte` and the vocabulary holds no bytes.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of the ids; `decode(encode(s)) == s` for byte, char and subword.

        Bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """

    @abstractmethod
    def pieces(self, ids: Sequence[int] | Ids) -> list[str]:
        """One string per token for display, never empty.

        A newline is "\\n", other control characters are their escapes, a space is "▁", and a byte that is not a whole
        character is "<0xE2>".
        """

    @property
    def end_id(self) -> int | None:
        """The first of `end_ids`, which ends a text or turn that the model learns; None if there is none."""
        return self.end_ids[0] if self.end_ids else None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the chat template, for `encode_rendered`.

        What looks like a special token in a message is marked, so that it stays text.

        Args:
            messages: the turns, in order: "role" ("system", "user" or "assistant") and "content".
            add_generation_prompt: end with the beginning of a reply.

        Raises:
            TokenizerError: there is no chat template, it has an error, or it refuses these messages.
        """
        raise TokenizerError(f"The {self.type} tokenizer of this model has no chat template.")

    def encode_rendered(self, text: str) -> Ids:
        """Ids (N,) of a part of a text of `render_chat`, with the template's special tokens."""
        return self.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> Ids:
        """Ids (N,) of a conversation by the chat template; no start token is added. See `render_chat`."""
        return self.encode_rendered(self.render_chat(messages, add_generation_prompt=add_generation_prompt))

    def byte_spans(self, text: str, ids: Sequence[int] | Ids) -> npt.NDArray[np.int64]:
        """The bytes of a text that each of its tokens covers.

        Spans are in the order of the text and do not overlap. Bytes that no token covers (white space between words)
        are in no span. Where a token ends inside a character, this default gives the character to the token that
        completes it, and the others an empty span.

        Args:
            text: any text.
            ids: (N,) its tokens, as `encode` gives them.

        Returns:
            (N, 2) begin and end of each token in the UTF-8 bytes.

        Raises:
            TokenizerError: these are not the tokens of all symbols of the text.
        """
        stream = self.stream()
        sizes = [len(stream.feed(token).encode("utf-8")) for token in self.checked(ids).tolist()]
        if sizes:
            sizes[-1] += len(stream.end().encode("utf-8"))
        return spans_of_sizes(np.array(sizes, np.int64), text)

    def stream(self, *, after: Sequence[int] | Ids = ()) -> StreamDecoder:
        """A decoder that takes one id at a time and never gives half a character.

        Args:
            after: the ids before the stream (a prompt). If it ends with a whole character, decode(after) and the text
                of the stream, joined, equal the text of all ids.
        """
        return StreamDecoder(self)

    @functools.cached_property
    def token_texts(self) -> dict[int, str]:
        """Cache of the text of single tokens, for streams; 50 times as fast as `decode`."""
        return {}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint8, uint16 and uint32 that holds every id."""
        return np.dtype(np.min_scalar_type(self.vocab_size - 1))

    def checked(self, ids: Sequence[int] | Ids) -> npt.NDArray[np.int64]:
        """The ids as an array (N,), each checked to be inside the vocabulary.

        Raises:
            TokenizerError: one is not.
        """
        array = np.asarray(ids, dtype=np.int64)
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise TokenizerError(
                f"Token {array[outside][0]} is outside the vocabulary of {self.vocab_size} tokens. "
                "The ids were probably made by another tokenizer."
            )
        return array

    def policy(self, unknown: UnknownPolicy | None) -> UnknownPolicy:
        """The policy of one call: `unknown`, or the option if it is None.

        Raises:
            ConfigError: it is `byte` and the vocabulary holds no bytes.
        """
        chosen = self.options.unknown if unknown is None else unknown
        if chosen == "byte" and issubclass(self.Options, ByteFreeOptions):
            raise ConfigError(
                f"unknown = 'byte': the vocabulary of the {self.type} tokenizer holds no bytes. "
                "Choose replace, skip or error."
            )
        return chosen

    def to_huggingface(self) -> huggingface.Tokenizer:
        """The same tokenizer of the library `tokenizers`: the same ids and texts, except with `skip` and `error`.

        Symbols outside the vocabulary become the unknown token there under the policy `error`, and for words under
        `skip`. No token is "special" there, so that no text is taken for one, and no newline is dropped.

        Raises:
            UnsupportedExportError: this kind has no counterpart.
        """
        raise UnsupportedExportError(f"{self.type} tokenizers have no counterpart in the library tokenizers.")

    def huggingface_config(self) -> dict[str, Any]:
        """What tokenizer_config.json of transformers says in addition: the special tokens and the chat template."""
        return {} if self.chat_template is None else {"chat_template": self.chat_template}

    def to_gguf(self) -> LlamaCppVocabulary:
        """The same tokenizer of llama.cpp: the same ids, except for what its notes name.

        Raises:
            UnsupportedExportError: llama.cpp has no counterpart.
        """
        raise UnsupportedExportError(
            f"llama.cpp has no counterpart of {self.type} tokens: train with --set tokenizer.type=subword, or char or "
            "byte."
        )

    def to_page(self) -> dict[str, Any]:
        """What the JavaScript tokenizer of this type needs: JSON values, and arrays (N,).

        See lm/interop/html_assets/tokenizers.js.

        Raises:
            UnsupportedExportError: this kind has no counterpart there.
        """
        raise UnsupportedExportError(f"{self.type} tokenizers do not export to html: train with another tokenizer.")

    # -- one readable file ------------------------------------------------------------------------

    @abstractmethod
    def payload(self) -> dict[str, Any]:
        """What `from_payload` needs in addition to the options: JSON values, with a readable vocabulary."""

    @classmethod
    @abstractmethod
    def from_payload(cls, options: Any, payload: dict[str, Any]) -> Self:
        """The tokenizer that gave `payload`."""

    def to_json(self) -> str:
        """The text of the file; equal tokenizers give equal text."""
        return json.dumps(self._content_of_file(), ensure_ascii=False, indent=1) + "\n"

    def _content_of_file(self) -> dict[str, Any]:
        return {
            "format_version": TOKENIZER_FORMAT_VERSION,
            "type": self.type,
            "options": self.options.model_dump(mode="json", exclude={"type"}),
            "vocab_size": self.vocab_size,
            **self.payload(),
        }

    @property
    def sha256(self) -> str:
        """Hash of the saved file."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def save(self, path: Path) -> None:
        """Write the one file, UTF-8 JSON."""
        path.write_text(self.to_json(), encoding="utf-8", newline="")


class StreamDecoder:
    """Decodes a growing list of ids, piece by piece.

    The texts of `feed` and `end`, joined, equal `decode` of all the ids. This base class is for tokenizers whose tokens
    are whole characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start a stream of `tokenizer`'s ids."""
        self._tokenizer = tokenizer
        self._texts = tokenizer.token_texts

    def feed(self, token: int) -> str:
        """The text that `token` completes; may be ""."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._tokenizer.decode([token])
        return text

    def end(self) -> str:
        """The rest of the text."""
        return ""

    def copy(self) -> Self:
        """An independent decoder with the same ids so far."""
        return copy.copy(self)


class Utf8StreamDecoder(StreamDecoder):
    """For tokens that are bytes: holds the bytes of a character until it is complete or invalid."""

    def __init__(self, tokenizer: Tokenizer, table: Sequence[bytes]) -> None:
        """Start a stream of `tokenizer`'s ids; `table` holds the bytes of each."""
        super().__init__(tokenizer)
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes; may be ""."""
        if not 0 <= token < len(self._table):
            self._tokenizer.checked([token])
        return self._decoder.decode(self._table[token])

    def end(self) -> str:
        """U+FFFD if the last character is incomplete, else ""."""
        return self._decoder.decode(b"", final=True)

    def copy(self) -> Self:
        """See `StreamDecoder.copy`."""
        twin = super().copy()
        twin._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        twin._decoder.setstate(self._decoder.getstate())
        return twin


# -- shared by the tokenizers ------------------------------------------------------------------------


def line_blocks(text: str, size: int) -> Iterator[str]:
    """`text` in blocks of at least `size` characters, each but the last cut after a newline."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def utf8_sizes(text: str) -> npt.NDArray[np.int64]:
    """(C,) UTF-8 bytes of each character of `text`, which has no lone surrogates."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes: npt.NDArray[np.int64] = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return sizes


def spans_of_sizes(sizes: npt.NDArray[np.int64], text: str) -> npt.NDArray[np.int64]:
    """(N, 2) spans of tokens of these sizes in bytes that cover all of `text`.

    Raises:
        TokenizerError: they are shorter or longer than the text.
    """
    ends = np.cumsum(sizes)
    if (ends[-1] if len(ends) else 0) != len(text.encode("utf-8")):
        raise TokenizerError("The tokens do not cover the text: symbols were left out, or it is another text.")
    return np.stack([ends - sizes, ends], axis=1)


def visible(text: str) -> str:
    """`text` for display: spaces as "▁", control characters as escapes such as "\\n"."""
    if text.isprintable():
        return text.replace(" ", "▁")
    return "".join(
        "▁" if char == " " else char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def visible_byte(value: int) -> str:
    """One byte for display: the character if it is ASCII, else "<0xE2>"."""
    return visible(chr(value)) if value < 128 else f"<0x{value:02X}>"


def unknown_symbol(text: str, position: int, symbol: str, *, remedy: str) -> UnknownSymbolError:
    """The error for `symbol` at `position` of `text`; names line and column, from 1."""
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    code = f" (U+{ord(symbol):04X})" if len(symbol) == 1 else ""
    return UnknownSymbolError(f"Line {line}, column {column}: {symbol!r}{code} is outside the vocabulary. {remedy}")


def without_surrogates(text: str, policy: UnknownPolicy, unknown_counts: Counter[str] | None) -> str:
    """`text` with every lone surrogate dropped (`skip`), made U+FFFD (`replace`, `byte`) or refused (`error`).

    Raises:
        UnknownSymbolError: under `error`, if there is one.
    """
    try:
        text.encode("utf-8")  # ten times as fast as the search
    except UnicodeEncodeError:
        pass
    else:
        return text
    first = _SURROGATE.search(text)
    assert first is not None, "only surrogates have no UTF-8 bytes"
    if unknown_counts is not None:
        unknown_counts.update(_SURROGATE.findall(text))
    if policy == "error":
        raise unknown_symbol(
            text,
            first.start(),
            first[0],
            remedy="It is a lone surrogate, half of a UTF-16 pair: read the text again with its right encoding, "
            "or set unknown to replace or skip.",
        )
    return _SURROGATE.sub("" if policy == "skip" else REPLACEMENT, text)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer file of any type.

    Raises:
        TokenizerError: the file is missing, damaged, no tokenizer file, or names an unknown type.
        FormatVersionError: the file was written by a newer Inkling.
    """
    restore = "Restore the tokenizer file saved with the run."
    try:
        content = json.loads(path.read_text("utf-8"))
        version, kind = content.pop("format_version"), content.pop("type")
        if not isinstance(version, int) or not isinstance(kind, str):
            raise TypeError("format_version or type")
    except FileNotFoundError:
        raise TokenizerError(f"{path} is missing. {restore}") from None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise TokenizerError(f"{path} is not a tokenizer file, or was cut short. {restore}") from None
    if version > TOKENIZER_FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has tokenizer format {version}, this Inkling reads up to {TOKENIZER_FORMAT_VERSION}. "
            "It was written by a newer Inkling: upgrade this one."
        )
    try:
        cls = TOKENIZERS.resolve(kind)
    except ConfigError as error:
        raise TokenizerError(f"{path}: {error} The file may come from a newer Inkling or from elsewhere.") from None
    try:
        options = validate(cls.Options, {**content.pop("options"), "type": kind}, where="options")
        vocab_size = content.pop("vocab_size")
        tokenizer = cls.from_payload(options, content)
    except KeyError as error:
        raise TokenizerError(f"{path} is damaged: {error} is missing. {restore}") from None
    except (LMError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise TokenizerError(f"{path} is damaged: {error} {restore}") from None
    if tokenizer.vocab_size != vocab_size:
        raise TokenizerError(f"{path} says {vocab_size!r} tokens but holds {tokenizer.vocab_size}. {restore}")
    return tokenizer
