"""Words as tokens, as in WikiText: white space separates the words.

    tokenizer = WordTokenizer.train(["the cat sat\n"], WordOptions())
    tokenizer.decode(tokenizer.encode("the cat ran\n"))              # "the cat <unk>\n"

`detokenize` gives such text normal spacing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lm.errors import TokenizerError
from lm.tokenizers.base import (
    ByteFreeOptions,
    Ids,
    StreamDecoder,
    Tokenizer,
    UnknownPolicy,
    line_blocks,
    unknown_symbol,
    utf8_sizes,
    visible,
)

if TYPE_CHECKING:
    import tokenizers as huggingface

REGISTERS = {"word": "WordTokenizer"}

EOS = "<eos>"
UNK = "<unk>"
_BLOCK = 1 << 18  # characters processed at a time
_SPACE = re.compile(r"\s")
_WORD_OR_NEWLINE = re.compile(r"\n|\S+")


class WordOptions(ByteFreeOptions):
    """Options of the word tokenizer."""

    type: Literal["word"] = "word"
    min_count: int = Field(1, ge=1, description="Words that occur less often in the training split become <unk>.")
    max_size: int | None = Field(
        None, ge=3, description="Largest vocabulary, <eos> and <unk> included: the most frequent words; default: all."
    )


def _word_blocks(text: str) -> Iterator[str]:
    """`text` in blocks of at least `_BLOCK` characters, each but the last cut after white space."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _BLOCK)
        end = space.end() if space else len(text)
        yield text[start:end]
        start = end


class WordTokenizer(Tokenizer):
    """`<eos>` (id 0, the start token), `<unk>` (id 1), then the words by falling frequency, ties by first appearance.

    Every "\\n" is one `<eos>`; a last line without newline has none. `<eos>` and `<unk>` in the text are these tokens,
    as in WikiText and PTB: an `<unk>` in the text is not an unknown symbol under any policy.
    """

    Options = WordOptions
    type = "word"
    lossless = False

    start_id = 0
    unknown_id = 1

    def __init__(self, options: WordOptions, vocabulary: list[str]) -> None:
        """Build from the words by id, `<eos>` and `<unk>` first."""
        self.options = options
        self.vocabulary = self.words = vocabulary
        self.vocab_size = len(vocabulary)
        self._ids = {word: index for index, word in enumerate(vocabulary)}

    @classmethod
    def train(cls, texts: Iterable[str], options: WordOptions) -> Self:
        """Count the words of the training split; memory grows only with the number of distinct words.

        Raises:
            TokenizerError: the text has no words.
        """
        counts: Counter[str] = Counter()
        rest = ""  # the part of a word at the end of a piece
        for text in texts:
            for block in line_blocks(text, _BLOCK):
                words = (rest + block).split()
                rest = "" if not words or block[-1].isspace() else words.pop()
                counts.update(words)
        counts.update([rest] if rest else [])
        if not counts:
            raise TokenizerError("The training text has no words: give a text.")
        # The sort is stable: words of equal count stay in order of first appearance.
        ranked = sorted(counts.items(), key=lambda item: -item[1])
        words = [w for w, count in ranked if count >= options.min_count and w not in (EOS, UNK) and _is_text(w)]
        return cls(options, [EOS, UNK, *words][: options.max_size])

    def encode(
        self, text: str, *, unknown: UnknownPolicy | None = None, unknown_counts: Counter[str] | None = None
    ) -> Ids:
        """Ids (N,) of the words of `text`; see `Tokenizer.encode`."""
        policy = self.policy(unknown)
        parts = []
        for block in _word_blocks(text):
            words = block.replace("\n", f" {EOS} ").split()
            ids = np.fromiter(map(self._ids.get, words, repeat(-1)), dtype=np.int64, count=len(words))
            is_unknown = ids < 0
            if is_unknown.any():
                if unknown_counts is not None:
                    unknown_counts.update(words[index] for index in np.flatnonzero(is_unknown).tolist())
                if policy == "error":
                    raise self._unknown_word(text)
                if policy == "skip":
                    ids = ids[~is_unknown]
                else:
                    ids[is_unknown] = self.unknown_id
            parts.append(ids.astype(self.dtype))
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The words with single spaces between them; `<eos>` is a newline without spaces around it."""
        words = [self.vocabulary[token] if token else "\n" for token in self.checked(ids).tolist()]
        return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")

    def detokenize(self, text: str) -> str:
        """Decoded text with normal spacing; see the function `detokenize`."""
        return detokenize(text)

    def pieces(self, ids: Sequence[int] | Ids) -> list[str]:
        """The words; `<eos>` as itself."""
        return [visible(self.vocabulary[token]) for token in self.checked(ids).tolist()]

    def byte_spans(self, text: str, ids: Sequence[int] | Ids) -> npt.NDArray[np.int64]:
        """See `Tokenizer.byte_spans`; a token is a word or a newline, without the white space around it."""
        found = [match.span() for match in _WORD_OR_NEWLINE.finditer(text)]
        if len(found) != len(ids):
            raise TokenizerError("The tokens do not cover the text: words were left out, or it is another text.")
        starts = np.append(0, np.cumsum(utf8_sizes(text)))
        spans: npt.NDArray[np.int64] = starts[np.array(found, np.int64).reshape(-1, 2)]
        return spans

    def stream(self, *, after: Sequence[int] | Ids = ()) -> StreamDecoder:
        """A decoder that gives " word" after another word, and "word" at the start of a line."""
        return _WordStreamDecoder(self, at_line_start=len(after) == 0 or int(after[-1]) == self.start_id)

    def to_huggingface(self) -> huggingface.Tokenizer:
        """See `Tokenizer.to_huggingface`: words between white space."""
        import tokenizers as huggingface
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

        converted = huggingface.Tokenizer(models.WordLevel(dict(self._ids), unk_token=UNK))
        converted.normalizer = normalizers.Replace("\n", f" {EOS} ")
        # The white space of str.split(), which is more than that of \\s.
        spaces = "".join(f"\\x{{{code:X}}}" for code in range(0x3001) if chr(code).isspace())
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{spaces}]+"), "removed")
        converted.decoder = decoders.Sequence(
            [
                decoders.Replace(Regex(f"^{EOS}$"), "\n"),
                decoders.Replace(Regex(r"^(?!\n)"), " "),
                decoders.Fuse(),
                decoders.Replace("\n ", "\n"),
                decoders.Strip(" ", 1, 0),
            ]
        )
        return converted

    def to_page(self) -> dict[str, Any]:
        """See `Tokenizer.to_page`."""
        return self.payload()

    def payload(self) -> dict[str, Any]:
        """The words by id."""
        return {"vocabulary": self.vocabulary}

    @classmethod
    def from_payload(cls, options: WordOptions, payload: dict[str, Any]) -> Self:
        """The tokenizer of these words.

        Raises:
            ValueError: they are not distinct words with `<eos>` and `<unk>` first.
        """
        words = payload["vocabulary"]
        if not isinstance(words, list) or words[:2] != [EOS, UNK]:
            raise ValueError(f"the vocabulary is not a list that begins with {EOS} and {UNK}.")
        if not all(isinstance(word, str) and _is_text(word) and word.split() == [word] for word in words):
            raise ValueError("the vocabulary holds something that is not a word.")
        if len(set(words)) < len(words):
            raise ValueError("the vocabulary holds a word twice.")
        return cls(options, words)

    def _unknown_word(self, text: str) -> Exception:
        """The error that names the first unknown word of `text`."""
        found = next(match for match in re.finditer(r"\S+", text) if match[0] not in self._ids)
        return unknown_symbol(
            text, found.start(), found[0], remedy="Set unknown to replace or skip, or train on text that has it."
        )


class _WordStreamDecoder(StreamDecoder):
    """Puts the space before a word, so that it never has to wait for the next token."""

    def __init__(self, tokenizer: WordTokenizer, *, at_line_start: bool) -> None:
        super().__init__(tokenizer)
        self._at_line_start = at_line_start

    def feed(self, token: int) -> str:
        word = super().feed(token)
        text = word if self._at_line_start or word == "\n" else " " + word
        self._at_line_start = word == "\n"
        return text


def _is_text(word: str) -> bool:
    """Whether `word` has no lone surrogates, which UTF-8 cannot express."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# -- normal spacing ---------------------------------------------------------------------------------

_JOINERS = {"@-@": "-", "@,@": ",", "@.@": "."}
_AFTER_WORD = {".", ",", ";", ":", "!", "?", "%", ")", "]", "}", "...", "…", "''", "’", "”", "n't", "n’t"}
_BEFORE_WORD = {"(", "[", "{", "$", "£", "€", "#", "``", "‘", "“"}
_ENDING = re.compile(r"['’](s|m|d|t|ll|re|ve)", re.IGNORECASE)
_PTB_QUOTES = {"``": '"', "''": '"'}


def detokenize(text: str) -> str:
    """WikiText or PTB words with normal spacing, line by line.

        detokenize('He said , " it is @-@ well ( nearly ) 1 @,@ 000 " .')   # He said, "it is-well (nearly) 1,000".

    Straight quotes open and close in turn within a line. A lone apostrophe closes an open single quote; else it is a
    possessive after "s", and opens a quote elsewhere.
    """
    return "\n".join(_detokenize_line(line) for line in text.split("\n"))


def _detokenize_line(line: str) -> str:
    out: list[str] = []
    glue = True  # whether the next word joins the one before it without a space
    opened: set[str] = set()
    for word in line.split():
        before, after = word in _AFTER_WORD or _ENDING.fullmatch(word) is not None, word in _BEFORE_WORD
        if word in _JOINERS:
            before = after = True
        elif word == '"' or word == "'":
            possessive = word == "'" and word not in opened and bool(out) and out[-1].lower().endswith("s")
            before = word in opened or possessive
            after = not before
            if not possessive:
                opened ^= {word}
        out += ["" if glue or before else " ", _JOINERS.get(word) or _PTB_QUOTES.get(word, word)]
        glue = after
    return "".join(out)
