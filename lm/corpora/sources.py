"""Source → text: standard input, a hub data set, a named corpus, a file, a folder or a glob.

A source that is the name of a corpus (`tiny-shakespeare`) means that corpus; for a file or folder of the same name,
write a path (`./tiny-shakespeare`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from lm.config import CorpusConfig, validate
from lm.corpora import named
from lm.corpora.cache import cache_folder, put_in_place, sync, unwritable, workplace
from lm.corpora.corpus import (
    DEFAULT_FRACTIONS,
    SPLIT_ALIASES,
    SPLIT_NAMES,
    Corpus,
    Progress,
    SplitAt,
    check_positional,
    logger,
    silent,
    size_note,
    whole,
)
from lm.corpora.dedupe import dedupe
from lm.corpora.file_list import expand, file_text, join, list_files, readable_files, warn_of_skipped
from lm.corpora.hub import PREFIX, open_hub
from lm.corpora.shards import is_sharded, open_shards
from lm.corpora.table_files import table_suffix
from lm.corpora.text import COMPRESSED, EMPTY, STDIN, MemoryText, Text, decode_file
from lm.corpora.units import split_text
from lm.errors import CorpusError
from lm.registry import did_you_mean

WAIT_SECONDS = 2.0
"""Time without input from standard input or a pipe until a warning says so."""
TEXT_SUFFIXES = (".txt", ".tokens", ".raw", ".text")
_SHARD = re.compile(r"-\d+-of-\d+$")


def open_corpus(config: CorpusConfig, *, data_dir: Path | None = None, progress: Progress | None = None) -> Corpus:
    """Open the text of `config.source` and its splits; text without splits is read once to split it.

    Args:
        config: the source, its text column and split fractions.
        data_dir: first folder to search for named corpora, `data_dir/NAME/FILE`.
        progress: called with bytes read, checked or downloaded.

    Raises:
        CorpusError: there is no such text, or it cannot be used; names file and line.
        DownloadError: a named corpus could not be downloaded.
        MissingExtraError: a codec is not installed.
    """
    if not config.source:
        raise CorpusError("There is no text: an imported run has no corpus, so give one.")
    corpus = _open(config, data_dir, progress or silent)
    if not config.dedupe:
        return corpus
    if corpus.splits["train"].conversations is not None:
        raise CorpusError(
            f"{config.source} holds conversations, of which equal ones are always in one split, and --dedupe is for "
            "text: leave it out."
        )
    if corpus.tokens is not None:
        raise CorpusError(f"{config.source} was prepared in shards, and --dedupe is for text: leave it out.")
    return dedupe(corpus, progress or silent)


def _open(config: CorpusConfig, data_dir: Path | None, watch: Progress) -> Corpus:
    source, at = config.source, _split_at(config)
    if source.startswith(PREFIX):
        fractions = config.split_fractions or DEFAULT_FRACTIONS
        return open_hub(source, column=config.text_column, fractions=fractions, at=at, progress=watch)
    if source in named.names():
        return named.open_named(source, fractions=config.split_fractions, at=at, data_dir=data_dir, progress=watch)
    path = Path(source).expanduser()
    if is_sharded(path):
        check_positional(source, at)
        return open_shards(path.resolve())
    if _is_stream(source):
        return _one_file(
            _keep(source), config, watch, name="stdin" if source == "-" else "pipe", where=_name_of(source)
        )
    if path.is_dir():
        return _folder(path.resolve(), config, watch)
    if path.exists():
        return _one_file(path.resolve(), config, watch, name=_stem(path))
    if glob.has_magic(source):
        return _glob(path, config, watch)
    raise _not_found(source, path)


def open_text(source: str, *, text_column: str = "text", encoding: str | None = None, where: str | None = None) -> Text:
    """The whole text of a file, a table, standard input or a pipe, as `open_corpus` reads it.

    Args:
        source: a path, or "-" for standard input.
        text_column: the column of a table that holds the text.
        encoding: of a file without a byte-order mark; None is UTF-8.
        where: name of the text in errors; None is the source.

    Raises:
        ConfigError: no such encoding.
        CorpusError: there is no such file, or it cannot be read; some errors come later, while it is read.
    """
    given = {"source": source, "text_column": text_column, "encoding": encoding}
    config = validate(CorpusConfig, given, where="corpus")
    if _is_stream(source):
        name = where or _name_of(source)
        return MemoryText(name, decode_file(b"".join(_stream(source)), name, config.encoding))
    path = Path(source).expanduser()
    if path.is_dir():
        raise CorpusError(f"{where or source} is a folder: give a file.")
    if not path.exists():
        raise _not_found(source, path, [])
    return file_text(path, config, where or str(path))[0]


def _not_found(source: str, path: Path, names: Sequence[str] = named.names()) -> CorpusError:
    if path.is_symlink():
        return CorpusError(f"{source} is a link to {os.readlink(path)}, which does not exist.")
    try:
        neighbours = [str(Path(source).parent / entry.name) for entry in path.parent.iterdir()]
    except OSError:
        neighbours = []
    hint = did_you_mean(source, [*names, *(entry.removeprefix("./") for entry in neighbours)])
    if not names:
        return CorpusError(f"There is no file {source!r}.{hint}")
    return CorpusError(
        f"There is no file or folder {source!r}, and no corpus of that name.{hint} Named corpora: {', '.join(names)}."
    )


# -- standard input and pipes, which can be read only once -----------------------------------------------------


def _name_of(source: str) -> str:
    return STDIN if source == "-" else source


def _is_stream(source: str) -> bool:
    """Whether a source can be read only once: standard input, a named pipe, or a shell's <(…)."""
    if source == "-":
        return True
    try:
        mode = os.stat(Path(source).expanduser()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def _stream(source: str) -> Iterator[bytes]:
    """The bytes of a stream in blocks; a warning after WAIT_SECONDS without input."""
    how = " (Ctrl-D ends it)" if source == "-" and sys.stdin.isatty() else ""
    notice = threading.Timer(WAIT_SECONDS, logger.warning, ("%s: waiting for text%s.", _name_of(source), how))
    notice.daemon = True
    notice.start()
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).expanduser().open("rb") as file:
            while block := file.read1(1 << 20):  # type: ignore[union-attr]
                notice.cancel()
                yield block
    except OSError as error:
        raise CorpusError(f"{_name_of(source)} cannot be read: {error.strerror or error}.") from None
    finally:
        notice.cancel()


def _keep(source: str) -> Path:
    """Copy a stream into the cache under its hash, so that it can be read again; returns the path of the copy."""
    folder = cache_folder() / "stdin"
    digest = hashlib.sha256()
    with workplace(folder) as place:
        try:
            with (place / "stdin").open("wb") as copy:
                for block in _stream(source):
                    copy.write(block)
                    digest.update(block)
            if not (place / "stdin").stat().st_size:
                raise CorpusError(f"{_name_of(source)} is empty: there is no text to read.", kind=EMPTY)
            sync(place / "stdin")
            target = folder / f"{digest.hexdigest()}.txt"
            put_in_place(place / "stdin", target)
        except OSError as error:
            raise unwritable(folder, error) from None
    return target.resolve()


# -- files ------------------------------------------------------------------------------------------------


def _one_file(path: Path, config: CorpusConfig, progress: Progress, *, name: str, where: str | None = None) -> Corpus:
    text, files = file_text(path, config, where)
    return _positioned(name, str(path), text, files, config, progress)


def _split_at(config: CorpusConfig) -> SplitAt:
    return config.split_by or config.split_at


def _positioned(name: str, source: str, text: Text, files: int, config: CorpusConfig, progress: Progress) -> Corpus:
    fractions = config.split_fractions or DEFAULT_FRACTIONS
    return split_text(name, source, text, fractions, at=_split_at(config), files=files, progress=progress)


def _folder(folder: Path, config: CorpusConfig, progress: Progress) -> Corpus:
    found = list_files(folder)
    here = [path for path in found if path.parent == folder and (_is_text(path) or table_suffix(path))]
    if splits := _split_files(folder, here):
        return _split_folder(folder, splits, found, config)
    return _several(_folder_name(folder), str(folder), folder, found, config, progress)


def _split_folder(
    folder: Path, splits: dict[str, list[Path]], found: Sequence[Path], config: CorpusConfig
) -> Corpus:  # fmt: skip
    """A folder whose files are the splits; other files are left out."""
    check_positional(str(folder), _split_at(config))
    used = {path for files in splits.values() for path in files}
    others = [str(path.relative_to(folder)) for path in found if path not in used]
    warn_of_skipped(str(folder), {"of no split": others})
    parts = {}
    for name, files in splits.items():
        where = f"{folder} ({name})"
        # Empty shards are left out; the errors of a single file come from its text.
        shards = expand(files) if len(files) == 1 else readable_files(where, folder, expand(files), config)
        parts[name] = whole(name, join(str(files[0]) if len(files) == 1 else where, shards, config))
    return Corpus(_folder_name(folder), str(folder), parts, (size_note(len(used)),))


def _several(
    name: str, source: str, folder: Path, files: Sequence[Path], config: CorpusConfig, progress: Progress
) -> Corpus:
    """Files as one text; files without text are left out."""
    parts = expand(files)
    if len(parts) != 1 or not parts[0].path.exists():
        parts = readable_files(source, folder, parts, config)
    where = source if len(parts) > 1 else str(parts[0].path)
    return _positioned(name, source, join(where, parts, config), len(parts), config, progress)


def _glob(pattern: Path, config: CorpusConfig, progress: Progress) -> Corpus:
    files = [path.resolve() for path in list_files(pattern)]
    if not files:
        raise CorpusError(f"No file matches {str(pattern)!r}.")
    # The part of the pattern without wildcards names the corpus.
    fixed = Path(*_until_magic(pattern)).resolve()
    return _several(_folder_name(fixed), os.path.abspath(pattern), fixed, files, config, progress)


def _until_magic(pattern: Path) -> Sequence[str]:
    parts = pattern.parts
    return parts[: next(number for number, part in enumerate(parts) if glob.has_magic(part))]


def _split_files(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of train, valid and test in a folder; empty if it has no training file.

    Raises:
        CorpusError: two files are for one split, or a required split is missing.
    """
    files_of: dict[str, list[Path]] = {}
    for path in files:
        stem = _SHARD.sub("", _stem(path)).lower()
        if role := SPLIT_ALIASES.get(re.split(r"[._-]", stem)[-1]):
            files_of.setdefault(role, []).append(path)
    plain = [role for role, paths in files_of.items() if any(_stem(path).lower() in SPLIT_ALIASES for path in paths)]
    if "train" not in files_of:
        # "the-test.txt" alone is any text; "test.txt" without train.txt is a mistake.
        if plain:
            raise CorpusError(
                f"{folder} has a file for {plain[0]} ({files_of[plain[0]][0].name}) but none for training: "
                "name it train.txt."
            )
        return {}
    for role, paths in files_of.items():
        shards = len({_SHARD.sub("", _stem(path)) for path in paths}) == 1 and all(
            _SHARD.search(_stem(path)) for path in paths
        )
        if len(paths) > 1 and not shards:
            raise CorpusError(
                f"{folder} has {len(paths)} files for {role}: {', '.join(path.name for path in paths)}. "
                "Keep one, or name the text by a glob."
            )
    if "valid" not in files_of:
        raise CorpusError(
            f"{folder} has {files_of['train'][0].name} but no validation split: name it valid.txt "
            "(or val, validation, dev), or give the one file to have it split by position."
        )
    return {role: files_of[role] for role in SPLIT_NAMES if role in files_of}


def _is_text(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES


def _stem(path: Path) -> str:
    """The file's name without the suffixes of compression and format: "wiki.train" of wiki.train.tokens.gz."""
    if path.suffix.lower() in COMPRESSED and path.stem:
        path = path.with_suffix("")
    return path.stem


def _folder_name(folder: Path) -> str:
    return folder.name or "text"
