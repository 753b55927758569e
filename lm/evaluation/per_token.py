"""One row for each scored token: what the model predicted there, as a Parquet or JSON Lines file.

    with token_file(path, tokenizer) as watcher:
        score(model, ids, watchers=[watcher])

| column | is |
|---|---|
| token | id |
| text | of the token; "" if a later token completes the character. All texts, joined, are the decoded text |
| bytes | UTF-8 bytes of `text` |
| nats | minus the natural logarithm of the token's probability |
| rank | number of tokens that the model ranked before it: 0 is its first choice |
| entropy | of the predicted distribution, in nats: the nats that the model expected |
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.errors import ConfigError
from lm.files import check_place, replacing
from lm.tokenizers.base import Tokenizer

SUFFIXES = ".parquet", ".jsonl"
COLUMNS = "token", "text", "bytes", "nats", "rank", "entropy"
ROWS_AT_ONCE = 1 << 16
"""Rows in memory, and rows of a group of a Parquet file."""


@dataclass(frozen=True)
class Scored:
    """Tokens that were just scored. What costs time is computed when it is asked for."""

    logits: Tensor
    """(N, V) float32."""
    targets: Tensor
    """(N,) int64: the tokens of the text."""
    nats: Tensor
    """(N,) of the targets."""

    @cached_property
    def probabilities(self) -> Tensor:
        """(N, V) float32."""
        return self.logits.softmax(dim=-1)

    @cached_property
    def entropy(self) -> Tensor:
        """(N,) nats of the predicted distributions."""
        entropy: Tensor = torch.special.entr(self.probabilities).sum(dim=-1)
        return entropy

    @cached_property
    def confidence(self) -> Tensor:
        """(N,) the largest probability."""
        return self.probabilities.amax(dim=-1)

    @cached_property
    def rank(self) -> Tensor:
        """(N,) int64: tokens with a greater logit than the target, or with an equal one and a lower id."""
        own = self.logits.gather(1, self.targets[:, None])
        lower = torch.arange(self.logits.shape[1], device=self.logits.device) < self.targets[:, None]
        return ((self.logits > own) | ((self.logits == own) & lower)).sum(dim=1)

    @cached_property
    def hit(self) -> Tensor:
        """(N,) bool: the target is the first choice."""
        return self.rank == 0


Watcher = Callable[[Scored], None]

_Columns = dict[str, list[Any]]


def check_token_file(path: Path) -> None:
    """Check, before long work, that a token file can be written to `path`.

    Raises:
        ConfigError: the suffix is unknown.
        RunError: no file can be written there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: the name of a file of tokens ends with {SUFFIXES[0]} or {SUFFIXES[1]}.")
    check_place(path)


@contextlib.contextmanager
def token_file(path: Path, tokenizer: Tokenizer) -> Iterator[Watcher]:
    """Give a watcher that writes the tokens as they are scored, in the order of the text.

    At the end of the block the file replaces an older one atomically; after an error there is no new file. Memory is
    that of `ROWS_AT_ONCE` rows.

    Args:
        path: its suffix is one of `SUFFIXES`.
        tokenizer: of the tokens.

    Raises:
        RunError: the file cannot be written.
    """
    written = _parquet if path.suffix.lower() == ".parquet" else _json_lines
    with replacing(path) as partial, written(partial) as write:
        rows = _Rows(tokenizer, write)
        yield rows.add
        rows.end()


class _Rows:
    """Collects rows, and writes them in groups."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[_Columns], None]) -> None:
        self._stream = tokenizer.stream()
        self._write = write
        self._columns: _Columns = {name: [] for name in COLUMNS}

    def add(self, scored: Scored) -> None:
        tokens, columns = scored.targets.tolist(), self._columns
        texts = [self._stream.feed(token) for token in tokens]
        columns["token"] += tokens
        columns["text"] += texts
        columns["bytes"] += map(_utf8_bytes, texts)
        for name in ("nats", "rank", "entropy"):
            columns[name] += getattr(scored, name).tolist()
        # The last row stays: the end of the text may add to it.
        if len(columns["token"]) > ROWS_AT_ONCE:
            self._write({name: values[:-1] for name, values in columns.items()})
            self._columns = {name: values[-1:] for name, values in columns.items()}

    def end(self) -> None:
        texts = self._columns["text"]
        texts[-1] += self._stream.end()
        self._columns["bytes"][-1] = _utf8_bytes(texts[-1])
        self._write(self._columns)


def _utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


@contextlib.contextmanager
def _json_lines(path: Path) -> Iterator[Callable[[_Columns], None]]:
    with path.open("w", encoding="utf-8", newline="") as file:

        def write(columns: _Columns) -> None:
            rows = zip(*columns.values(), strict=True)
            file.writelines(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)

        yield write
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Callable[[_Columns], None]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

    kinds = dict(zip(COLUMNS, ("uint32", "string", "uint32", "float64", "uint32", "float32"), strict=True))
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in kinds.items()])
    with path.open("wb") as file:
        with ParquetWriter(file, schema) as writer:
            yield lambda columns: writer.write_table(pyarrow.table(columns, schema=schema))
        file.flush()
        os.fsync(file.fileno())
