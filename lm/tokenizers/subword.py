"""Pieces of words as tokens, learned by sentencepiece: byte-pair encoding or unigram.

    tokenizer = SubwordTokenizer.train(texts, SubwordOptions(algorithm="bpe", size=8000))
    tokenizer.decode(tokenizer.encode(any_text)) == any_text

The round trip is exact: text is not normalised, and no space is added or dropped. Text without a piece is encoded as
bytes; newline and tab always are, one token each.

Sources: Kudo 2018, "Subword Regularization"; Sennrich et al. 2016, "Neural Machine Translation of Rare Words with
Subword Units"; Kudo and Richardson 2018, "SentencePiece".
"""

from __future__ import annotations

import base64
import heapq
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lm.errors import TokenizerError, UnsupportedExportError
from lm.host import usable_threads
from lm.tokenizers.base import (
    REPLACEMENT,
    Ids,
    StreamDecoder,
    Tokenizer,
    TokenizerOptions,
    UnknownPolicy,
    Utf8StreamDecoder,
    line_blocks,
    spans_of_sizes,
    visible,
    visible_byte,
    without_surrogates,
)
from lm.tokenizers.llama_cpp import BYTE, CONTROL, NORMAL, UNKNOWN, LlamaCppVocabulary

if TYPE_CHECKING:
    import tokenizers as huggingface

REGISTERS = {"subword": "SubwordTokenizer"}

_log = logging.getLogger("lm.tokenizers")

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space inside a piece
_BATCH = 1 << 17  # characters encoded at a time: other threads wait for 10 ms
_SAMPLE_BLOCK = 4096  # characters: unit of the training sample
_LONGEST_SENTENCE = 4096  # characters: longer lines are cut for training; sentencepiece would drop them
# Never part of a piece: sentencepiece drops lines with U+0000 or U+2585, uses tab as a separator and U+2581 as the
# space; lone surrogates are not characters.
_NOT_LEARNED = re.compile("[\n\t\0\u2581\u2585\ud800-\udfff]+")
_IN_NAMES = set("<0x123456789ABCDEF><unk><eos>")
NEVER_CHOSEN = 1e6
"""Below the lowest score of a piece: no segmentation has a token with such a score."""
_LITERAL = [2 + value for value in _SPACE.encode("utf-8")]  # the ids of a U+2581 of the text: its bytes
_FEW_WORDS = re.compile("(?: *[^ ]+){1,4}| +")
_LINE = re.compile("[^\n]*\n|[^\n]+")
_LINE_OR_SPACE = re.compile("\u2581|[^\n\u2581]*\n|[^\n\u2581]+")


class SubwordOptions(TokenizerOptions):
    """Options of the subword tokenizer."""

    type: Literal["subword"] = "subword"
    algorithm: Literal["bpe", "unigram"] = Field(
        "bpe", description="bpe (merges of frequent pairs) or unigram (likeliest segmentation)."
    )
    size: int = Field(
        8000,
        ge=260,
        le=1_000_000,
        description="Tokens in the vocabulary, with 256 bytes, <unk> and <eos>; lowered with a warning if the text has "
        "fewer pieces, raised if it has more characters.",
    )
    character_coverage: float = Field(
        0.9995,
        ge=0.9,
        le=1,
        description="Share of the sample's characters with their own tokens; the rest is encoded as bytes.",
    )
    train_sample_characters: int = Field(
        10_000_000,
        ge=1000,
        description="Characters of the training split, spread evenly over it, from which the pieces are learned.",
    )


class SubwordTokenizer(Tokenizer):
    """A sentencepiece model; ids are its own: `<unk>` 0, `<eos>` 1 (the start token), 256 bytes, then the pieces.

    `encode` gives neither `<unk>`, as bytes can encode everything, nor `<eos>`: "<unk>", "<eos>" or "<0x41>" in the
    text are encoded like any other text.
    """

    Options = SubwordOptions
    type = "subword"
    lossless = True
    whole_lines = True

    options: SubwordOptions
    unknown_id = 0
    start_id = 1

    def __init__(self, options: SubwordOptions, model: bytes) -> None:
        """Build from a serialised sentencepiece model.

        Raises:
            ValueError: the bytes are no sentencepiece model, or one with other options.
        """
        from sentencepiece import SentencePieceProcessor

        self.options = options
        self._model = model
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError("it is not a sentencepiece model.") from None
        self.vocab_size = self._processor.get_piece_size()
        spelled = [self._processor.id_to_piece(token) for token in range(self.vocab_size)]
        if spelled[:3] != ["<unk>", "<eos>", "<0x00>"] or spelled[257:258] != ["<0xFF>"] or _SPACE not in spelled:
            raise ValueError("the model lacks <unk>, <eos>, the bytes or the space in their places.")
        self._spelled = spelled
        self._table = [
            REPLACEMENT.encode(), b"", *(bytes([value]) for value in range(256)),
            *(piece.replace(_SPACE, " ").encode("utf-8") for piece in spelled[258:]),
        ]  # fmt: skip

    @classmethod
    def train(cls, texts: Iterable[str], options: SubwordOptions) -> Self:
        """Learn the pieces from an even sample of the training split; the same text gives the same model.

        A `size` that is too small for the characters of `character_coverage` is raised, with a warning.

        Raises:
            TokenizerError: the text is empty.
        """
        sample = even_sample(texts, options.train_sample_characters)
        if not any(True for _ in _sentences(sample)):
            raise TokenizerError("The training text is empty or blank: give a text.")
        size = options.size
        model = _learn(sample, options, size)
        if isinstance(model, int):
            # Bytes and characters need more: add a quarter of the option for pieces.
            size = model + options.size // 4
            _log.warning(
                "A vocabulary of %d cannot hold the 256 bytes and the characters of this text: %d tokens are used.",
                options.size,
                size,
            )
            model = _learn(sample, options, size)
            assert isinstance(model, bytes), "the characters fit now"
        tokenizer = cls(options, model)
        if tokenizer.vocab_size < size:
            _log.warning(
                "The text has pieces for a vocabulary of %d, not %d: the smaller one is used.",
                tokenizer.vocab_size,
                size,
            )
        return tokenizer

    def encode(
        self, text: str, *, unknown: UnknownPolicy | None = None, unknown_counts: Counter[str] | None = None
    ) -> Ids:
        """Ids (N,) of `text`, line by line on all cores; see `Tokenizer.encode`."""
        text = without_surrogates(text, self.policy(unknown), unknown_counts)
        parts: list[Ids] = []
        for block in line_blocks(text, _BATCH):
            literal = _SPACE in block
            # Line by line: sentencepiece sums scores in 32-bit floats, so the text before a line could change its
            # tokens.
            lines = _LINE_OR_SPACE.findall(block) if literal else _LINE.findall(block)
            encoded: list[list[int]] = self._processor.encode(
                lines, out_type=int, num_threads=min(usable_threads(), len(lines))
            )
            if literal:
                # For sentencepiece, a U+2581 of the text is a space.
                encoded = [_LITERAL if line == _SPACE else ids for line, ids in zip(lines, encoded, strict=True)]
            parts.append(np.fromiter(chain.from_iterable(encoded), dtype=self.dtype))
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of the pieces; `<eos>` is nothing, `<unk>` and bytes that are not UTF-8 are U+FFFD."""
        return b"".join([self._table[token] for token in self.checked(ids).tolist()]).decode("utf-8", "replace")

    def pieces(self, ids: Sequence[int] | Ids) -> list[str]:
        """The pieces, a space inside them as "▁"; bytes as the byte tokenizer shows them."""
        return [
            visible_byte(self._table[token][0]) if 2 <= token < 258 else visible(self._spelled[token])
            for token in self.checked(ids).tolist()
        ]

    def stream(self, *, after: Sequence[int] | Ids = ()) -> StreamDecoder:
        """A decoder that gives out whole characters."""
        return Utf8StreamDecoder(self, self._table)

    def to_huggingface(self) -> huggingface.Tokenizer:
        """See `Tokenizer.to_huggingface`; pieces have spaces instead of U+2581, which thus stays a character."""
        import tokenizers as huggingface
        from tokenizers import Regex, decoders, models, pre_tokenizers

        pieces = [piece if token < 258 else piece.replace(_SPACE, " ") for token, piece in enumerate(self._spelled)]
        scores = [self._processor.get_score(token) for token in range(self.vocab_size)]
        ids = {piece: token for token, piece in enumerate(pieces)}
        model: Any
        if self.options.algorithm == "unigram":
            # Text that looks like a control or a byte token is text.
            never = min(scores) - NEVER_CHOSEN
            entries = [(piece, scores[token] if token >= 258 else never) for token, piece in enumerate(pieces)]
            model = models.Unigram(entries, unk_id=self.unknown_id, byte_fallback=True)
        else:
            model = models.BPE(ids, _merges(ids, scores), unk_token=pieces[self.unknown_id], byte_fallback=True)
        converted = huggingface.Tokenizer(model)
        # A character that no piece has is cut off, so that it never is a part of what looks like a byte token.
        lacking = "".join(f"\\x{{{ord(char):X}}}" for char in sorted(_IN_NAMES - set("".join(pieces[258:]))))
        lines = r"[^\n]*\n|[^\n]+"
        cuts = f"[{lacking}]|[^\n{lacking}]*\n|[^\n{lacking}]+" if lacking else lines
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), "isolated")
        converted.decoder = decoders.Sequence(
            [
                decoders.Replace(Regex("^<eos>$"), ""),
                decoders.Replace(Regex("^<unk>$"), REPLACEMENT),
                decoders.ByteFallback(),
                decoders.Fuse(),
            ]
        )
        return converted

    def to_gguf(self) -> LlamaCppVocabulary:
        """See `Tokenizer.to_gguf`: pieces and scores of sentencepiece.

        Raises:
            UnsupportedExportError: pieces of the algorithm unigram.
        """
        if self.options.algorithm == "unigram":
            raise UnsupportedExportError(
                "llama.cpp cannot read text as bytes with unigram pieces: train with --set tokenizer.algorithm=bpe."
            )
        # No merge makes the name of a special token: a piece has letters or other characters, never both.
        return LlamaCppVocabulary(
            model="llama",
            tokens=self._spelled,
            types=[UNKNOWN, CONTROL, *[BYTE] * 256, *[NORMAL] * (self.vocab_size - 258)],
            end_id=self.start_id,
            scores=[self._processor.get_score(token) for token in range(self.vocab_size)],
            unknown_id=self.unknown_id,
            notes=(f"The character {_SPACE} (U+2581) is read as a space there.",),
        )

    def byte_spans(self, text: str, ids: Sequence[int] | Ids) -> npt.NDArray[np.int64]:
        """See `Tokenizer.byte_spans`; a byte of a character is one span."""
        sizes = np.array([len(piece) for piece in self._table], np.int64)
        return spans_of_sizes(sizes[self.checked(ids)], text)

    def to_page(self) -> dict[str, Any]:
        """See `Tokenizer.to_page`: the pieces from token `first` on, with spaces instead of U+2581, and scores."""
        first = 258
        return {
            "algorithm": self.options.algorithm,
            "first": first,
            "pieces": [piece.replace(_SPACE, " ") for piece in self._spelled[first:]],
            "scores": [self._processor.get_score(token) for token in range(first, self.vocab_size)],
        }

    def payload(self) -> dict[str, Any]:
        """The pieces with their scores by id, for readers; the sentencepiece model in base64."""
        return {"pieces": self._scores(), "model": base64.b64encode(self._model).decode("ascii")}

    @classmethod
    def from_payload(cls, options: SubwordOptions, payload: dict[str, Any]) -> Self:
        """The tokenizer of this model.

        Raises:
            ValueError: the model is damaged, or is not the model of the listed pieces.
        """
        tokenizer = cls(options, base64.b64decode(payload["model"], validate=True))
        if list(payload["pieces"].items()) != list(tokenizer._scores().items()):
            raise ValueError("the pieces listed are not those of the model.")
        return tokenizer

    def _scores(self) -> dict[str, float]:
        return {piece: round(self._processor.get_score(token), 4) for token, piece in enumerate(self._spelled)}


def _merges(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, in the order in which sentencepiece merges: by the score of the piece."""
    found = [
        (-scores[token], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, token in ids.items()
        if token >= 258
        for cut in range(1, len(piece))
        if ids.get(piece[:cut], 0) >= 258 and ids.get(piece[cut:], 0) >= 258
    ]
    return [(left, right) for *_, left, right in sorted(found)]


# -- learning ---------------------------------------------------------------------------------------


def _learn(sample: list[str], options: SubwordOptions, size: int) -> bytes | int:
    """A sentencepiece model of at most `size` pieces; if that is too small, the size that bytes and characters need.

    Raises:
        TokenizerError: sentencepiece refuses the text for another reason.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample),
            model_writer=model,
            model_type=options.algorithm,
            vocab_size=size,
            hard_vocab_limit=False,  # a text with fewer pieces gets fewer
            character_coverage=options.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            # Without its own token, a space would be encoded as bytes that decode to U+2581.
            required_chars=_SPACE,
            unk_id=SubwordTokenizer.unknown_id,
            eos_id=SubwordTokenizer.start_id,
            bos_id=-1,
            pad_id=-1,
            eos_piece="<eos>",
            max_sentence_length=4 * _LONGEST_SENTENCE,  # bytes
            num_threads=8,  # the same on all machines, as sums of floats depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from None
        short = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if short is None:
            raise TokenizerError(f"sentencepiece could not learn from this text: {error}") from None
        return int(short[1])
    return model.getvalue()


# -- the training sample ----------------------------------------------------------------------------


def even_sample(texts: Iterable[str], characters: int) -> list[str]:
    """Blocks of the text, in order, spread evenly over it, of at most `characters` in total.

    One pass over a stream of unknown length, in memory of `characters`. The blocks do not depend on how the text is cut
    into pieces; a text that fits is used as a whole.
    """
    # Multiples of the golden ratio, modulo 1, are spread evenly over every interval of indices; so are the blocks whose
    # value is below a threshold. The heap lowers the threshold as the text grows.
    golden = (5**0.5 - 1) / 2
    heap: list[tuple[float, int, str]] = []
    held = 0
    for index, block in enumerate(_sample_blocks(texts)):
        heapq.heappush(heap, (-(index * golden % 1), index, block))
        held += len(block)
        while held > characters and len(heap) > 1:
            held -= len(heapq.heappop(heap)[2])
    return [block[:characters] for _, _, block in sorted(heap, key=lambda entry: entry[1])]


def _sample_blocks(texts: Iterable[str]) -> Iterator[str]:
    """The text in blocks of one to two `_SAMPLE_BLOCK`, cut after a newline if there is one."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start >= 2 * _SAMPLE_BLOCK:
            stop = start + 2 * _SAMPLE_BLOCK
            cut = rest.find("\n", start + _SAMPLE_BLOCK, stop) + 1 or stop
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _sentences(sample: Iterable[str]) -> Iterator[str]:
    """The training text of sentencepiece: a few words of a line at a time, without characters that it cannot use.

    Neither algorithm crosses words, so the cuts change no count. But the first candidates of unigram are substrings
    with different right neighbours. In text with spaces around all words, such as WikiText, " which" is a candidate
    only because it is sometimes at the end of such a sentence.
    """
    for block in sample:
        for line in _NOT_LEARNED.split(block):
            for words in _FEW_WORDS.findall(line):
                for start in range(0, len(words), _LONGEST_SENTENCE):
                    yield words[start : start + _LONGEST_SENTENCE]
