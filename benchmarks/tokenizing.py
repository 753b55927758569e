"""MB/s of each tokenizer and of preparing a corpus, beside sentencepiece's own encoder.

    python -m benchmarks.tokenizing [--corpus FILE_OR_NAME] [--megabytes 20] [--repeat 3]

Figures are the best of the repeats, in millions of UTF-8 bytes a second:

    train      learning the vocabulary from the text
    encode     `Tokenizer.encode`, a 2 MB chunk at a time
    prepare    text → hashed, counted, encoded token files in an empty cache, with the trained tokenizer

The text is repeated or cut to the size asked for. "sentencepiece" is `SentencePieceProcessor.encode` with the subword
tokenizer's own model, over lines, on as many threads.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, save, versions
from lm.config import CorpusConfig, Section
from lm.corpora import Corpus, Split, open_corpus, prepare
from lm.corpora.named import BUILTIN
from lm.corpora.text import MemoryText
from lm.registry import TOKENIZERS
from lm.tokenizers import Tokenizer

SIZED = ("train", "encode", "prepare")


def main() -> None:
    """Measure, print a table, and write the figures under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default=BUILTIN, help="a file or a named corpus (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="where named corpora lie (default: INKLING_DATA)")
    parser.add_argument("--megabytes", type=float, default=20, help="size of the text (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="best of so many (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    options = parser.parse_args()

    corpus = open_corpus(CorpusConfig(source=options.corpus), data_dir=options.data_dir)
    chunks = sized(list(corpus.splits["train"].chunks()), options.megabytes)
    size = sum(len(chunk.encode("utf-8")) for chunk in chunks)
    rows = [measure(name, chunks, size, options.repeat) for name in TOKENIZERS.names()]
    subword = next(row for row in rows if row["tokenizer"] == "subword")
    rows.append(sentencepiece_row(subword.pop("trained"), chunks, size, options.repeat))
    for row in rows:
        row.pop("trained", None)

    record = {
        "options": {"corpus": corpus.name, "bytes": size, "repeat": options.repeat},
        "versions": versions("numpy", "sentencepiece"),
        "unit": "MB/s (1e6 bytes of UTF-8 text)",
        "results": rows,
    }
    show(record)
    print(f"\n{save(f'tokenizing-{corpus.name}', record, options.out)}")


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


def best(action: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Seconds of the fastest run, and what the last one returned."""
    fastest, result = float("inf"), None
    for _ in range(repeat):
        begun = time.perf_counter()
        result = action()
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest, result


def measure(name: str, chunks: Sequence[str], size: int, repeat: int) -> dict[str, Any]:
    """The three figures of one tokenizer, with its default options."""
    section = Section(type=name)
    cls = TOKENIZERS.resolve(name)
    train_seconds, trained = best(lambda: cls.train(iter(chunks), section.resolve("tokenizer")), repeat)
    encode_seconds, tokens = best(lambda: sum(len(trained.encode(chunk)) for chunk in chunks), repeat)
    prepare_seconds, _ = best(lambda: prepare_anew(chunks, size, trained), repeat)
    return {
        "tokenizer": name,
        "vocab_size": trained.vocab_size,
        "tokens": tokens,
        # The bytes are known beforehand.
        "train": None if train_seconds < 1e-3 else size / 1e6 / train_seconds,
        "encode": size / 1e6 / encode_seconds,
        "prepare": size / 1e6 / prepare_seconds,
        "trained": trained,
    }


def prepare_anew(chunks: Sequence[str], size: int, tokenizer: Tokenizer) -> None:
    """Prepare the text as a training split, beside a short validation split, in an empty cache."""

    def split(name: str, parts: Iterable[str], length: int) -> Split:
        held = tuple(parts)
        return Split(name, lambda: iter(held), length)

    short = next(MemoryText("valid", chunks[0][:1000]).chunks())
    corpus = Corpus(
        "benchmark", "benchmark", {"train": split("train", chunks, size), "valid": split("valid", [short], 1000)}
    )
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as cache:
        prepare(corpus, tokenizer, cache=Path(cache))


def sentencepiece_row(tokenizer: Tokenizer, chunks: Sequence[str], size: int, repeat: int) -> dict[str, Any]:
    """sentencepiece itself, with the same model, threads and lines."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(base64.b64decode(tokenizer.payload()["model"]))
    threads = os.cpu_count() or 1

    def encode() -> int:
        return sum(
            len(ids)
            for chunk in chunks
            for ids in processor.encode(chunk.splitlines(keepends=True), out_type=int, num_threads=threads)
        )

    seconds, tokens = best(encode, repeat)
    return {
        "tokenizer": "sentencepiece", "vocab_size": processor.get_piece_size(), "tokens": tokens,
        "train": None, "encode": size / 1e6 / seconds, "prepare": None,
    }  # fmt: skip


def show(record: dict[str, Any]) -> None:
    """The table."""
    options = record["options"]
    table = Table(
        title=f"MB/s on {options['bytes'] / 1e6:.1f} MB of {options['corpus']}", box=None, title_justify="left"
    )
    table.add_column("tokenizer")
    for name in ("vocabulary", "bytes/token", *SIZED):
        table.add_column(name, justify="right")
    for row in record["results"]:
        speeds = (f"{row[name]:,.1f}" if row[name] is not None else "–" for name in SIZED)
        table.add_row(row["tokenizer"], f"{row['vocab_size']:,}", f"{options['bytes'] / row['tokens']:.2f}", *speeds)
    Console().print(table)
    machine_ = machine()
    load = f", load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    print(f"{machine_['cpu']}, {machine_['cores']} cores{load}")


if __name__ == "__main__":
    main()
