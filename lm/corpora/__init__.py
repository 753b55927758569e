"""Text from anywhere → splits → memory-mapped tokens → batches.

In reading order: `corpus` (what a corpus is), `text` (text in chunks), `tables`, `reading` (files as one text), `named`
and `hub` (where text comes from), `sources` (which of them a name means), `tokens` (text → token files), `batches`
(token files → training steps).

    corpus = open_corpus(CorpusConfig(source="input.txt"))
    prepared = prepare(corpus, Section(type="char"))
    prepared.splits["train"].ids        # memory-mapped, start token first

The names below are imported when first used, so that `lm.corpora.cache` costs neither numpy nor a tokenizer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.corpora.corpus import Corpus, Progress, Split
    from lm.corpora.prepared import Counts, PreparedCorpus, TokenSplit, encode_text, load_prepared, prepare
    from lm.corpora.sources import open_corpus, open_text

__all__ = [
    "Corpus",
    "Counts",
    "PreparedCorpus",
    "Progress",
    "Split",
    "TokenSplit",
    "encode_text",
    "load_prepared",
    "open_corpus",
    "open_text",
    "prepare",
]

_HOME = {"Corpus": "corpus", "Progress": "corpus", "Split": "corpus", "open_corpus": "sources", "open_text": "sources"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'prepared')}"), name)
