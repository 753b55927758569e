"""Corpus → counted, hashed, memory-mapped tokens.

Each split is read twice: once to hash and count it, once to encode it. The cache stores the token files
(`lm.corpora.token_folder`) as `tokens/<key>/`, under a key of the text's hash and the tokenizer. So a corpus is
encoded once. A folder is built in a temporary place and renamed: a kill leaves no partial folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import CorpusConfig, Section
from lm.corpora.answers import AnswerEncoder, AnswerMeasure, answer_notes, without_system
from lm.corpora.cache import cache_folder, sync
from lm.corpora.corpus import SPLIT_NAMES, Corpus, Progress, Split, logger, silent
from lm.corpora.encode import Counts, Encoder, Measure, UnknownSymbolCounter, warn_of_unknown
from lm.corpora.leaks import leak_notes, stored_leaks, warn_of_leaks
from lm.corpora.shards import SHARDS_WAY_OUT, read_shards, shards_leaks
from lm.corpora.sources import open_corpus
from lm.corpora.text import utf8
from lm.corpora.token_folder import (
    MARKS,
    TOKENS_FORMAT_VERSION,
    PreparedCorpus,
    build_folder,
    corpus_sha256,
    read_folder,
    write_meta,
)
from lm.errors import CorpusError
from lm.registry import TOKENIZERS
from lm.tokenizers.base import TOKENIZER_FORMAT_VERSION, Tokenizer


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer | Section,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """Tokens of every split, from the cache if it has them; warns of unknown symbols, and once of leaks.

    Args:
        corpus: text with splits.
        tokenizer: a trained tokenizer, or the configuration section of the tokenizer to train. It is trained on the
            training split alone. Tokens that were prepared in shards have their own tokenizer, which is used instead.
        cache: instead of `cache_folder()`.
        progress: called with bytes, in the stages "reading", "training the tokenizer", "encoding" and "comparing the
            splits".

    Raises:
        CorpusError: the text cannot be read, a split gives no tokens, or the cache cannot be written.
        TokenizerError: the tokenizer cannot be trained, or refuses a symbol.
        ConfigError: the section names no tokenizer, or an option is wrong.
    """
    progress = progress or silent
    if corpus.tokens is not None:
        shards = read_shards(corpus.tokens, tokenizer)
        warn_of_leaks(corpus.name, shards_leaks(corpus.tokens), SHARDS_WAY_OUT)
        return shards
    folder = (cache or cache_folder()) / "tokens"
    measures = _measure(corpus, progress)
    hashes = {name: measure.sha256 for name, measure in measures.items()}
    key = prepared_key(hashes, tokenizer)
    found = read_folder(folder / key)
    if found is None or not found[0].is_measured:
        given = found[0].tokenizer if found else tokenizer
        trained = given if isinstance(given, Tokenizer) else _train(corpus, given, measures, progress)
        try:
            found = build_folder(folder / key, lambda built: _write(built, corpus, trained, measures, progress))
        except CorpusError:
            # If the cache cannot be written, the tokens of an older Inkling are still valid.
            if found is None:
                raise
    prepared, unknown = found
    warn_of_unknown(corpus.name, prepared.tokenizer, unknown["total"], unknown["common"])
    equal = _equal_splits(corpus.name, hashes)
    compared = {name: without_system(split) for name, split in corpus.splits.items()}
    leaks, are_new = stored_leaks(folder / key, compared, progress)
    # The warning of a split that is another one is enough.
    leaks = {name: leak for name, leak in leaks.items() if name not in equal}
    # The notes keep them; the same warning at each use of a text would hide others.
    if are_new:
        warn_of_leaks(corpus.name, leaks)
    notes = (*corpus.notes, *equal.values(), *leak_notes(leaks), *answer_notes(prepared.splits["train"]))
    return replace(prepared, name=corpus.name, source=corpus.source, notes=notes)


def load_prepared(key: str, *, cache: Path | None = None) -> PreparedCorpus | None:
    """The corpus that `prepare` stored in the cache under `key`, without reading the text; None if there is none."""
    found = read_folder((cache or cache_folder()) / "tokens" / key)
    return found[0] if found else None


def load_prepared_or_prepare(
    keys: Iterable[str],
    tokenizer_sha256: str,
    *,
    corpus: CorpusConfig | None = None,
    tokenizer: Tokenizer | Section | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> PreparedCorpus | None:
    """The same corpus from the cache; else it is prepared again.

    Args:
        keys: in the cache, tried in order.
        tokenizer_sha256: of the tokenizer that must have encoded it; an entry of another tokenizer does not count.
        corpus: the text to prepare if the cache has none of the keys. None: do not prepare, return None.
        tokenizer: for `prepare`.
        data_dir: folder of the named corpora.
        progress: called while the text is read.

    Raises:
        CorpusError: as `open_corpus` and `prepare`.
    """
    for key in keys:
        found = load_prepared(key)
        if found is not None and found.tokenizer.sha256 == tokenizer_sha256:
            return found
    if corpus is None:
        return None
    assert tokenizer is not None, "needed to prepare the corpus"
    return prepare(open_corpus(corpus, data_dir=data_dir, progress=progress), tokenizer, progress=progress)


def prepared_key(hashes: Mapping[str, str], tokenizer: Tokenizer | Section) -> str:
    """The cache key of a text and a tokenizer.

    Args:
        hashes: of the splits' texts, in the order train, valid, test.
        tokenizer: the trained tokenizer that encodes it, or the section of the one to train.
    """
    if isinstance(tokenizer, Tokenizer):
        made_by = tokenizer.sha256
    else:
        options = tokenizer.resolve("tokenizer").model_dump(mode="json")
        made_by = json.dumps({**options, "type": tokenizer.type}, sort_keys=True)
    versions = f"{TOKENS_FORMAT_VERSION} {TOKENIZER_FORMAT_VERSION}"
    return hashlib.sha256(f"{versions}\n{corpus_sha256(hashes)}\n{made_by}".encode()).hexdigest()[:32]


def _equal_splits(corpus: str, hashes: Mapping[str, str]) -> dict[str, str]:
    """A note for each split with the same text as an earlier one; logs a warning too."""
    notes = {}
    for number, (name, digest) in enumerate(hashes.items()):
        equal = next((other for other in list(hashes)[:number] if hashes[other] == digest), None)
        if equal is not None:
            notes[name] = f"{name} is the same text as {equal}"
            logger.warning(
                "%s: %s is the same text as %s, so its loss says nothing about other text.", corpus, name, equal
            )
    return notes


def _measure(corpus: Corpus, progress: Progress) -> dict[str, Measure | AnswerMeasure]:
    measures: dict[str, Measure | AnswerMeasure] = {}
    sizes = [split.size_bytes for split in corpus.splits.values()]
    done, total = 0, sum(sizes) if all(sizes) else 0
    for name in SPLIT_NAMES:
        if name not in corpus.splits:
            continue
        split = corpus.splits[name]
        if split.conversations is not None:
            measures[name] = answers = AnswerMeasure()
            for conversation in split.conversations():
                answers.update(conversation)
            done += split.size_bytes
            progress("reading", min(done, total) if total else done, total)
            continue
        measures[name] = measure = Measure()
        for block in split.blocks() if split.blocks else map(utf8, split.chunks()):
            measure.update(block)
            done += len(block)
            progress("reading", min(done, total) if total else done, total)
    return measures


def _train(
    corpus: Corpus, section: Section, measures: Mapping[str, Measure | AnswerMeasure], progress: Progress
) -> Tokenizer:
    chunks = _with_progress(corpus.splits["train"], measures["train"].counts().bytes, progress)
    return TOKENIZERS.resolve(section.type).train(chunks, section.resolve("tokenizer"))


def _with_progress(split: Split, total: int, progress: Progress) -> Iterator[str]:
    characters = 0
    for chunk in split.chunks():
        yield chunk
        characters += len(chunk)
        progress("training the tokenizer", min(characters, total), total)


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    measures: Mapping[str, Measure | AnswerMeasure],
    progress: Progress,
) -> None:
    """Write the files of a prepared corpus into a new folder, and sync them."""
    unknown = UnknownSymbolCounter()
    splits: dict[str, Any] = {}
    dtype = tokenizer.dtype.newbyteorder("<")
    done, total = 0, sum(measure.counts().bytes for measure in measures.values())
    for name, measure in measures.items():
        if isinstance(measure, AnswerMeasure):
            counts = _write_conversations(folder, corpus.splits[name], tokenizer, unknown, measure)
            splits[name] = {"sha256": measure.sha256, "counts": asdict(counts)}
            done += counts.bytes
            progress("encoding", done, total)
            continue
        encoder = Encoder(tokenizer, unknown)
        counts = measure.counts()
        bytes_per_character = counts.bytes / max(1, counts.characters)
        with (folder / f"{name}.bin").open("wb") as file:
            file.write(encoder.start().astype(dtype).data)
            for chunk in corpus.splits[name].chunks():
                file.write(np.ascontiguousarray(encoder.encode(chunk), dtype).data)
                progress("encoding", done + int(encoder.characters * bytes_per_character), total)
        if encoder.characters != counts.characters:
            raise CorpusError(f"{corpus.source} changed while it was read: start again.")
        if encoder.tokens < (2 if name == "train" else 1):
            raise CorpusError(
                f"{corpus.name}: the {name} split of {counts.characters:,} characters gives {encoder.tokens} tokens, "
                "too few to learn from or to score. Give a longer text."
            )
        done += counts.bytes
        splits[name] = {"sha256": measure.sha256, "counts": asdict(encoder.counts(measure))}
        sync(folder / f"{name}.bin")
    write_meta(folder, tokenizer, unknown, splits, name=corpus.name, source=corpus.source, notes=corpus.notes)


def _write_conversations(
    folder: Path, split: Split, tokenizer: Tokenizer, unknown: UnknownSymbolCounter, measure: AnswerMeasure
) -> Counts:
    """Write the tokens of a split of conversations and their marks; returns the counts of its answers."""
    encoder, dtype, again = AnswerEncoder(tokenizer, unknown), tokenizer.dtype.newbyteorder("<"), AnswerMeasure()
    paths = [folder / f"{split.name}.bin", folder / f"{split.name}{MARKS}"]
    assert split.conversations is not None
    with paths[0].open("wb") as tokens, paths[1].open("wb") as marked:
        for conversation in split.conversations():
            again.update(conversation)
            ids, marks = encoder.encode(conversation)
            tokens.write(np.ascontiguousarray(ids, dtype).data)
            marked.write(marks.data)
    if again.sha256 != measure.sha256:
        raise CorpusError(f"{split.name}: the conversations changed while they were read: start again.")
    for path in paths:
        sync(path)
    return encoder.counts(measure)
