"""A corpus larger than the disk: each shard of its text becomes tokens on its own, and training reads all shards.

    OUT/  tokenizer.json                      learned once, from the beginning of the text
          shard-00000-of-00064/               a token folder (`lm.corpora.token_folder`) with train and valid
          shard-00001-of-00064/ …             any job can make any shard, in any order, once

The text of a shard is never held as a whole: it is read in pieces, encoded and written. Every N-th piece is held out
for validation. `open_corpus("OUT")` opens the shards, memory-mapped, as one sequence of tokens.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.config import CorpusConfig, Section
from lm.corpora.cache import put_in_place, sync, unwritable, workplace
from lm.corpora.corpus import Corpus, Progress, Split, silent
from lm.corpora.encode import Counts, Encoder, Measure, TokenSplit, UnknownSymbolCounter
from lm.corpora.file_list import expand, join, list_files, readable_files
from lm.corpora.hub import PREFIX, stream_hub
from lm.corpora.leaks import Leak, joined_leaks, leak_notes, read_leaks, stored_leaks, warn_of_leaks
from lm.corpora.table_files import ArrowRows, TableText
from lm.corpora.text import Text, regroup, utf8
from lm.corpora.token_folder import PreparedCorpus, build_folder, read_folder, write_meta
from lm.errors import CorpusError
from lm.registry import TOKENIZERS
from lm.tokenizers.base import Ids, Tokenizer, line_blocks, load_tokenizer

TOKENIZER = "tokenizer.json"
PIECE = 1 << 16
"""Characters of a piece, about; whole pieces are held out for validation."""
TOKENS_DECODED_AT_ONCE = 1 << 16
SHARDS_WAY_OUT = "Remove repeated documents from the text, and prepare it again."


class JoinedIds:
    """Tokens of several files as one array: the start token, then the tokens of each; only what is indexed is read."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        # Each file begins with the start token; only that of the first file is used.
        self._parts = [part if number == 0 else part[1:] for number, part in enumerate(parts)]
        self._ends = list(accumulate(len(part) for part in self._parts))
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self[key : key + 1][0]
        begin, end, step = key.indices(len(self))
        if step != 1:
            raise IndexError("tokens are read in order")
        found = []
        number = bisect.bisect_right(self._ends, begin)
        while begin < end:
            first = self._ends[number] - len(self._parts[number])
            piece = self._parts[number][begin - first : end - first]
            found.append(piece)
            begin += len(piece)
            number += 1
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, self.dtype), *found])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self[:], dtype)


# -- preparing ----------------------------------------------------------------------------------------


def learn_tokenizer(config: CorpusConfig, folder: Path, section: Section, *, characters: int) -> Tokenizer:
    """The tokenizer of a folder of shards; trained on the beginning of the text if there is none yet.

    Args:
        config: the text.
        folder: OUT.
        section: the tokenizer's options.
        characters: length of the text to train on.
    """
    if (folder / TOKENIZER).is_file():
        return load_tokenizer(folder / TOKENIZER)
    read, texts = 0, []
    for piece in _pieces(_share(config, 0, 1).chunks()):
        texts.append(piece)
        read += len(piece)
        if read >= characters:
            break
    tokenizer: Tokenizer = TOKENIZERS.resolve(section.type).train(texts, section.resolve("tokenizer"))
    adopt_tokenizer(folder, tokenizer)
    return tokenizer


def adopt_tokenizer(folder: Path, tokenizer: Tokenizer | Path) -> None:
    """Give a folder of shards its tokenizer.

    Raises:
        CorpusError: it has shards of another one.
    """
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    if is_sharded(folder) and shards_tokenizer(folder).sha256 != tokenizer.sha256:
        raise CorpusError(f"{folder} already has shards of another tokenizer: choose another folder.")
    with workplace(folder) as place:
        try:
            tokenizer.save(place / TOKENIZER)
            sync(place / TOKENIZER)
            put_in_place(place / TOKENIZER, folder / TOKENIZER)
        except OSError as error:
            raise unwritable(folder, error) from None


def prepare_shard(
    config: CorpusConfig, folder: Path, number: int, shards: int, *, valid_every: int, progress: Progress | None = None
) -> PreparedCorpus:
    """The tokens of one shard; prepared if they are not there yet.

    Args:
        config: the whole text: local files (a folder, a glob), or a hub data set, which is streamed.
        folder: OUT, with a tokenizer.
        number: of the shard, from 0.
        shards: number of shards.
        valid_every: every `valid_every`-th piece of 64 thousand characters is held out for validation.
        progress: called with bytes.

    Raises:
        CorpusError: there is no such shard, or its text cannot be read.
    """
    if not 0 <= number < shards:
        raise CorpusError(f"Shard {number} of {shards}: shards are numbered from 0 to {shards - 1}.")
    if not (folder / TOKENIZER).is_file():
        raise CorpusError(
            f"{folder} has no {TOKENIZER} yet, and all shards need the same one: learn it first, with lm prepare "
            "SOURCE OUT --tokenizer-only."
        )
    tokenizer = load_tokenizer(folder / TOKENIZER)
    target = folder / f"shard-{number:05}-of-{shards:05}"
    found = read_folder(target)
    if found is None or found[0].tokenizer.sha256 != tokenizer.sha256 or not found[0].is_measured:
        text, watch = _share(config, number, shards), progress or silent

        def fill(built: Path) -> None:
            _write_shard(built, text, tokenizer, valid_every, config.source, watch)

        found = build_folder(target, fill, keep_existing=False)
    leaks, are_new = stored_leaks(target, _decoded_splits(found[0]), progress or silent)
    if are_new:
        warn_of_leaks(target.name, leaks, SHARDS_WAY_OUT)
    return found[0]


def _write_shard(
    built: Path, text: Text, tokenizer: Tokenizer, valid_every: int, source: str, progress: Progress
) -> None:
    unknown = UnknownSymbolCounter()
    parts = {name: (Measure(), Encoder(tokenizer, unknown)) for name in ("train", "valid")}
    dtype = tokenizer.dtype.newbyteorder("<")
    read = 0
    files = {name: (built / f"{name}.bin").open("wb") for name in parts}
    try:
        for name, (_, encoder) in parts.items():
            files[name].write(encoder.start().astype(dtype).data)
        for count, piece in enumerate(_pieces(text.chunks()), start=1):
            name = "valid" if count % valid_every == 0 else "train"
            measure, encoder = parts[name]
            data = utf8(piece)
            measure.update(data)
            files[name].write(np.ascontiguousarray(encoder.encode(piece), dtype).data)
            read += len(data)
            progress("encoding", read, text.size_bytes)
    finally:
        for file in files.values():
            file.close()
    splits = {}
    for name, (measure, encoder) in parts.items():
        sync(built / f"{name}.bin")
        splits[name] = {"sha256": measure.sha256, "counts": asdict(encoder.counts(measure))}
    note = f"one piece in {valid_every} held out for validation"
    write_meta(built, tokenizer, unknown, splits, name=built.name, source=source, notes=[note])


def _share(config: CorpusConfig, number: int, shards: int) -> Text:
    """The text of one shard: its part of the files, or of the rows of tables.

    Raises:
        CorpusError: there is no such text, or it is instruction data.
    """
    text = _part(config, number, shards)
    if text.conversations is not None:
        raise CorpusError(
            f"{text.where} holds conversations, and shards hold text: leave lm prepare out, and give them to lm train."
        )
    return text


def _part(config: CorpusConfig, number: int, shards: int) -> Text:
    source = config.source
    if source.startswith(PREFIX):
        rows = ArrowRows(source, partial(_split, partial(stream_hub, source), number, shards))
        return TableText(source, [rows], config.text_column)
    path = Path(source).expanduser()
    files = expand(list_files(path))
    if not files:
        raise CorpusError(f"{source} names no file: give a folder, a glob or a hub data set (hf:NAME).")
    if len(files) > 1:
        files = readable_files(source, path, files, config)
    if len(files) >= shards:
        own = files[len(files) * number // shards : len(files) * (number + 1) // shards]
        return join(str(own[0].path) if len(own) == 1 else f"{source} (shard {number})", own, config)
    if all(file.table for file in files):
        return join(source, files, config, share=(number, shards))
    raise CorpusError(
        f"{source} has {len(files)} files, fewer than {shards} shards: split the text into more files, or use "
        "fewer shards."
    )


def _split(rows: Any, number: int, shards: int) -> Any:
    """Every `shards`-th row of a streamed data set, or whole files if there are enough of them."""
    distributed = importlib.import_module("datasets.distributed")
    return rows() if shards == 1 else distributed.split_dataset_by_node(rows(), rank=number, world_size=shards)


def _pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of about PIECE characters, cut after a newline if there is one."""
    for chunk in chunks:
        yield from line_blocks(chunk, PIECE)


# -- reading ------------------------------------------------------------------------------------------


def is_sharded(folder: Path) -> bool:
    """Whether the folder holds shards."""
    return (folder / TOKENIZER).is_file() and next(folder.glob("shard-*-of-*"), None) is not None


def shards_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the shards."""
    return load_tokenizer(folder / TOKENIZER)


def open_shards(folder: Path) -> Corpus:
    """A folder of shards as a corpus.

    Raises:
        CorpusError: a shard is missing or damaged.
    """
    prepared = read_shards(folder, shards_tokenizer(folder))
    return Corpus(folder.name, str(folder), _decoded_splits(prepared), prepared.notes, tokens=folder)


def shards_leaks(folder: Path) -> dict[str, Leak]:
    """The leaks of all shards together, each found within its shard; empty if an older Inkling prepared one of them."""
    parts = [read_leaks(path) for path in sorted(folder.glob("shard-*-of-*"))]
    return joined_leaks([part for part in parts if part is not None]) if None not in parts else {}


def _decoded_splits(prepared: PreparedCorpus) -> dict[str, Split]:
    """The splits of a prepared corpus as the text that its tokens give back."""
    return {
        name: Split(name, partial(_decoded, split, prepared.tokenizer), split.counts.bytes)
        for name, split in prepared.splits.items()
    }


def read_shards(folder: Path, tokenizer: Tokenizer | Section) -> PreparedCorpus:
    """The tokens of all shards as one corpus; the training split stays memory-mapped, the validation split is loaded.

    Raises:
        CorpusError: a shard is missing or damaged, or they have another tokenizer.
    """
    own = shards_tokenizer(folder)
    if isinstance(tokenizer, Tokenizer) and tokenizer.sha256 != own.sha256:
        raise CorpusError(
            f"{folder} was prepared with another tokenizer than this run's: prepare the text again with --tokenizer "
            "RUN."
        )
    counts = {path.name.rpartition("-")[2] for path in folder.glob("shard-*-of-*")}
    if len(counts) != 1:
        raise CorpusError(f"{folder} mixes shards of {' and '.join(sorted(counts))}: remove those of one kind.")
    total = int(counts.pop())
    names = [f"shard-{number:05}-of-{total:05}" for number in range(total)]
    read = {name: read_folder(folder / name) for name in names}
    missing = [name for name in names if read[name] is None]
    if missing:
        raise CorpusError(
            f"{folder} lacks {len(missing)} of {total} shards, or they are damaged: {', '.join(missing[:4])}. Make "
            f"them with lm prepare SOURCE OUT --shards {total} --shard N."
        )
    found = [each[0] for each in read.values() if each is not None]
    if any(each.tokenizer.sha256 != own.sha256 for each in found):
        raise CorpusError(f"{folder} holds shards of another tokenizer than its {TOKENIZER}: prepare them again.")
    splits = {}
    for name in ("train", "valid"):
        parts = [each.splits[name] for each in found]
        ids: Any = JoinedIds([part.ids for part in parts])
        joined = Counts(*(_sum([getattr(part.counts, each.name) for part in parts]) for each in fields(Counts)))
        digest = hashlib.sha256("".join(f"{part.sha256}\n" for part in parts).encode()).hexdigest()
        if joined.tokens < 2:
            raise CorpusError(f"{folder} has no text for {name}: prepare it again with another --valid-every.")
        splits[name] = TokenSplit(name, ids if name == "train" else np.asarray(ids), joined, digest)
    key = f"shards-{splits['train'].sha256[:24]}"
    notes = (f"prepared in {total} shards", *found[0].notes, *leak_notes(shards_leaks(folder)))
    return PreparedCorpus(folder.name, str(folder), key, splits, own, notes)


def _sum(values: list[Any]) -> Any:
    """The sum; None if one value is None."""
    return None if None in values else sum(values)


def _decoded(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the tokens, in chunks."""

    def pieces() -> Iterator[str]:
        decoder = tokenizer.stream()
        for begin in range(1, len(split.ids), TOKENS_DECODED_AT_ONCE):
            ids = np.asarray(split.ids[begin : begin + TOKENS_DECODED_AT_ONCE])
            yield "".join(map(decoder.feed, ids.tolist()))
        yield decoder.end()

    return regroup(pieces())
