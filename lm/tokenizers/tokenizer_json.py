"""Reads a tokenizer.json of the library `tokenizers`: its special tokens, and what its parts mean for text."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from lm.errors import TokenizerError
from lm.tokenizers.byte import byte_alphabet
from lm.tokenizers.gguf_vocabulary import SPACE

if TYPE_CHECKING:
    import tokenizers as huggingface

END_NAMES = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>",
)  # fmt: skip
"""Special tokens that end a turn or a text in every vocabulary that has them."""
TEXT_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""Those of them that end a text."""

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece spells a byte."""

_WORD = re.compile(r"\S+")


class SpecialTokens(BaseModel):
    """The special tokens with a role, as their texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    start: str
    """Stands before the first token of a text."""
    ends: list[str]
    """Each ends a text or a turn; the first is the model's own."""
    names: dict[str, str]
    """What a chat template calls them, such as "bos_token"."""
    unused: int = 0
    """Ids above those of the tokenizer, which the model has and no text uses."""


class TokenizerJson(NamedTuple):
    """A tokenizer.json that was read, with what the files around it say."""

    content: dict[str, Any]
    """Of the file, without truncation and padding."""
    special: SpecialTokens
    chat_template: str | None


def read_tokenizer_json(json_text: str, config: Mapping[str, Any], *, vocab_size: int | None = None) -> TokenizerJson:
    """Read a `tokenizer.json`; see `PretrainedTokenizer.from_json`.

    Raises:
        TokenizerError: it is not a tokenizer, or does not fit the model.
    """
    try:
        content = {**json.loads(json_text), "truncation": None, "padding": None}
        library = load_library(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TokenizerError(f"It is not a tokenizer.json of the library tokenizers: {error}") from None
    vocabulary = library.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    if vocab_size is not None and size > vocab_size:
        raise TokenizerError(
            f"The tokenizer has {size:,} tokens, the model {vocab_size:,}: they do not belong together."
        )
    unused = 0 if vocab_size is None else vocab_size - size
    special = SpecialTokens(**_roles(library, vocabulary, config), unused=unused)
    return TokenizerJson(content, special, _template(config.get("chat_template")))


def load_library(content: Mapping[str, Any]) -> huggingface.Tokenizer:
    """The library's tokenizer of a tokenizer.json.

    Raises:
        ValueError: the library refuses it.
    """
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:
        # The library raises Exception itself.
        raise ValueError(f"{error}.") from None


class TextForm:
    """What the parts of a tokenizer.json mean for text: how tokens are spelled, and what encoding changes."""

    byte_level = False
    """Whether tokens are spelled in the alphabet of byte-level BPE."""
    drops_first_space = False
    """Whether decoding drops a space at the begin of a text."""
    doubles_first_space = False
    """Whether encoding adds a space to a text only if it begins with none."""
    lossless = True
    """Whether decoding gives back the text, but for the symbols of `altered`."""
    alters_space = False
    """Whether U+2581 stands for a space."""
    composes = False
    """Whether text is brought to the form NFC."""
    joins_neighbours = False
    """Whether a token is made by joining two neighbours, so that no token crosses where none is."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Read a tokenizer.json.

        Raises:
            ValueError: a part is of a kind that is not supported.
        """
        self._replaced: list[tuple[str, str]] = []
        self._from_bytes = {char: value for value, char in enumerate(byte_alphabet())}
        self._read_decoder(content.get("decoder"))
        adds_space = self._read_normalizer(content.get("normalizer"))
        for part in steps_of(content.get("pre_tokenizer"), "pretokenizers"):
            if part["type"] == "Metaspace" and prepend_scheme(part) != "never":
                self.doubles_first_space = adds_space = True
            if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
                self.lossless = False
        if adds_space != self.drops_first_space:
            self.lossless = False
        self.joins_neighbours = content["model"].get("type", "BPE") == "BPE" and not adds_space and self.lossless

    def _read_decoder(self, decoder: Any) -> None:
        fused = False
        for part in steps_of(decoder, "decoders"):
            kind = part["type"]
            if kind == "ByteLevel":
                self.byte_level = True
            elif kind == "Metaspace":
                self._replaced.append((part["replacement"], " "))
                self.alters_space, self.drops_first_space = True, prepend_scheme(part) != "never"
            elif kind == "Replace" and not fused and "String" in part["pattern"]:
                # Regular expressions are not supported: one of a stranger may take hours.
                pattern = part["pattern"]["String"]
                if pattern == SPACE and part["content"] == " ":
                    self.alters_space = True
                self._replaced.append((pattern, part["content"]))
            elif kind == "Strip" and part["content"] == " " and part["start"] <= 1 and part["stop"] == 0:
                self.drops_first_space = part["start"] == 1
            elif kind == "Fuse":
                fused = True
            elif kind != "ByteFallback":
                break
        else:
            if self.byte_level or self._replaced or fused:
                return
        raise ValueError(
            "its tokens become text in a way that is not supported; supported are byte-level BPE and SentencePiece."
        )

    def _read_normalizer(self, normalizer: Any) -> bool:
        """Returns whether it adds a space before each text."""
        adds_space = False
        for part in steps_of(normalizer, "normalizers"):
            kind = part["type"]
            if kind == "NFC":
                self.composes = True
            elif kind == "Prepend" and part["prepend"] == SPACE:
                adds_space = True
            elif not (kind == "Replace" and part["pattern"].get("String") == " " and part["content"] == SPACE):
                self.lossless = False
        return adds_space

    def bytes_of(self, name: str) -> bytes:
        """The bytes of the text of a token."""
        if self.byte_level:
            try:
                return bytes([self._from_bytes[char] for char in name])
            except KeyError:
                return name.encode("utf-8")
        if byte := BYTE_TOKEN.fullmatch(name):
            return bytes([int(byte[1], 16)])
        for pattern, text in self._replaced:
            name = name.replace(pattern, text)
        return name.encode("utf-8")

    def altered(self, text: str) -> list[tuple[int, str]]:
        """What encoding changes in a text: position and symbol."""
        found: list[tuple[int, str]] = []
        if self.alters_space and SPACE in text:
            found += [(match.start(), SPACE) for match in re.finditer(SPACE, text)]
        if self.composes and not unicodedata.is_normalized("NFC", text):
            found += [
                (match.start(), match[0])
                for match in _WORD.finditer(text)
                if not unicodedata.is_normalized("NFC", match[0])
            ]
        return found


def steps_of(part: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json, which may be a sequence.

    Args:
        part: such as the normalizer.
        key: of its steps, if it is a sequence.
    """
    if part is None:
        return
    if part["type"] == "Sequence":
        for each in part[key]:
            yield from steps_of(each, key)
    else:
        yield part


def prepend_scheme(metaspace: Mapping[str, Any]) -> str:
    """Where a step "Metaspace" puts its symbol before a text: "always", "first" or "never"."""
    old = "always" if metaspace.get("add_prefix_space", True) else "never"
    scheme: str = metaspace.get("prepend_scheme", old)
    return scheme


def _roles(library: huggingface.Tokenizer, vocabulary: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens with a role: `start`, `ends` and `names` of `SpecialTokens`.

    A text begins with BOS where the model's own tokenizer puts it; else with the token that ends a text, as texts
    follow each other in training.

    Raises:
        TokenizerError: no token can stand before a text.
    """
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    names = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(role)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str) and value in vocabulary:
            names[role] = value
    ids = config.get("eos_token_id")
    own_ends = [library.id_to_token(token) for token in ([ids] if isinstance(ids, int) else ids or [])]
    candidates = [names.get("eos_token"), *own_ends, *(name for name in END_NAMES if name in special)]
    ends = [*dict.fromkeys(name for name in candidates if name is not None)]
    begun = library.encode("a", add_special_tokens=True).ids
    plain = library.encode("a", add_special_tokens=False).ids
    first = library.id_to_token(begun[0]) if len(begun) > len(plain) and begun[: len(plain)] != plain else None
    starts = [
        first,
        names.get("bos_token") if config.get("add_bos_token") else None,
        *(name for name in TEXT_END_NAMES if name in special),
        *ends,
        names.get("bos_token"),
        *(library.id_to_token(token) for token in library.encode("\n", add_special_tokens=False).ids[-1:]),
    ]
    start = next((name for name in starts if name is not None), None)
    if start is None:
        raise TokenizerError("The tokenizer has no token that can stand before a text: no BOS, end of text or newline.")
    return {"start": start, "ends": ends, "names": names}


def _template(value: Any) -> str | None:
    """The chat template of tokenizer_config.json: a text, or a list of named ones, of which "default" is used."""
    if isinstance(value, list):
        named = (each for each in value if isinstance(each, Mapping) and each.get("name") == "default")
        value = next((each.get("template") for each in named), None)
    return value if isinstance(value, str) and value else None
