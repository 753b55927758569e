"""Text from anywhere → splits → memory-mapped tokens → batches.

In reading order: `corpus` (what a corpus is), `text` (text in chunks), `table_files`, `file_list` (files as one text),
`named` and `hub` (downloads), `encode` and `token_folder` (text → token files), `shards`, `sources` (which text a name
means), `units` and `dedupe` (other splits), `leaks` (what held-out splits repeat), `prepared` (a corpus as tokens, from
the cache), `batches` (tokens → training steps).

    corpus = open_corpus(CorpusConfig(source="input.txt"))
    prepared = prepare(corpus, Section(type="char"))
    prepared.splits["train"].ids        # memory-mapped, start token first

The names below are imported on first use, so that `lm.corpora.cache` loads neither numpy nor a tokenizer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.corpora.corpus import Corpus, Progress, Split
    from lm.corpora.encode import Counts, TokenSplit, encode_text, measure_text
    from lm.corpora.prepared import load_prepared, load_prepared_or_prepare, prepare, prepared_key
    from lm.corpora.sources import open_corpus, open_text
    from lm.corpora.token_folder import PreparedCorpus

_MODULES = {
    "corpus": ("Corpus", "Progress", "Split"),
    "encode": ("Counts", "TokenSplit", "encode_text", "measure_text"),
    "prepared": ("load_prepared", "load_prepared_or_prepare", "prepare", "prepared_key"),
    "sources": ("open_corpus", "open_text"),
    "token_folder": ("PreparedCorpus",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Corpus",
    "Counts",
    "PreparedCorpus",
    "Progress",
    "Split",
    "TokenSplit",
    "encode_text",
    "load_prepared",
    "load_prepared_or_prepare",
    "measure_text",
    "open_corpus",
    "open_text",
    "prepare",
    "prepared_key",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
