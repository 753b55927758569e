"""Named corpora: their URLs, checksums and usual splits.

A corpus is searched in the given data folder, in INKLING_DATA and in the cache, as `NAME/FILE`; if it is in none of
them, it is downloaded. Every file is checked against its published hash.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.corpora.cache import cache_folder
from lm.corpora.corpus import DEFAULT_FRACTIONS, Corpus, Progress, SplitAt, check_positional, logger, whole
from lm.corpora.download import download
from lm.corpora.text import FileText, MemoryText
from lm.corpora.units import split_text
from lm.errors import CorpusError

BUILTIN = "pydoc-topics"
"""The corpus without a download: the text of Python's `pydoc_data.topics`."""


@dataclass(frozen=True)
class PublishedHash:
    """A published hash of a file."""

    algorithm: str
    digest: str
    note: str | None = None
    """For the run's record, if the file has several published forms."""


@dataclass(frozen=True)
class NamedFile:
    """One file of a named corpus."""

    split: str | None
    """train, valid or test; None if the file is split by position."""
    name: str
    """Its name in the data folder and in the cache."""
    known: tuple[PublishedHash, ...]
    other_names: tuple[str, ...] = ()
    """Other accepted names: those of the publication."""


@dataclass(frozen=True)
class NamedCorpus:
    """The URLs, files and hashes of a named corpus."""

    urls: tuple[str, ...]
    """Tried in order. A .zip holds the files, each under one of its names; else it is the one file."""
    archive_sha256: str | None
    files: tuple[NamedFile, ...]
    fractions: tuple[float, ...] = DEFAULT_FRACTIONS
    """The usual split, if there is one file."""


def _wikitext(name: str, archive_sha256: str, known: dict[str, tuple[PublishedHash, ...]]) -> NamedCorpus:
    return NamedCorpus(
        urls=(
            f"https://wikitext.smerity.com/{name}-v1.zip",
            f"https://s3.amazonaws.com/research.metamind.io/wikitext/{name}-v1.zip",
        ),
        archive_sha256=archive_sha256,
        files=tuple(NamedFile(key, f"{key}.txt", known[key], (f"wiki.{key}.tokens",)) for key in known),
    )


# SHA-256 of the archives: as several public readers of WikiText pin them. SHA-1 of the files: as GluonNLP pins them
# (its hashes of WikiText-2: those of the files named by SHA-256 here). See docs/reference/corpora.md.
NAMED: dict[str, NamedCorpus] = {
    "tiny-shakespeare": NamedCorpus(
        urls=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        archive_sha256=None,
        files=(
            NamedFile(
                None,
                "input.txt",
                (PublishedHash("sha256", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),),
            ),
        ),
        fractions=(0.9, 0.1),
    ),
    "wikitext-2": _wikitext(
        "wikitext-2",
        "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        {
            "train": (
                PublishedHash("sha1", "863f29c46ef9d167fff4940ec821195882fe29d1", "train: published order"),
                PublishedHash(
                    "sha256",
                    "728c77e87e176af4730f9a80fc6008bcaff421a7202c1c048877c0eec3685f89",
                    "train: articles reordered",
                ),
            ),
            "valid": (PublishedHash("sha256", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),),
            "test": (PublishedHash("sha256", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),),
        },
    ),
    "wikitext-103": _wikitext(
        "wikitext-103",
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        {
            "train": (PublishedHash("sha1", "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211"),),
            "valid": (PublishedHash("sha1", "c326ac59dc587676d58c422eb8a03e119582f92b"),),
            "test": (PublishedHash("sha1", "8a5befc548865cec54ed4273cf87dbbad60d1e47"),),
        },
    ),
}


def names() -> tuple[str, ...]:
    """All names, the built-in corpus first."""
    return (BUILTIN, *NAMED)


def open_named(
    name: str,
    *,
    fractions: Sequence[float] | None,
    at: SplitAt = "word",
    data_dir: Path | None,
    progress: Progress,
    cache: Path | None = None,
) -> Corpus:
    """Open a corpus by name; `fractions` of None is its usual split, exact to the character.

    Raises:
        CorpusError: a file is not the published one.
        DownloadError: the corpus was not found and could not be downloaded.
    """
    if name == BUILTIN:
        return _builtin(fractions or DEFAULT_FRACTIONS, at, progress)
    corpus = NAMED[name]
    root = cache or cache_folder()
    paths = _find(name, corpus, data_dir, root)
    if paths is None:
        target = root / "corpora" / name
        download(
            name,
            corpus.urls,
            [(file.name, *file.other_names) for file in corpus.files],
            target,
            sha256=corpus.archive_sha256,
            check=lambda number, path: _check(corpus.files[number], path, progress),
            progress=progress,
        )
        paths = [target / file.name for file in corpus.files]
    found = list(zip(corpus.files, paths, strict=True))
    notes = tuple(note for file, path in found if (note := _check(file, path, progress)))
    if corpus.files[0].split is None:
        shares = fractions or corpus.fractions
        if at == "word" and tuple(shares) == corpus.fractions:
            at = "character"
        return split_text(name, name, FileText(paths[0]), shares, at=at, files=1, notes=notes, progress=progress)
    check_positional(name, at)
    splits = {file.split: whole(file.split, FileText(path)) for file, path in found if file.split}
    return Corpus(name, name, splits, notes)


def _builtin(fractions: Sequence[float], at: SplitAt, progress: Progress) -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            f"This Python was built without pydoc_data, the source of {BUILTIN}: give a text file instead."
        ) from None
    text = MemoryText(BUILTIN, "\n".join(topics[name] for name in sorted(topics)))
    notes = (f"from Python {platform.python_version()}",)
    return split_text(BUILTIN, BUILTIN, text, fractions, at=at, notes=notes, progress=progress)


def _find(name: str, corpus: NamedCorpus, data_dir: Path | None, root: Path) -> list[Path] | None:
    """The files in the first folder that has all of them."""
    variable = os.environ.get("INKLING_DATA")
    for folder in (data_dir, Path(variable).expanduser() if variable else None, root / "corpora"):
        if folder is None:
            continue
        paths = []
        for file in corpus.files:
            candidates = (folder / name / each for each in (file.name, *file.other_names))
            paths += [path for path in candidates if path.is_file()][:1]
        if len(paths) == len(corpus.files):
            return paths
        if paths:
            logger.warning("%s has only a part of %s and is passed over.", folder / name, name)
    return None


def _check(file: NamedFile, path: Path, progress: Progress) -> str | None:
    """The note of the published form of a file.

    Raises:
        CorpusError: it is no published form, or cannot be read.
    """
    hashes = {known.algorithm: hashlib.new(known.algorithm, usedforsecurity=False) for known in file.known}
    try:
        done, total = 0, path.stat().st_size
        with path.open("rb") as binary:
            while block := binary.read(1 << 20):
                for each in hashes.values():
                    each.update(block)
                done += len(block)
                progress("checking", done, total)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
    for known in file.known:
        if hashes[known.algorithm].hexdigest() == known.digest:
            return known.note
    found = ", ".join(f"{algorithm} {each.hexdigest()}" for algorithm, each in hashes.items())
    raise CorpusError(
        f"{path} is not the published file: it has {found}. "
        "Restore or remove it, or give its path to train on it as it is."
    )
