"""Hub data sets: `hf:NAME[/CONFIG]`, downloaded and memory-mapped by the `datasets` library; never remote code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm.corpora.conversations import open_tables
from lm.corpora.corpus import SPLIT_ALIASES, SPLIT_NAMES, Corpus, Progress, SplitAt, check_positional, whole
from lm.corpora.table_files import ArrowRows, datasets_library
from lm.corpora.text import Text
from lm.corpora.units import split_text
from lm.errors import CorpusError

PREFIX = "hf:"


def readings(source: str) -> list[tuple[str, str | None]]:
    """The (name, config) pairs that `hf:...` can mean, likeliest first.

    Three parts are owner, name and configuration. Two parts are owner and name, or name and configuration.
    """
    parts = source.removeprefix(PREFIX).strip("/").split("/")
    match parts:
        case [name] if name:
            return [(name, None)]
        case [first, second] if first and second:
            return [(f"{first}/{second}", None), (first, second)]
        case [owner, name, config] if owner and name and config:
            return [(f"{owner}/{name}", config)]
    raise CorpusError(f"{source!r} is not a hub data set: write hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME/CONFIG.")


def open_hub(
    source: str, *, column: str, fractions: Sequence[float], at: SplitAt = "word", progress: Progress
) -> Corpus:
    """Open a hub data set; if it has only a training split, split it by position.

    Raises:
        CorpusError: no such data set, no network, no training or validation split, no such column.
    """
    data = _load(source)
    name = source.removeprefix(PREFIX).strip("/").replace("/", "-")
    if not hasattr(data, "items"):
        data = {"train": data}
    found = {SPLIT_ALIASES[key]: rows for key, rows in data.items() if key in SPLIT_ALIASES}
    texts = {key: _text(f"{source} ({key})", found[key], column) for key in SPLIT_NAMES if key in found}
    if "train" not in texts or ("valid" not in texts and "test" in texts):
        missing = "training" if "train" not in texts else "validation"
        raise CorpusError(f"{source} has no {missing} split; its splits are {', '.join(map(str, data))}.")
    if len(texts) == 1:
        return split_text(name, source, texts["train"], fractions, at=at, progress=progress)
    check_positional(source, at)
    return Corpus(name, source, {key: whole(key, text) for key, text in texts.items()})


def stream_hub(source: str) -> Any:
    """The training split of a hub data set, streamed from the network without a copy on disk.

    Raises:
        CorpusError: no such data set, no network, no training split.
    """
    return _load(source, split="train", streaming=True)


def _text(where: str, rows: Any, column: str) -> Text:
    return open_tables(where, [ArrowRows(where, lambda: rows)], column)


def _load(source: str, **options: Any) -> Any:
    datasets = datasets_library()
    reasons = []
    for name, config in readings(source):
        try:
            return datasets.load_dataset(name, *([config] if config else []), **options)
        # The library raises many kinds of errors: its own, the network's, the file readers'.
        except Exception as error:
            reasons.append(str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error))
            if isinstance(error, ConnectionError):
                break
    raise CorpusError(f"{source} could not be loaded: {'; '.join(reasons)}.")
