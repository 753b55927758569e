"""Text → counted, hashed, memory-mapped tokens.

Each split is read twice: once to hash and count it, once to encode it. The token files are kept in the cache under a
key made from the text's hash and the tokenizer, so that the second time nothing is encoded:

    tokens/<key>/ meta.json · tokenizer.json · train.bin · valid.bin · test.bin

A .bin file is the start token and then the split's N tokens, raw and little-endian. Folders are built aside and
renamed, so a kill leaves none half made; one whose files have the wrong size is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import Section
from lm.corpora.cache import cache_folder, put_in_place, sync, unwritable, workplace
from lm.corpora.corpus import SPLIT_NAMES, Corpus, Progress, Split, logger, silent
from lm.corpora.text import regroup, utf8
from lm.errors import CorpusError, LMError
from lm.registry import TOKENIZERS
from lm.spelling import Spelling, spelling_nats, white_space
from lm.tokenizers.base import TOKENIZER_FORMAT_VERSION, Ids, Tokenizer, load_tokenizer

TOKENS_FORMAT_VERSION = 1

_NAMED_IN_NOTICE = 8
_MET_KEPT = 200_000


@dataclass(frozen=True)
class Counts:
    """How long a split is, in every unit that perplexity is given in."""

    characters: int
    """Unicode code points."""
    bytes: int
    """Of the UTF-8 text."""
    words: int
    """`len(text.split())`."""
    lines: int
    """Newlines."""
    lm_eval_words: int
    """`len(re.split(r"\\s+", text))`, as the LM evaluation harness counts."""
    tokens: int
    """N: without the start token."""
    unknown_tokens: int
    """How many of the N are the tokenizer's unknown token."""
    crlf_lines: int = 0
    """Newlines behind a carriage return; 0 also where they were not counted yet."""
    spelling_nats: float | None = None
    """Nats of what the tokens do not say about the text (`lm.spelling`): infinite where symbols were left out, None
    where an older Inkling did not measure it."""

    def whole_nats(self, token_nats: float) -> float | None:
        """Nats of the text, from those of its tokens; None where what the tokens do not say is not known."""
        spelled = self.spelling_nats
        return None if spelled is None or math.isinf(spelled) else token_nats + spelled


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split."""

    name: str
    ids: Ids
    """(N+1,) the start token, then the N tokens; memory-mapped where it was prepared."""
    counts: Counts
    sha256: str
    """Of the split's text in UTF-8."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus as tokens, with the tokenizer that made them."""

    name: str
    source: str
    key: str
    """Names it in the cache; see `load_prepared`."""
    splits: Mapping[str, TokenSplit]
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of all splits: of their names and their hashes."""
        return _corpus_sha256({name: split.sha256 for name, split in self.splits.items()})

    @property
    def newline(self) -> str:
        """What most lines of the training split end with: "\\n" or "\\r\\n"."""
        counts = self.splits["train"].counts
        return "\r\n" if 2 * counts.crlf_lines > counts.lines else "\n"


# -- counting ---------------------------------------------------------------------------------------


class Measure:
    """Hash and counts of a UTF-8 text that comes in pieces, cut anywhere between two characters."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._characters = self._bytes = self._words = self._lines = self._crlf_lines = 0
        self._starts_with_space = self._after_return = False
        self._after_space = True

    def update(self, data: bytes) -> None:
        """Take the next piece."""
        if not data:
            return
        codes = np.frombuffer(data, np.uint8)
        space = white_space(codes)
        if not self._bytes:
            self._starts_with_space = bool(space[0])
        self._words += int(np.count_nonzero(space[:-1] > space[1:])) + (self._after_space and not space[0])
        self._after_space = bool(space[-1])
        self._hash.update(data)
        # Bytes 0x80 to 0xBF go on with a character; as signed numbers they are -128 to -65.
        self._characters += int(np.count_nonzero(codes.view(np.int8) > -65))
        self._bytes += len(data)
        self._lines += int(np.count_nonzero(codes == ord("\n")))
        self._crlf_lines += self._after_return and data[0] == ord("\n")
        # Looking for one byte is far faster than for two, and most texts have none.
        self._crlf_lines += data.count(b"\r\n") if b"\r" in data else 0
        self._after_return = data[-1] == ord("\r")

    @property
    def sha256(self) -> str:
        """Of all that came."""
        return self._hash.hexdigest()

    def counts(self, *, tokens: int = 0, unknown_tokens: int = 0, spelling_nats: float | None = None) -> Counts:
        """The counts of all that came."""
        # Splitting at runs of white space gives one more part than there are runs, and a run at an end an empty part.
        ends = (self._starts_with_space + self._after_space) if self._bytes else 1
        return Counts(
            characters=self._characters,
            bytes=self._bytes,
            words=self._words,
            lines=self._lines,
            lm_eval_words=self._words + ends,
            tokens=tokens,
            unknown_tokens=unknown_tokens,
            crlf_lines=self._crlf_lines,
            spelling_nats=spelling_nats,
        )


# -- encoding ---------------------------------------------------------------------------------------


class UnknownSymbolCounter:
    """Symbols met outside the vocabulary, and how often; memory stays bounded."""

    def __init__(self) -> None:
        self.total = 0
        self._counts: Counter[str] = Counter()

    def add(self, met: Counter[str]) -> None:
        """Take what a call of the tokenizer met."""
        self.total += met.total()
        self._counts.update(met)
        if len(self._counts) > _MET_KEPT:
            self._counts = Counter(dict(self._counts.most_common(_MET_KEPT // 2)))

    def most_common(self) -> list[tuple[str, int]]:
        """The most frequent ones, as many as a notice names."""
        return self._counts.most_common(_NAMED_IN_NOTICE)


def _notice(name: str, tokenizer: Tokenizer, total: int, common: Iterable[tuple[str, int]]) -> None:
    if not total:
        return
    done = {
        "replace": "replaced by the unknown token",
        "skip": "left out",
        "byte": "spelled in bytes",
        "error": "refused",
    }[tokenizer.options.unknown]
    listed = ", ".join(f"{symbol!r} ({count:,}×)" for symbol, count in common)
    times = "once" if total == 1 else f"{total:,} times"
    logger.warning("%s: symbols outside the vocabulary were met %s and %s: %s.", name, times, done, listed)


class Encoder:
    """Encodes a split chunk by chunk, counting what it makes."""

    def __init__(self, tokenizer: Tokenizer, met: UnknownSymbolCounter) -> None:
        self._tokenizer = tokenizer
        self._met = met
        self._spelling = Spelling(tokenizer)
        self.tokens = 0
        self.unknown_tokens = 0
        self.characters = 0

    def start(self) -> Ids:
        """What a token file begins with."""
        return np.array([self._tokenizer.start_id], self._tokenizer.dtype)

    def encode(self, chunk: str) -> Ids:
        """The tokens of the next chunk."""
        met: Counter[str] = Counter()
        ids = self._tokenizer.encode(chunk, met=met)
        if met:
            self._met.add(met)
        self._spelling.add(chunk, ids, met)
        self.tokens += len(ids)
        self.characters += len(chunk)
        if self._tokenizer.unknown_id is not None:
            self.unknown_tokens += int(np.count_nonzero(ids == self._tokenizer.unknown_id))
        return ids

    def counts(self, measure: Measure) -> Counts:
        """The counts of all that was encoded, which `measure` read too."""
        return measure.counts(
            tokens=self.tokens, unknown_tokens=self.unknown_tokens, spelling_nats=self._spelling.nats()
        )


def encode_text(name: str, text: str | Iterable[str], tokenizer: Tokenizer) -> TokenSplit:
    """Tokens of a text, in memory, with the notice of unknown symbols that `prepare` gives.

    Args:
        name: what notices call it, and the split's name.
        text: the text, or its pieces in order (such as `split.chunks()`).
        tokenizer: a trained tokenizer.

    Raises:
        CorpusError: the text gives no token.
    """
    measure, met = Measure(), UnknownSymbolCounter()
    encoder = Encoder(tokenizer, met)
    parts = [encoder.start()]
    for chunk in regroup([text] if isinstance(text, str) else text):
        measure.update(utf8(chunk))
        parts.append(encoder.encode(chunk))
    if not encoder.tokens:
        raise CorpusError(f"{name} is empty: there is no token to score.")
    _notice(name, tokenizer, met.total, met.most_common())
    return TokenSplit(name, np.concatenate(parts), encoder.counts(measure), measure.sha256)


def measure_text(text: str, tokenizer: Tokenizer, ids: Ids, met: Mapping[str, int]) -> tuple[Counts, str]:
    """Counts of a text that is encoded already, and its hash: what `encode_text` says of it, without its notice.

    Args:
        text: the text.
        tokenizer: its tokenizer.
        ids: (N,) its tokens.
        met: the symbols outside the vocabulary that `encode` met.

    Raises:
        CorpusError: the text holds half of a surrogate pair.
    """
    measure = Measure()
    measure.update(utf8(text))
    unknown = 0 if tokenizer.unknown_id is None else int(np.count_nonzero(ids == tokenizer.unknown_id))
    nats = spelling_nats(tokenizer, text, ids, met)
    return measure.counts(tokens=len(ids), unknown_tokens=unknown, spelling_nats=nats), measure.sha256


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer | Section,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """Tokens of every split, from the cache where it has them; gives one notice of unknown symbols.

    Args:
        corpus: text with splits.
        tokenizer: a trained tokenizer, or the section of a configuration that says which to train. It is trained on
            the training split alone. Tokens that were prepared in shards bring theirs, whatever the section says.
        cache: in place of `cache_folder()`.
        progress: told of bytes, in the stages "reading", "training the tokenizer" and "encoding".

    Raises:
        CorpusError: the text cannot be read, a split gives no tokens, or the cache cannot be written.
        TokenizerError: the tokenizer cannot be trained, or refuses a symbol.
        ConfigError: the section names no tokenizer, or an option is wrong.
    """
    watch = progress or silent
    if corpus.tokens is not None:
        from lm.corpora.shards import read_shards

        return read_shards(corpus.tokens, tokenizer)
    folder = (cache or cache_folder()) / "tokens"
    measures = _measure(corpus, watch)
    key = _key({name: measure.sha256 for name, measure in measures.items()}, tokenizer)
    found = read_folder(folder / key)
    if found is None or not is_measured(found[0]):
        trained = found[0].tokenizer if found else tokenizer
        try:
            found = _prepare_anew(folder, key, corpus, trained, measures, watch)
        except CorpusError:
            # What an older Inkling prepared still does, where the cache cannot be written.
            if found is None:
                raise
    prepared, met = found
    _notice(corpus.name, prepared.tokenizer, met["total"], met["common"])
    same = _equal_splits(corpus.name, {name: measure.sha256 for name, measure in measures.items()})
    return replace(prepared, name=corpus.name, source=corpus.source, notes=(*corpus.notes, *same))


def _equal_splits(corpus: str, hashes: Mapping[str, str]) -> list[str]:
    """A note for each split that is the same text as one before it; gives a notice too."""
    notes = []
    for number, (name, digest) in enumerate(hashes.items()):
        equal = next((other for other in list(hashes)[:number] if hashes[other] == digest), None)
        if equal is not None:
            notes.append(f"{name} is the same text as {equal}")
            logger.warning(
                "%s: %s is the same text as %s, so its loss says nothing about other text.", corpus, name, equal
            )
    return notes


def _prepare_anew(
    folder: Path,
    key: str,
    corpus: Corpus,
    tokenizer: Tokenizer | Section,
    measures: Mapping[str, Measure],
    progress: Progress,
) -> tuple[PreparedCorpus, dict[str, Any]]:
    trained = tokenizer if isinstance(tokenizer, Tokenizer) else _train(corpus, tokenizer, measures, progress)
    with workplace(folder) as place:
        built = place / key
        try:
            built.mkdir()
            _write(built, corpus, trained, measures, progress)
            put_in_place(built, folder / key, good=_is_good)
        except OSError as error:
            raise unwritable(folder, error) from None
    found = read_folder(folder / key)
    if found is None:
        raise CorpusError(f"{folder / key} changed while it was written: another program is at work in the cache.")
    return found


def is_measured(prepared: PreparedCorpus) -> bool:
    """Whether all is known about its splits; not so where an older Inkling prepared words."""
    return all(split.counts.spelling_nats is not None for split in prepared.splits.values())


def _is_good(folder: Path) -> bool:
    found = read_folder(folder)
    return found is not None and is_measured(found[0])


def load_prepared(key: str, *, cache: Path | None = None) -> PreparedCorpus | None:
    """What `prepare` left in the cache under `key`, without reading the text; None where it is gone or not whole."""
    found = read_folder((cache or cache_folder()) / "tokens" / key)
    return found[0] if found else None


def prepared_key(hashes: Mapping[str, str], tokenizer: Tokenizer) -> str:
    """The key of a text in the cache where it was encoded with a tokenizer that was there already.

    Args:
        hashes: of the splits' texts, in the order train, valid, test.
        tokenizer: the one that encoded it.
    """
    return _key(hashes, tokenizer)


def _measure(corpus: Corpus, progress: Progress) -> dict[str, Measure]:
    measures, done = {}, 0
    total = _total(corpus)
    for name in _order(corpus):
        measures[name] = measure = Measure()
        split = corpus.splits[name]
        for block in split.blocks() if split.blocks else map(utf8, split.chunks()):
            measure.update(block)
            done += len(block)
            progress("reading", min(done, total) if total else done, total)
    return measures


def _order(corpus: Corpus) -> Iterator[str]:
    return (name for name in SPLIT_NAMES if name in corpus.splits)


def _total(corpus: Corpus) -> int:
    sizes = [split.size_bytes for split in corpus.splits.values()]
    return sum(sizes) if all(sizes) else 0


def _corpus_sha256(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in hashes).encode()).hexdigest()


def _key(hashes: Mapping[str, str], tokenizer: Tokenizer | Section) -> str:
    made_by = tokenizer.sha256 if isinstance(tokenizer, Tokenizer) else _options_json(tokenizer)
    versions = f"{TOKENS_FORMAT_VERSION} {TOKENIZER_FORMAT_VERSION}"
    return hashlib.sha256(f"{versions}\n{_corpus_sha256(hashes)}\n{made_by}".encode()).hexdigest()[:32]


def _options_json(section: Section) -> str:
    options = section.resolve("tokenizer").model_dump(mode="json")
    return json.dumps({**options, "type": section.type}, sort_keys=True)


def _train(corpus: Corpus, section: Section, measures: Mapping[str, Measure], progress: Progress) -> Tokenizer:
    total = measures["train"].counts().bytes
    watched = _watched(corpus.splits["train"], total, "training the tokenizer", progress)
    return TOKENIZERS.resolve(section.type).train(watched, section.resolve("tokenizer"))


def _watched(split: Split, total: int, stage: str, progress: Progress) -> Iterator[str]:
    characters = 0
    for chunk in split.chunks():
        yield chunk
        characters += len(chunk)
        progress(stage, min(characters, total), total)


def _write(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, measures: Mapping[str, Measure], progress: Progress
) -> None:
    """Fill the new folder of a prepared corpus, and sync it."""
    met, splits = UnknownSymbolCounter(), {}
    dtype = tokenizer.dtype.newbyteorder("<")
    done, total = 0, sum(measure.counts().bytes for measure in measures.values())
    for name, measure in measures.items():
        encoder = Encoder(tokenizer, met)
        plain = measure.counts()
        bytes_a_character = plain.bytes / max(1, plain.characters)
        with (folder / f"{name}.bin").open("wb") as file:
            file.write(encoder.start().astype(dtype).data)
            for chunk in corpus.splits[name].chunks():
                file.write(np.ascontiguousarray(encoder.encode(chunk), dtype).data)
                progress("encoding", done + int(encoder.characters * bytes_a_character), total)
        if encoder.characters != plain.characters:
            raise CorpusError(f"{corpus.source} changed while it was read: start again.")
        if encoder.tokens < (2 if name == "train" else 1):
            raise CorpusError(
                f"{corpus.name}: the {name} split of {plain.characters:,} characters gives {encoder.tokens} tokens, "
                "too few to learn from or to score. Give a longer text."
            )
        done += plain.bytes
        splits[name] = {"sha256": measure.sha256, "counts": asdict(encoder.counts(measure))}
        sync(folder / f"{name}.bin")
    write_meta(folder, tokenizer, met, splits, name=corpus.name, source=corpus.source, notes=corpus.notes)


def write_meta(
    folder: Path, tokenizer: Tokenizer, met: UnknownSymbolCounter, splits: Mapping[str, Any], **facts: Any
) -> None:
    """Put tokenizer and meta.json beside the token files of a new folder, and sync them."""
    tokenizer.save(folder / "tokenizer.json")
    meta = {
        "format_version": TOKENS_FORMAT_VERSION,
        **facts,
        "tokenizer_sha256": tokenizer.sha256,
        "met": {"total": met.total, "common": met.most_common()},
        "splits": splits,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    sync(folder / "tokenizer.json")
    sync(folder / "meta.json")


def read_folder(folder: Path) -> tuple[PreparedCorpus, dict[str, Any]] | None:
    """A prepared corpus and what was met outside the vocabulary; None where the folder is missing or not whole."""
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
                # An older Inkling left the cost out; here there is none, unless symbols were left out.
                left_out = tokenizer.options.unknown == "skip" and meta["met"]["total"]
                counts = counts if left_out else replace(counts, spelling_nats=0.0)
            path = folder / f"{name}.bin"
            if path.stat().st_size != (counts.tokens + 1) * dtype.itemsize:
                return None
            splits[name] = TokenSplit(name, np.memmap(path, dtype, mode="r"), counts, entry["sha256"])
        prepared = PreparedCorpus(meta["name"], meta["source"], folder.name, splits, tokenizer, tuple(meta["notes"]))
        return prepared, meta["met"]
    # Whatever is wrong with a cached folder, the answer is to make it again.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LMError):
        return None
