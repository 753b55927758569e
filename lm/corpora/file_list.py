"""Files → one text: which of them can be read, and how.

A file is text as it is, or a table whose column is the text; a .zip is the files in it. Files are judged by their
content: one that cannot be read as text is left out with a notice that says why.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.config import CorpusConfig
from lm.corpora.corpus import logger
from lm.corpora.table_files import TableText, file_rows, table_suffix
from lm.corpora.text import FileText, JoinedText, Text, zip_members
from lm.errors import CorpusError

_NAMED = 4
"""Files that a notice names for each reason."""


@dataclass(frozen=True)
class InputFile:
    """A file, or a file in a .zip."""

    path: Path
    member: str | None = None

    @property
    def table(self) -> str | None:
        """The suffix of its format, such as ".csv"; None where it is no table."""
        return (table_suffix(Path(self.member)) if self.member else None) or table_suffix(self.path)

    def shown(self, folder: Path) -> str:
        """Its name in a list of the files of `folder`."""
        if self.path == folder:
            return self.member or self.path.name
        path = str(self.path.relative_to(folder)) if self.path.is_relative_to(folder) else str(self.path)
        return path if self.member is None else f"{path}: {self.member}"


def input_files(path: Path) -> list[InputFile]:
    """The file, or the files in a .zip."""
    return [InputFile(path, name) for name in zip_members(path)] if path.suffix.lower() == ".zip" else [InputFile(path)]


def file_text(path: Path, config: CorpusConfig, where: str | None = None) -> tuple[Text, int]:
    """The text of one file, and how many files it comes from: a .zip may hold several.

    Raises:
        CorpusError: there is no text in it.
    """
    parts = input_files(path)
    if len(parts) != 1:
        parts = readable_files(where or str(path), path, parts, config)
    return join(where or str(path), parts, config), len(parts)


def join(where: str, files: Sequence[InputFile], config: CorpusConfig, *, share: tuple[int, int] = (0, 1)) -> Text:
    """Some files as one text, in the order given; errors of the whole call it `where`, `share` is `TableText`'s."""
    if all(file.table for file in files):
        # Documents are joined alike, within a table and between tables.
        one = where if len(files) == 1 else None
        rows = [
            file_rows(file.path, file.table or "", config.encoding, member=file.member, where=one or _where(file))
            for file in files
        ]
        return TableText(where, rows, config.text_column, share=share)
    if len(files) == 1:
        return FileText(files[0].path, config.encoding, member=files[0].member, where=where)
    return JoinedText(where, [join(_where(file), [file], config) for file in files])


def readable_files(where: str, folder: Path, files: Iterable[InputFile], config: CorpusConfig) -> list[InputFile]:
    """The files that text can be read from; a notice names the others.

    Args:
        where: what the notice and errors call the files together.
        folder: what the names in the notice are relative to.
        files: all of them.
        config: column and encoding.

    Raises:
        CorpusError: none can be read.
    """
    good: list[InputFile] = []
    left_out: dict[str, list[str]] = {}
    for file in files:
        reason = _problem(file, config)
        if reason is None:
            good.append(file)
        else:
            left_out.setdefault(reason, []).append(file.shown(folder))
    if not good:
        there = f"none of its files can be read: {_listed(left_out)}" if left_out else "there is no file in it"
        raise CorpusError(f"{where} holds no text: {there}.")
    warn_of_skipped(where, left_out)
    return good


def warn_of_skipped(where: str, left_out: dict[str, list[str]]) -> None:
    """Give the notice of files that are left out; names by reason."""
    if count := sum(map(len, left_out.values())):
        files = "1 file is" if count == 1 else f"{count:,} files are"
        logger.warning("%s: %s left out: %s.", where, files, _listed(left_out))


def list_files(path: Path) -> list[Path]:
    """The files that a path names, in the order of their names: one file, those of a folder, those of a glob.

    Hidden files of a folder are left out.

    Raises:
        CorpusError: a folder cannot be read.
    """
    if path.is_dir():
        try:
            # iterdir first: glob takes a folder that may not be read for an empty one.
            next(path.iterdir(), None)
            found = sorted(path.glob("**/*"))
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
        return [
            each
            for each in found
            if (each.is_file() or _is_broken_link(each))
            and not any(part.startswith(".") for part in each.relative_to(path).parts)
        ]
    if path.exists():
        return [path]
    return [each for match in sorted(glob.glob(str(path), recursive=True)) if (each := Path(match)).is_file()]


def expand(files: Iterable[Path]) -> list[InputFile]:
    """The files, with those in a .zip in its place; a damaged .zip stays one file."""
    parts: list[InputFile] = []
    for path in files:
        try:
            parts += input_files(path) if path.exists() else [InputFile(path)]
        except CorpusError:
            parts.append(InputFile(path))
    return parts


def _where(file: InputFile) -> str:
    return str(file.path) if file.member is None else f"{file.path}: {file.member}"


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _problem(file: InputFile, config: CorpusConfig) -> str | None:
    """Why no text can be read from the beginning of a file, in a few words; None where it can."""
    if _is_broken_link(file.path):
        return "broken link"
    text = join(_where(file), [file], config)
    if isinstance(text, TableText):
        # What is left out in a table is for the reading to say.
        text.noticed = True
    try:
        next(text.chunks(), None)
    except CorpusError as error:
        return error.kind
    return None


def _listed(left_out: dict[str, list[str]]) -> str:
    parts = []
    for reason, names in left_out.items():
        more = ", …" if len(names) > _NAMED else ""
        parts.append(f"{len(names):,} {reason} ({', '.join(names[:_NAMED])}{more})")
    return "; ".join(parts)
