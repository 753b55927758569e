"""Which text a source means: stdin, a hub data set, a named corpus, a file, a folder or a glob.

A source that is exactly a known name (`tiny-shakespeare`) means that corpus; a file or folder of the same name is
reached by a path that says so (`./tiny-shakespeare`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.config import CorpusConfig
from lm.corpora import named
from lm.corpora.cache import cache_folder, put_in_place, sync, unwritable, workplace
from lm.corpora.corpus import (
    DEFAULT_FRACTIONS,
    SPLIT_NAMES,
    Corpus,
    Progress,
    Split,
    by_position,
    fraction_note,
    silent,
    whole,
)
from lm.corpora.hub import PREFIX, open_hub
from lm.corpora.shards import is_sharded, open_shards
from lm.corpora.tables import FORMATS, table_files, table_suffix
from lm.corpora.text import COMPRESSED, FileText, JoinedText, Text
from lm.errors import CorpusError
from lm.registry import did_you_mean

__all__ = ["Corpus", "Progress", "Split", "open_corpus"]

TEXT_SUFFIXES = (".txt", ".tokens", ".raw", ".text")
_ROLES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
_SHARD = re.compile(r"-\d+-of-\d+$")


def open_corpus(config: CorpusConfig, *, data_dir: Path | None = None, progress: Progress | None = None) -> Corpus:
    """Find the text that `config.source` means and its splits; text without splits is read once to cut it.

    Args:
        config: the source, its text column and split fractions.
        data_dir: where named corpora are looked for first, `data_dir/NAME/FILE`.
        progress: told of bytes read, checked or downloaded.

    Raises:
        CorpusError: there is no such text, or it cannot be used; one sentence that names file and place.
        DownloadError: a named corpus is not here and could not be fetched.
        MissingExtraError: a codec is not installed.
    """
    source, watch = config.source, progress or silent
    if source == "-":
        path = _keep_stdin()
        return _one_file(path, config, watch, name="stdin")
    if source.startswith(PREFIX):
        fractions = config.split_fractions or DEFAULT_FRACTIONS
        return open_hub(source, column=config.text_column, fractions=fractions, progress=watch)
    if source in named.names():
        return named.open_named(source, fractions=config.split_fractions, data_dir=data_dir, progress=watch)
    path = Path(source).expanduser()
    if is_sharded(path):
        return open_shards(path.resolve())
    if path.is_dir():
        return _folder(path.resolve(), config, watch)
    if path.exists():
        return _one_file(path.resolve(), config, watch, name=_stem(path))
    if glob.has_magic(source):
        return _glob(path, config, watch)
    raise _not_found(source, path)


def _not_found(source: str, path: Path) -> CorpusError:
    try:
        neighbours = [str(Path(source).parent / entry.name) for entry in path.parent.iterdir()]
    except OSError:
        neighbours = []
    hint = did_you_mean(source, [*named.names(), *(entry.removeprefix("./") for entry in neighbours)])
    return CorpusError(
        f"There is no file or folder {source!r}, and no corpus of that name.{hint} Named corpora: "
        f"{', '.join(named.names())}."
    )


def _keep_stdin() -> Path:
    """Copy stdin into the cache under its hash, so that it can be read again; the path of the copy."""
    folder = cache_folder() / "stdin"
    digest = hashlib.sha256()
    with workplace(folder) as place:
        try:
            with (place / "stdin").open("wb") as copy:
                while block := sys.stdin.buffer.read(1 << 20):
                    copy.write(block)
                    digest.update(block)
            if not (place / "stdin").stat().st_size:
                raise CorpusError("Standard input is empty: there is no text to read.")
            sync(place / "stdin")
            target = folder / f"{digest.hexdigest()}.txt"
            put_in_place(place / "stdin", target)
        except OSError as error:
            raise unwritable(folder, error) from None
    return target.resolve()


def _one_file(path: Path, config: CorpusConfig, progress: Progress, *, name: str) -> Corpus:
    text = _text(str(path), [path], config)
    return _positioned(name, str(path), text, config, progress)


def _positioned(name: str, source: str, text: Text, config: CorpusConfig, progress: Progress) -> Corpus:
    fractions = config.split_fractions or DEFAULT_FRACTIONS
    splits = by_position(text, fractions, progress=progress)
    return Corpus(name, source, splits, (fraction_note(fractions),))


def _folder(folder: Path, config: CorpusConfig, progress: Progress) -> Corpus:
    here = [path for path in _listing(folder, "*") if _is_text(path) or table_suffix(path)]
    if splits := _split_files(folder, here):
        texts = {name: _text(f"{folder} ({name})", files, config) for name, files in splits.items()}
        return Corpus(_folder_name(folder), str(folder), {name: whole(name, text) for name, text in texts.items()})
    files = [path for path in _listing(folder, "**/*") if _is_text(path)]
    tables = [path for path in _listing(folder, "**/*") if table_suffix(path)]
    if files and tables:
        raise CorpusError(
            f"{folder} holds both text files ({files[0].name}) and tables ({tables[0].name}): "
            f"choose with a glob, such as '{folder.name}/*{files[0].suffix}'."
        )
    if not files and not tables:
        raise CorpusError(
            f"{folder} holds no text: none of its files ends in {', '.join((*TEXT_SUFFIXES, *FORMATS))} "
            "(packed or not). Other files can be named by a glob, such as 'folder/*.md'."
        )
    text = _text(str(folder), files or tables, config)
    return _positioned(_folder_name(folder), str(folder), text, config, progress)


def _glob(pattern: Path, config: CorpusConfig, progress: Progress) -> Corpus:
    found = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))
    files = [path.resolve() for path in found if path.is_file()]
    if not files:
        raise CorpusError(f"No file matches {str(pattern)!r}.")
    # The part of the pattern without wildcards names the corpus.
    fixed = Path(*_until_magic(pattern)).resolve()
    text = _text(str(pattern), files, config)
    return _positioned(_folder_name(fixed), os.path.abspath(pattern), text, config, progress)


def _until_magic(pattern: Path) -> Sequence[str]:
    parts = pattern.parts
    return parts[: next(number for number, part in enumerate(parts) if glob.has_magic(part))]


def _listing(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder in the order of their names; hidden ones are left out."""
    try:
        # iterdir first: glob takes a folder that may not be read for an empty one.
        next(folder.iterdir(), None)
        found = sorted(folder.glob(pattern))
    except OSError as error:
        raise CorpusError(f"{folder} cannot be read: {error.strerror}.") from None
    return [
        path
        for path in found
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _split_files(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of train, valid and test in a folder; empty where it has no training file.

    Raises:
        CorpusError: two files claim one split, or a split that must be there is missing.
    """
    claims: dict[str, list[Path]] = {}
    for path in files:
        stem = _SHARD.sub("", _stem(path)).lower()
        if role := _ROLES.get(re.split(r"[._-]", stem)[-1]):
            claims.setdefault(role, []).append(path)
    plain = [role for role, paths in claims.items() if any(_stem(path).lower() in _ROLES for path in paths)]
    if "train" not in claims:
        # A story called "the-test.txt" is only a story; "test.txt" beside no train.txt is a mistake.
        if plain:
            raise CorpusError(
                f"{folder} has a file for {plain[0]} ({claims[plain[0]][0].name}) but none for training: "
                "name it train.txt."
            )
        return {}
    for role, paths in claims.items():
        shards = len({_SHARD.sub("", _stem(path)) for path in paths}) == 1 and all(
            _SHARD.search(_stem(path)) for path in paths
        )
        if len(paths) > 1 and not shards:
            raise CorpusError(
                f"{folder} has {len(paths)} files for {role}: {', '.join(path.name for path in paths)}. "
                "Keep one, or name the text by a glob."
            )
    if "valid" not in claims:
        raise CorpusError(
            f"{folder} has {claims['train'][0].name} but no validation split: name it valid.txt "
            "(or val, validation, dev), or give the one file to have it split by position."
        )
    return {role: claims[role] for role in SPLIT_NAMES if role in claims}


def _text(where: str, files: Sequence[Path], config: CorpusConfig) -> Text:
    """Some files as one text, in the order given."""
    kinds = {table_suffix(path) for path in files}
    if kinds != {None}:
        if len(kinds) > 1:
            raise CorpusError(f"{where} mixes kinds of files: give files of one kind, by a glob such as '*.txt'.")
        return table_files(where, files, config.text_column)
    if len(files) == 1:
        return FileText(files[0])
    filled = [path for path in files if path.stat().st_size]
    if not filled:
        raise CorpusError(f"{where} is empty: its {len(files)} files hold no text.")
    return JoinedText(where, [FileText(path) for path in filled])


def _is_text(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES


def _stem(path: Path) -> str:
    """The file's name without the suffixes of packing and format: "wiki.train" of wiki.train.tokens.gz."""
    if path.suffix.lower() in COMPRESSED and path.stem:
        path = path.with_suffix("")
    return path.stem


def _folder_name(folder: Path) -> str:
    return folder.name or "text"
