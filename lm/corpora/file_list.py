"""Files → one text.

A file is plain text, or a table with a column of text; a .zip is read as its files. A file that cannot be read as text
is left out, with a warning that gives the reason.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.config import CorpusConfig
from lm.corpora.conversations import ConversationText, open_tables
from lm.corpora.corpus import logger
from lm.corpora.table_files import TableText, file_rows, table_suffix
from lm.corpora.text import FileText, JoinedText, Text, zip_members
from lm.errors import CorpusError

_MAX_NAMED = 4
"""Files that a warning names for each reason."""


@dataclass(frozen=True)
class InputFile:
    """A file, or a file in a .zip."""

    path: Path
    member: str | None = None

    @property
    def table(self) -> str | None:
        """The suffix of its format, such as ".csv"; None if it is not a table."""
        return (table_suffix(Path(self.member)) if self.member else None) or table_suffix(self.path)

    @property
    def where(self) -> str:
        """Its name in errors."""
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    def name_in(self, folder: Path) -> str:
        """Its name in a list of the files of `folder`."""
        if self.path == folder:
            return self.member or self.path.name
        path = str(self.path.relative_to(folder)) if self.path.is_relative_to(folder) else str(self.path)
        return path if self.member is None else f"{path}: {self.member}"


def input_files(path: Path) -> list[InputFile]:
    """The file, or the files in a .zip."""
    return [InputFile(path, name) for name in zip_members(path)] if path.suffix.lower() == ".zip" else [InputFile(path)]


def file_text(path: Path, config: CorpusConfig, where: str | None = None) -> tuple[Text, int]:
    """The text of one file, and the number of files it comes from: a .zip may hold several.

    Raises:
        CorpusError: there is no text in it.
    """
    parts = input_files(path)
    if len(parts) != 1:
        parts = readable_files(where or str(path), path, parts, config)
    return join(where or str(path), parts, config), len(parts)


def join(where: str, files: Sequence[InputFile], config: CorpusConfig, *, share: tuple[int, int] = (0, 1)) -> Text:
    """Files as one text, in order; `where` is its name in errors, `share` is that of `TableText`."""
    if all(file.table for file in files):
        # Documents are joined in the same way within a table and between tables.
        one = where if len(files) == 1 else None
        rows = [
            file_rows(file.path, file.table or "", config.encoding, member=file.member, where=one or file.where)
            for file in files
        ]
        return open_tables(where, rows, config.text_column, share=share)
    if len(files) == 1:
        return FileText(files[0].path, config.encoding, member=files[0].member, where=where)
    texts = [join(file.where, [file], config) for file in files]
    for text in texts:
        if isinstance(text, ConversationText):
            raise CorpusError(f"{where} holds both conversations ({text.where}) and text: give one of the two.")
    return JoinedText(where, texts)


def readable_files(where: str, folder: Path, files: Iterable[InputFile], config: CorpusConfig) -> list[InputFile]:
    """The files from which text can be read; a warning names the others.

    Args:
        where: name of all the files in warnings and errors.
        folder: names in the warning are relative to it.
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
            left_out.setdefault(reason, []).append(file.name_in(folder))
    if not good:
        there = f"none of its files can be read: {_listed(left_out)}" if left_out else "there is no file in it"
        raise CorpusError(f"{where} holds no text: {there}.")
    warn_of_skipped(where, left_out)
    return good


def warn_of_skipped(where: str, left_out: dict[str, list[str]]) -> None:
    """Warn of files that are left out, given by reason."""
    if count := sum(map(len, left_out.values())):
        files = "1 file is" if count == 1 else f"{count:,} files are"
        logger.warning("%s: %s left out: %s.", where, files, _listed(left_out))


def list_files(path: Path) -> list[Path]:
    """The files of a path, sorted: one file, those of a folder (without hidden files), or those of a glob.

    Raises:
        CorpusError: a folder cannot be read.
    """
    if path.is_dir():
        try:
            # iterdir first: for glob, a folder without permission is empty.
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
    """The files, with each .zip replaced by the files in it; a damaged .zip stays one file."""
    parts: list[InputFile] = []
    for path in files:
        try:
            parts += input_files(path) if path.exists() else [InputFile(path)]
        except CorpusError:
            parts.append(InputFile(path))
    return parts


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _problem(file: InputFile, config: CorpusConfig) -> str | None:
    """Why no text can be read from the beginning of a file, in a few words; None if it can."""
    if _is_broken_link(file.path):
        return "broken link"
    text = join(file.where, [file], config)
    if isinstance(text, TableText | ConversationText):
        # The actual reading warns of rows that are left out.
        text.warned = True
    try:
        next(text.chunks(), None)
    except CorpusError as error:
        return error.kind
    return None


def _listed(left_out: dict[str, list[str]]) -> str:
    parts = []
    for reason, names in left_out.items():
        more = ", …" if len(names) > _MAX_NAMED else ""
        parts.append(f"{len(names):,} {reason} ({', '.join(names[:_MAX_NAMED])}{more})")
    return "; ".join(parts)
