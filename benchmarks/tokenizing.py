"""Speed of each tokenizer and of corpus preparation in megabytes per second, with peers.

In millions of UTF-8 bytes a second, over WikiText-2's training text or the built-in corpus, repeated or cut to size:

    encode       `Tokenizer.encode`, chunk by chunk, and sentencepiece's own encoder with the subword tokenizer's
                 model, lines and threads, and the dictionary that one writes by hand over characters or words
    train        learning the vocabulary from the text
    prepare      text → hashed, counted, encoded token files in an empty cache, with the trained tokenizer

Contenders take turns.
"""

from __future__ import annotations

import base64
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import alternate, versions
from benchmarks.suite import WORDS, Record, Settings, Table, say, spread_rows, spreads_text
from lm.config import CorpusConfig, Section
from lm.corpora import Corpus, Split, open_corpus, prepare
from lm.corpora.named import BUILTIN
from lm.corpora.text import MemoryText
from lm.registry import TOKENIZERS
from lm.tokenizers import Tokenizer

MEGABYTES = {False: 8.0, True: 20.0}
"""Of text, without and with --full."""


def run(settings: Settings) -> Record:
    """Train, encode and prepare."""
    corpus = _corpus(settings)
    chunks = sized(list(corpus.splits["train"].chunks()), MEGABYTES[settings.full])
    size = sum(len(chunk.encode("utf-8")) for chunk in chunks)
    record = Record(
        options={**settings.options(), "corpus": corpus.name, "bytes": size},
        versions=versions("numpy", "sentencepiece"),
    )
    trained = {name: _train(name, chunks) for name in TOKENIZERS.names()}
    subword = trained["subword"]
    encoders: dict[str, Callable[[], object]] = {
        **{name: _encode(tokenizer, chunks) for name, tokenizer in trained.items()},
        "sentencepiece itself": sentencepiece(subword, chunks, settings.threads),
        "dictionary over characters": _dictionary(trained["char"], chunks, list),
        "dictionary over words": _dictionary(trained["word"], chunks, _words),
    }
    encoded = {
        name: {"vocabulary": tokenizer.vocab_size, "bytes/token": size / sum(len(tokenizer.encode(c)) for c in chunks)}
        for name, tokenizer in trained.items()
    }
    empty = {"vocabulary": None, "bytes/token": None}
    figures = alternate({name: _rate(action, size) for name, action in encoders.items()}, settings.rounds)
    rows = [{"encode": name, **encoded.get(name, empty), **each} for name, each in figures.items()]
    record.tables.append(Table("Encoding", rows, "MB/s"))
    # The vocabulary of bytes is known beforehand.
    trainers = {name: _rate(partial(_train, name, chunks), size) for name in trained if name != "byte"}
    record.tables.append(
        Table("Learning the vocabulary", spread_rows(alternate(trainers, settings.rounds), column="train"), "MB/s")
    )
    preparers = {
        name: _rate(partial(prepare_anew, chunks, size, tokenizer), size) for name, tokenizer in trained.items()
    }
    record.tables.append(
        Table("Preparing a corpus", spread_rows(alternate(preparers, settings.rounds), column="prepare"), "MB/s")
    )
    say(f"  encode: {spreads_text(figures)} MB/s")
    return record


def _corpus(settings: Settings) -> Corpus:
    """WikiText-2 where it is available, else the built-in corpus; nothing is downloaded for this."""
    data = settings.data_dir or Path(os.environ.get("INKLING_DATA") or "missing")
    name = WORDS if (data / WORDS / "train.txt").is_file() else BUILTIN
    return open_corpus(CorpusConfig(source=name), data_dir=settings.data_dir)


def _rate(action: Callable[[], object], size: int) -> Callable[[], float]:
    """As work for `alternate`: millions of bytes."""

    def work() -> float:
        action()
        return size / 1e6

    return work


def _train(name: str, chunks: Sequence[str]) -> Tokenizer:
    cls: Any = TOKENIZERS.resolve(name)
    trained: Tokenizer = cls.train(iter(chunks), Section(type=name).resolve("tokenizer"))
    return trained


def _encode(tokenizer: Tokenizer, chunks: Sequence[str]) -> Callable[[], object]:
    return lambda: [tokenizer.encode(chunk) for chunk in chunks]


def _words(text: str) -> list[str]:
    return text.replace("\n", " <eos> ").split()


def _dictionary(tokenizer: Tokenizer, chunks: Sequence[str], cut: Callable[[str], list[str]]) -> Callable[[], object]:
    """What one writes by hand."""
    ids = {symbol: index for index, symbol in enumerate(tokenizer.payload()["vocabulary"])}
    return lambda: [np.array([ids[symbol] for symbol in cut(chunk)], dtype=np.int64) for chunk in chunks]


def sized(chunks: list[str], megabytes: float) -> list[str]:
    """The text repeated or cut to about so many million bytes."""
    left = int(megabytes * 1e6)
    taken: list[str] = []
    for chunk in itertools.cycle(chunks):
        length = len(chunk.encode("utf-8"))
        if length >= left:
            return [*taken, chunk[: round(len(chunk) * left / length)]]
        taken.append(chunk)
        left -= length
    raise AssertionError("a corpus has text")


def prepare_anew(chunks: Sequence[str], size: int, tokenizer: Tokenizer) -> None:
    """Prepare the text as a training split with a short validation split, in an empty cache."""

    def split(name: str, parts: Iterable[str], length: int) -> Split:
        held = tuple(parts)
        return Split(name, lambda: iter(held), length)

    short = next(MemoryText("valid", chunks[0][:1000]).chunks())
    corpus = Corpus(
        "benchmark", "benchmark", {"train": split("train", chunks, size), "valid": split("valid", [short], 1000)}
    )
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as cache:
        prepare(corpus, tokenizer, cache=Path(cache))


def sentencepiece(tokenizer: Tokenizer, chunks: Sequence[str], threads: int) -> Callable[[], object]:
    """sentencepiece itself, with the same model and lines."""
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor()
    processor.LoadFromSerializedProto(base64.b64decode(tokenizer.payload()["model"]))
    return lambda: [
        processor.encode(chunk.splitlines(keepends=True), out_type=int, num_threads=threads) for chunk in chunks
    ]
