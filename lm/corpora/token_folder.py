"""A folder of token files: how a prepared corpus is stored.

    <key>/ meta.json · tokenizer.json · train.bin · valid.bin · test.bin · train.marks · valid.marks · test.marks

A .bin file is the start token and then the split's N tokens, raw and little-endian. A .marks file holds a byte for each
of these tokens, if the split holds conversations: see `lm.corpora.answers`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.corpora.cache import put_in_place, sync, unwritable, workplace
from lm.corpora.encode import Counts, TokenSplit, UnknownSymbolCounter
from lm.errors import CorpusError, LMError
from lm.tokenizers.base import Tokenizer, load_tokenizer

TOKENS_FORMAT_VERSION = 1
MARKS = ".marks"


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus as tokens, with its tokenizer."""

    name: str
    source: str
    key: str
    """Its name in the cache; see `load_prepared`."""
    splits: Mapping[str, TokenSplit]
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the names and the hashes of all splits."""
        return corpus_sha256({name: split.sha256 for name, split in self.splits.items()})

    @property
    def newline(self) -> str:
        """The line end of most lines of the training split: "\\n" or "\\r\\n"."""
        counts = self.splits["train"].counts
        return "\r\n" if 2 * counts.crlf_lines > counts.lines else "\n"

    @property
    def is_measured(self) -> bool:
        """Whether the spelling cost of every split is known; False for words that an older Inkling prepared."""
        return all(split.counts.spelling_nats is not None for split in self.splits.values())


def corpus_sha256(hashes: Mapping[str, str]) -> str:
    """Hash of split names and the hashes of their texts, in this order."""
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in hashes).encode()).hexdigest()


def build_folder(
    target: Path, fill: Callable[[Path], None], *, keep_existing: bool = True
) -> tuple[PreparedCorpus, dict[str, Any]]:
    """Build a token folder in a temporary place, rename it to `target` and read it.

    Args:
        target: the folder to make.
        fill: writes the files into the new folder.
        keep_existing: whether a complete folder that another process put there first stays.

    Raises:
        CorpusError: writing failed, or another program changed the folder.
    """
    with workplace(target.parent) as place:
        built = place / target.name
        try:
            built.mkdir()
            fill(built)
            put_in_place(built, target, good=_is_complete if keep_existing else lambda path: False)
        except OSError as error:
            raise unwritable(target.parent, error) from None
    found = read_folder(target)
    if found is None:
        raise CorpusError(f"{target} changed while it was written: another program writes to this folder.")
    return found


def _is_complete(folder: Path) -> bool:
    found = read_folder(folder)
    return found is not None and found[0].is_measured


def write_meta(
    folder: Path, tokenizer: Tokenizer, unknown: UnknownSymbolCounter, splits: Mapping[str, Any], **facts: Any
) -> None:
    """Write the tokenizer and meta.json into a new folder of token files, and sync them."""
    tokenizer.save(folder / "tokenizer.json")
    meta = {
        "format_version": TOKENS_FORMAT_VERSION,
        **facts,
        "tokenizer_sha256": tokenizer.sha256,
        "met": {"total": unknown.total, "common": unknown.most_common()},
        "splits": splits,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    sync(folder / "tokenizer.json")
    sync(folder / "meta.json")


def read_folder(folder: Path) -> tuple[PreparedCorpus, dict[str, Any]] | None:
    """A prepared corpus and the counts of its unknown symbols; None if the folder is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if meta["format_version"] != TOKENS_FORMAT_VERSION or meta["tokenizer_sha256"] != tokenizer.sha256:
            return None
        dtype = tokenizer.dtype.newbyteorder("<")
        splits = {}
        for name, entry in meta["splits"].items():
            counts = Counts(**entry["counts"])
            if counts.spelling_nats is None and tokenizer.lossless and not counts.unknown_tokens:
                # An older Inkling did not store the cost. Here it is 0, unless symbols were left out.
                left_out = tokenizer.options.unknown == "skip" and meta["met"]["total"]
                counts = counts if left_out else replace(counts, spelling_nats=0.0)
            path = folder / f"{name}.bin"
            if path.stat().st_size != (counts.all_tokens + 1) * dtype.itemsize:
                return None
            ids, marks = np.memmap(path, dtype, mode="r"), None
            if (marked := folder / f"{name}{MARKS}").exists():
                if marked.stat().st_size != len(ids):
                    return None
                marks = np.memmap(marked, np.uint8, mode="r")
            splits[name] = TokenSplit(name, ids, counts, entry["sha256"], marks)
        prepared = PreparedCorpus(meta["name"], meta["source"], folder.name, splits, tokenizer, tuple(meta["notes"]))
        return prepared, meta["met"]
    # A cached folder with any error is made again.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LMError):
        return None
