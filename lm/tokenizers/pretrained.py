"""The tokenizer of a model from elsewhere: byte-level BPE or SentencePiece, run by the library `tokenizers`.

    tokenizer = PretrainedTokenizer.from_json(Path("tokenizer.json").read_text("utf-8"), config)
    tokenizer.encode("a <|im_end|>")                                  # the characters, no special token
    tokenizer.encode_chat([{"role": "user", "content": "Hello"}])

It is imported with its model, not trained. Text is text: what looks like a special token is encoded as its characters.
Only a chat template writes special tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from lm.config import validate
from lm.errors import ConfigError, TokenizerError, UnsupportedExportError
from lm.tokenizers.base import (
    Ids,
    StreamDecoder,
    Tokenizer,
    TokenizerOptions,
    UnknownPolicy,
    Utf8StreamDecoder,
    unknown_symbol,
    visible,
    without_surrogates,
)
from lm.tokenizers.chat_template import Message, render_chat
from lm.tokenizers.gguf_vocabulary import SPACE, read_vocabulary, words_name
from lm.tokenizers.llama_cpp import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, LlamaCppVocabulary
from lm.tokenizers.pretrained_page import page_parts
from lm.tokenizers.safe_patterns import check_patterns
from lm.tokenizers.tokenizer_json import BYTE_TOKEN, SpecialTokens, TextForm, load_library, read_tokenizer_json

if TYPE_CHECKING:
    import tokenizers as huggingface

REGISTERS = {"pretrained": "PretrainedTokenizer"}


_BLOCK = 1 << 16  # characters that the library encodes in one piece, where no token crosses the cuts
_CUT = re.compile(r"(?<=\S)\n(?=\S)")
_CROSSES_CUT = re.compile(rb"\n[^\s]")
_ESCAPED = re.compile("[\udc80-\udcff]")
_PLACE = "\ue000"  # of a message in a rendered conversation; no tokenizer writes it
_MARK = "\ufdd0"  # a code point that is no character: between the characters of what only looks like a special token


class PretrainedOptions(TokenizerOptions):
    """Options of a pretrained tokenizer."""

    type: Literal["pretrained"] = "pretrained"


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers` with bytes in its vocabulary; ids are the library's own.

    Special tokens decode to nothing, and their pieces are their names. What its normalisation changes (a "▁" in text
    for SentencePiece, text that is not in the normal form NFC) is outside the vocabulary; the policies `replace` and
    `byte` encode what it becomes.
    """

    Options = PretrainedOptions
    type = "pretrained"
    lossless = True

    options: PretrainedOptions

    def __init__(
        self, options: PretrainedOptions, library: dict[str, Any], special: SpecialTokens, chat_template: str | None
    ) -> None:
        """Build from the content of a tokenizer.json.

        Raises:
            ValueError: it is not a tokenizer, is of a kind that is not supported, has a pattern that may take hours, or
                lacks a special token.
        """
        self.options = options
        self.special = special
        self.chat_template = chat_template
        check_patterns(library)
        self._content = library
        self._library = load_library(library)
        # Text is text: no special token is looked for in it.
        self._library.encode_special_tokens = True
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1 + special.unused
        added = self._library.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._added = frozenset(added)
        self._form = TextForm(library)
        self._names = [f"<unused {token}>" for token in range(self.vocab_size)]
        self._table = [b""] * self.vocab_size
        for name, token in vocabulary.items():
            self._names[token] = name
            if token not in added:
                self._table[token] = self._form.bytes_of(name)
            elif name not in self._special:
                self._table[token] = name.encode("utf-8")
        self.lossless = self._form.lossless
        self._cuts = self._form.joins_neighbours and not any(
            _CROSSES_CUT.search(piece) for piece in self._table if b"\n" in piece
        )
        self.start_id, *ends = (self._id(name) for name in (special.start, *special.ends))
        self.end_ids = tuple(ends)
        unknown = library["model"].get("unk_token")
        self._has_all_bytes = self._form.byte_level or all(f"<0x{value:02X}>" in vocabulary for value in range(256))
        self.unknown_id = None if unknown is None or self._form.byte_level else self._id(unknown)
        if self.unknown_id is not None and self.unknown_id in (self.start_id, *self.end_ids):
            self.unknown_id = None

    def _id(self, name: str) -> int:
        token = self._library.token_to_id(name)
        if token is None:
            raise ValueError(f"the vocabulary has no token {name!r}.")
        return int(token)

    @classmethod
    def train(cls, texts: Iterable[str], options: PretrainedOptions) -> Self:
        """Refused.

        Raises:
            TokenizerError: always.
        """
        raise TokenizerError(
            "A pretrained tokenizer is imported with its model (lm import), not trained: set tokenizer.type to byte, "
            "char, subword or word, or train an imported run further with --init RUN."
        )

    @classmethod
    def from_json(
        cls, json_text: str, config: Mapping[str, Any] | None = None, *, vocab_size: int | None = None
    ) -> Self:
        """The tokenizer of a `tokenizer.json`.

        Args:
            json_text: the content of the file.
            config: what the files around it say, merged: bos_token, eos_token, pad_token, unk_token, add_bos_token and
                chat_template of tokenizer_config.json or special_tokens_map.json; eos_token_id of
                generation_config.json, an id or a list.
            vocab_size: tokens of the model, if they are more than those of the tokenizer.

        Raises:
            TokenizerError: it is not a tokenizer, is of a kind that is not supported, or does not fit the model.
        """
        read = read_tokenizer_json(json_text, config or {}, vocab_size=vocab_size)
        try:
            return cls(PretrainedOptions(), read.content, read.special, read.chat_template)
        except ValueError as error:
            raise TokenizerError(f"The tokenizer cannot be imported: {error}") from None

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], *, vocab_size: int | None = None) -> Self:
        """The tokenizer of a GGUF file.

        Args:
            fields: the values of the file by key, such as "tokenizer.ggml.tokens": Python numbers, strings, lists.
            vocab_size: tokens of the model, if they are more than those of the tokenizer.

        Raises:
            TokenizerError: there is no vocabulary, it is of a kind that is not supported, or does not fit the model.
        """
        vocabulary = read_vocabulary(fields)
        return cls.from_json(
            json.dumps(vocabulary.library, ensure_ascii=False), vocabulary.config, vocab_size=vocab_size
        )

    # -- text to ids ------------------------------------------------------------------------------

    def policy(self, unknown: UnknownPolicy | None) -> UnknownPolicy:
        """See `Tokenizer.policy`."""
        chosen = super().policy(unknown)
        if chosen == "byte" and not self._has_all_bytes:
            raise ConfigError(
                "unknown = 'byte': the vocabulary of this pretrained tokenizer holds no bytes. Choose replace, skip or "
                "error."
            )
        return chosen

    def encode(
        self, text: str, *, unknown: UnknownPolicy | None = None, unknown_counts: Counter[str] | None = None
    ) -> Ids:
        """Ids (N,) of `text`, without special tokens; see `Tokenizer.encode`.

        Pieces cut after a newline can give other ids than the whole: words may begin or end with newlines.
        """
        policy = self.policy(unknown)
        text = without_surrogates(text, policy, unknown_counts)
        altered = self._form.altered(text)
        if altered:
            if unknown_counts is not None:
                unknown_counts.update(symbol for _, symbol in altered)
            if policy == "error":
                raise unknown_symbol(
                    text, *altered[0], remedy="The tokenizer changes it: set unknown to replace or skip."
                )
            if policy == "skip":
                text = _without(text, altered)
        ids = self._encoded(text)
        if self.unknown_id is not None and not self._has_all_bytes and (ids == self.unknown_id).any():
            return self._with_unknown(text, policy, unknown_counts)
        return ids

    def _encoded(self, text: str) -> Ids:
        if not text:
            return np.empty(0, dtype=self.dtype)
        if self._form.doubles_first_space and text[0] == " ":
            text = " " + text
        # A batch, so that other threads can run.
        encoded = self._library.encode_batch_fast([*self._blocks(text)], add_special_tokens=False)
        return np.fromiter(itertools.chain.from_iterable(each.ids for each in encoded), dtype=self.dtype)

    def _blocks(self, text: str) -> Iterator[str]:
        """The text in blocks that have the ids of the whole."""
        start = 0
        while self._cuts and len(text) - start > _BLOCK and (cut := _CUT.search(text, start + _BLOCK)):
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:]

    def _with_unknown(self, text: str, policy: UnknownPolicy, unknown_counts: Counter[str] | None) -> Ids:
        """Ids of a text that has symbols without a token."""
        encoding = self._library.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=self.dtype)
        is_unknown = ids == self.unknown_id
        spans = [encoding.offsets[index] for index in np.flatnonzero(is_unknown).tolist()]
        if unknown_counts is not None:
            unknown_counts.update(itertools.chain.from_iterable(text[begin:end] for begin, end in spans))
        if policy == "error":
            begin = spans[0][0]
            raise unknown_symbol(text, begin, text[begin], remedy="Set unknown to replace or skip.")
        return ids[~is_unknown] if policy == "skip" else ids

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """See `Tokenizer.render_chat`: as `apply_chat_template` of transformers, but what users type stays text."""
        if self.chat_template is None:
            raise TokenizerError("The tokenizer of this model has no chat template.")
        return render_chat(
            self.chat_template,
            [self._marked(message) for message in messages],
            tokens=self.special.names,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_rendered(self, text: str) -> Ids:
        """See `Tokenizer.encode_rendered`."""
        text = without_surrogates(text, "replace", None)
        if _MARK not in text:
            encoded = self._with_special.encode_batch_fast([text], add_special_tokens=False)
            return np.array(encoded[0].ids, dtype=self.dtype)
        parts: list[Ids] = [np.empty(0, dtype=self.dtype)]
        for part in self._special_pattern.split(text):
            token = self._special.get(part)
            parts.append(self._encoded(part.replace(_MARK, "")) if token is None else np.array([token], self.dtype))
        return np.concatenate(parts)

    def _marked(self, message: Message) -> Message:
        """The message with a mark inside of what looks like a special token."""
        content = message.get("content")
        if not isinstance(content, str) or not self._special:
            return message
        return {**message, "content": self._special_pattern.sub(lambda match: _MARK.join(match[0]), content)}

    @functools.cached_property
    def _with_special(self) -> huggingface.Tokenizer:
        """The library's tokenizer that finds special tokens in text."""
        return load_library(self._content)

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Finds special tokens, the longest first."""
        return re.compile(f"({'|'.join(map(re.escape, sorted(self._special, key=len, reverse=True)))})")

    # -- ids to text ------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of the ids; special tokens are nothing, and bytes that are not UTF-8 are U+FFFD."""
        text = b"".join([self._table[token] for token in self.checked(ids).tolist()]).decode("utf-8", "replace")
        return text[1:] if self._form.drops_first_space and text.startswith(" ") else text

    def pieces(self, ids: Sequence[int] | Ids) -> list[str]:
        """The text of each token as `Tokenizer.pieces` shows it; special tokens by name."""
        return [self._piece(token) for token in self.checked(ids).tolist()]

    def _piece(self, token: int) -> str:
        text = self._table[token].decode("utf-8", "surrogateescape")
        if not text:
            return visible(self._names[token]) or f"<empty {token}>"
        if _ESCAPED.search(text) is None:
            return visible(text)
        parts = (f"<0x{ord(char) - 0xDC00:02X}>" if _ESCAPED.match(char) else visible(char) for char in text)
        return "".join(parts)

    def stream(self, *, after: Sequence[int] | Ids = ()) -> StreamDecoder:
        """A decoder that gives whole characters."""
        if self._form.drops_first_space and not any(self._table[token] for token in after):
            return _FirstSpaceStream(self, self._table)
        return Utf8StreamDecoder(self, self._table)

    # -- other forms ------------------------------------------------------------------------------

    def to_huggingface(self) -> huggingface.Tokenizer:
        """The library's tokenizer as it was imported: it takes what looks like a special token in text for one."""
        return load_library(self._content)

    def huggingface_config(self) -> dict[str, Any]:
        """See `Tokenizer.huggingface_config`."""
        return {**self.special.names, **super().huggingface_config()}

    def to_page(self) -> dict[str, Any]:
        """See `Tokenizer.to_page`: the steps of the library, and the bytes of each token.

        Raises:
            UnsupportedExportError: the page does not have a step.
        """
        form = self._form
        return {
            **page_parts(self._content, self.vocab_size),
            "bytes": np.frombuffer(b"".join(self._table), np.uint8),
            "sizes": np.array([*map(len, self._table)], np.uint32),
            "labels": {token: self._names[token] for token, text in enumerate(self._table) if not text},
            "doubles_first_space": form.doubles_first_space,
            "drops_first_space": form.drops_first_space,
            "alters_space": form.alters_space,
            "composes": form.composes,
            "has_all_bytes": self._has_all_bytes,
            "chat": self._page_chat(),
        }

    def _page_chat(self) -> dict[str, Any] | None:
        """A conversation of one message: the ids before and after it, and the text around it up to special tokens.

        None: there is no chat template, or it does not put the message between two texts that stay the same.
        """
        if self.chat_template is None:
            return None
        try:
            before, found, after = self.render_chat([{"role": "user", "content": _PLACE}]).partition(_PLACE)
        except TokenizerError:
            return None
        if not found or _PLACE in after:
            return None
        *first, prefix = self._special_pattern.split(before) if self._special else [before]
        suffix, *last = self._special_pattern.split(after) if self._special else [after]
        begin, end = (self.encode_rendered("".join(part)).tolist() for part in (first, last))
        return {"before": begin, "prefix": prefix, "suffix": suffix, "after": end}

    def to_gguf(self) -> LlamaCppVocabulary:
        """See `Tokenizer.to_gguf`: byte-level BPE, or BPE of SentencePiece with a score for each merge.

        Raises:
            UnsupportedExportError: it is of another kind, or cuts text into words in a way without a name there.
        """
        model = self._content["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
        if model.get("type", "BPE") != "BPE" or not (self._form.byte_level or self._has_all_bytes):
            raise UnsupportedExportError("llama.cpp has no counterpart of this pretrained tokenizer: export to hf.")
        start = self._names[self.start_id]
        common: dict[str, Any] = {
            "tokens": self._names,
            "types": [self._type(token) for token in range(self.vocab_size)],
            "end_id": self.end_ids[0] if self.end_ids else self.start_id,
            "unknown_id": self.unknown_id,
            # Without one of their own, texts begin with the token that ends the text before.
            "adds_start": start == self.special.names.get("bos_token") and self.start_id not in self.end_ids,
            "chat_template": self.chat_template,
        }
        if self._form.byte_level:
            split = words_name(self._content.get("pre_tokenizer"), whole_words=bool(model.get("ignore_merges")))
            if split is None:
                raise UnsupportedExportError(
                    "llama.cpp has no name for the way in which this tokenizer cuts text into words: export to hf."
                )
            return LlamaCppVocabulary("gpt2", merges=[" ".join(merge) for merge in merges], split=split, **common)
        # llama.cpp joins the pair whose joined piece has the highest score.
        scores: dict[str, float] = {}
        for rank, (left, right) in enumerate(merges):
            scores.setdefault(left + right, -1.0 - rank)
        return LlamaCppVocabulary(
            "llama", scores=[scores.get(name, 0.0) for name in self._names], adds_space=self._form.drops_first_space,
            notes=(f"The character {SPACE} (U+2581) is read as a space there.",), **common,
        )  # fmt: skip

    def _type(self, token: int) -> int:
        name = self._names[token]
        if token == self.unknown_id:
            return UNKNOWN
        if name in self._special:
            return CONTROL
        if not self._form.byte_level and BYTE_TOKEN.fullmatch(name):
            return BYTE
        if not self._table[token]:
            return UNUSED
        return USER_DEFINED if token in self._added else NORMAL

    def payload(self) -> dict[str, Any]:
        """The special tokens with a role, the chat template ("" if there is none), and the library's own JSON."""
        return {
            "special": self.special.model_dump(),
            "chat_template": self.chat_template or "",
            "library": self._content,
        }

    def to_json(self) -> str:
        """The text of the file, with the library's JSON in one line: an indented one takes seconds to write."""
        content = self._content_of_file()
        library = json.dumps(content.pop("library"), ensure_ascii=False, separators=(",", ":"))
        return f'{json.dumps(content, ensure_ascii=False, indent=1)[:-2]},\n "library": {library}\n}}\n'

    @classmethod
    def from_payload(cls, options: PretrainedOptions, payload: dict[str, Any]) -> Self:
        """The tokenizer that gave `payload`.

        Raises:
            ValueError: a part of it is damaged.
        """
        template, special = payload["chat_template"], validate(SpecialTokens, payload["special"], where="special")
        if not isinstance(template, str) or not isinstance(payload["library"], dict):
            raise ValueError("chat_template or library is of another type.")
        return cls(options, payload["library"], special, template or None)


class _FirstSpaceStream(Utf8StreamDecoder):
    """Drops the space that SentencePiece puts before a text."""

    _begins = True

    def feed(self, token: int) -> str:
        text = super().feed(token)
        if self._begins and text:
            self._begins = False
            return text.removeprefix(" ")
        return text


def _without(text: str, symbols: Iterable[tuple[int, str]]) -> str:
    """The text without some of its parts, each given by its position."""
    parts, begin = [], 0
    for position, symbol in sorted(symbols):
        parts.append(text[begin : max(begin, position)])
        begin = max(begin, position + len(symbol))
    return "".join([*parts, text[begin:]])
