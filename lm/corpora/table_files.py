"""Text in a column of .jsonl, .json, .csv, .parquet or hub data sets.

Documents are joined by one newline; rows without text are left out with a warning. JSON and CSV are read line by line
with `lm.corpora.text`, parquet and hub data sets with the `datasets` library, all with constant memory. Only a .json
file that is one list is read as a whole.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, repeat, zip_longest
from pathlib import Path
from typing import Any

from lm.corpora.corpus import logger
from lm.corpora.text import COMPRESSED, EMPTY, FileText, Text, lines_of, open_binary, regroup, utf8
from lm.errors import CorpusError
from lm.registry import did_you_mean

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
_ROWS = 1000
"""Rows that `datasets` gives at a time."""
_SEPARATORS = (",", ";", "\t")
_MAX_CELL = (1 << 31) - 1
MAX_LINES_IN_WARNING = 4
# In no text, as zero characters are refused.
_END = "\0end"


def table_suffix(path: Path) -> str | None:
    """ ".csv" for a.csv and a.csv.gz; None where the file is no table."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def datasets_library() -> Any:
    """The `datasets` library, without progress bars and log messages."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    # Else each open file, even a local one, causes a request to the hub.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return datasets


# -- the rows of one table ------------------------------------------------------------------------------


class Rows(ABC):
    """The rows of one table; they can be read many times."""

    unit = "line"
    """Unit of a row's number in messages."""
    separator: str | None = None
    """Separator of the columns, if it was detected."""

    def __init__(self, where: str, size_bytes: int = 0) -> None:
        """`where` is the name of the table in errors."""
        self.where = where
        self.size_bytes = size_bytes

    @abstractmethod
    def rows(self, wanted: Sequence[str], columns: dict[str, None]) -> Iterator[tuple[int, list[Any]]]:
        """The number of each row, from 1, and its cells of the `wanted` columns, or None.

        Adds the names of all columns to `columns`.

        Raises:
            CorpusError: the table cannot be read; names the line.
        """

    def cells(self, column: str, columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
        """As `rows`, of one column."""
        return ((number, cells[0]) for number, cells in self.rows([column], columns))

    def columns(self) -> list[str]:
        """The columns of the first row; empty if it cannot be read."""
        found: dict[str, None] = {}
        with contextlib.suppress(CorpusError):
            next(self.rows([], found), None)
        return list(found)


class JsonRows(Rows):
    """A file of one JSON object a line, of one list of objects, or of one object of lists."""

    def __init__(self, text: FileText, *, may_be_whole: bool) -> None:
        """`may_be_whole`: whether an object may span several lines, as in a .json file."""
        super().__init__(text.where, text.size_bytes)
        self._text = text
        self._may_be_whole = may_be_whole

    def rows(self, wanted: Sequence[str], columns: dict[str, None]) -> Iterator[tuple[int, list[Any]]]:
        """See `Rows.rows`."""
        lines = ((number, line) for number, line in enumerate(lines_of(self._text.chunks()), 1) if not line.isspace())
        begin = list(islice(lines, 2))
        rows = self._values() if self._is_whole(begin) else map(self._value, chain(begin, lines))
        for number, row in rows:
            if isinstance(row, dict):
                columns.update(dict.fromkeys(row))
                yield number, [row.get(column) for column in wanted]
            elif isinstance(row, str):
                # A list of texts has one column, "text", as in `datasets`.
                columns["text"] = None
                yield number, [row if column == "text" else None for column in wanted]
            else:
                yield number, [row for _ in wanted]

    def _is_whole(self, begin: Sequence[tuple[int, str]]) -> bool:
        """Whether the file is one JSON value, and not one per line."""
        if not begin:
            return False
        may_be_whole = self._may_be_whole or begin[0][1].lstrip().startswith("[")
        if len(begin) == 1:
            return may_be_whole
        try:
            json.loads(begin[0][1])
        except (ValueError, RecursionError):
            return may_be_whole
        return False

    def _value(self, numbered: tuple[int, str]) -> tuple[int, Any]:
        number, line = numbered
        try:
            return number, json.loads(line)
        except json.JSONDecodeError as error:
            raise self._not_json(number, error) from None
        # A number of thousands of digits, or thousands of nested brackets.
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{self.where}, line {number:,}, cannot be read as JSON: {error}.") from None

    def _not_json(self, number: int, error: json.JSONDecodeError) -> CorpusError:
        return CorpusError(f"{self.where}, line {number:,}, is not JSON: {error.msg} at column {error.colno:,}.")

    def _values(self) -> Iterator[tuple[int, Any]]:
        """The rows of a file that is read as a whole, each with its first line."""
        text = "".join(self._text.chunks())
        decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
        line, counted = 1, 0

        def skip(place: int) -> int:
            return blank.match(text, place).end()  # type: ignore[union-attr]

        try:
            at = skip(0)
            listed = text.startswith("[", at)
            at = skip(at + 1) if listed else at
            while at < len(text) and not (listed and text[at] == "]"):
                line, counted = line + text.count("\n", counted, at), at
                row, end = decoder.raw_decode(text, at)
                for each in [row] if listed else _from_columns(row):
                    yield line, each
                at = skip(end)
                if listed and text[at : at + 1] == ",":
                    at = skip(at + 1)
                elif listed and text[at : at + 1] != "]":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            if listed and (at >= len(text) or skip(at + 1) < len(text)):
                raise json.JSONDecodeError("Extra data" if at < len(text) else "Expecting value", text, at)
        except json.JSONDecodeError as error:
            raise self._not_json(error.lineno, error) from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{self.where}, line {line:,}, cannot be read as JSON: {error}.") from None


def _from_columns(value: Any) -> Iterable[Any]:
    """The rows of an object of lists (columns); any other value is one row."""
    if not isinstance(value, dict) or not value or not all(isinstance(cells, list) for cells in value.values()):
        return [value]
    return (dict(zip(value, cells, strict=True)) for cells in zip_longest(*value.values()))


class CsvRows(Rows):
    """A file of comma-separated values with a header; all cells are text, also "NA" and "12"."""

    def __init__(self, text: FileText) -> None:
        super().__init__(text.where, text.size_bytes)
        self._text = text

    def rows(self, wanted: Sequence[str], columns: dict[str, None]) -> Iterator[tuple[int, list[Any]]]:
        """See `Rows.rows`."""
        separator = self._find_separator(wanted)
        rows = self._rows(separator)
        _, header = next(rows, (1, []))
        columns.update(dict.fromkeys(header))
        places = [header.index(column) if column in header else None for column in wanted]
        for number, row in rows:
            if any(row[len(header) :]):
                raise CorpusError(
                    f"{self.where}, line {number:,}, has {len(row)} cells, and the header {len(header)}: put text with "
                    f"{separator!r} in it between quotation marks."
                )
            yield number, [row[place] if place is not None and place < len(row) else None for place in places]

    def _find_separator(self, wanted: Sequence[str]) -> str:
        """A comma, or the separator that gives a header with the most wanted columns, else the most columns."""
        headers = {separator: next(self._rows(separator), (1, []))[1] for separator in _SEPARATORS[:1]}
        if not wanted or not set(wanted) <= set(headers[","]):
            headers |= {separator: next(self._rows(separator), (1, []))[1] for separator in _SEPARATORS[1:]}

        def fit(separator: str) -> tuple[int, int]:
            return len(set(wanted) & set(headers[separator])), len(headers[separator])

        best = max(headers, key=fit)
        self.separator = best if best != "," else None
        return best

    def _rows(self, separator: str) -> Iterator[tuple[int, list[str]]]:
        """Rows that are not blank, each with its first line."""
        # The default is 128 KB, and a document may be longer.
        csv.field_size_limit(_MAX_CELL)
        reader = csv.reader(chain(lines_of(self._text.chunks(), ""), [_END]), delimiter=separator)
        begin = 1
        try:
            for row in reader:
                if row and row[-1].endswith(_END):
                    if row == [_END]:
                        return
                    raise CorpusError(
                        f"{self.where}: the row that begins in line {begin:,} opens a quotation mark that nothing "
                        "closes: close it, or double it."
                    )
                if row:
                    yield begin, row
                begin = reader.line_num + 1
        except csv.Error as error:
            raise CorpusError(f"{self.where}, line {begin:,}, cannot be read as a table: {error}.") from None


class ArrowRows(Rows):
    """A `datasets` Dataset or IterableDataset."""

    unit = "row"

    def __init__(self, where: str, open_: Callable[[], Any], size_bytes: int = 0) -> None:
        """`open_` opens the data set for each reading."""
        super().__init__(where, size_bytes)
        self._open = open_

    def rows(self, wanted: Sequence[str], columns: dict[str, None]) -> Iterator[tuple[int, list[Any]]]:
        """See `Rows.rows`."""
        number = 0
        for table in self._open().with_format("arrow").iter(batch_size=_ROWS):
            columns.update(dict.fromkeys(table.column_names))
            known = [
                table.column(column).to_pylist() if column in table.column_names else repeat(None) for column in wanted
            ]
            for _, *cells in zip(range(table.num_rows), *known, strict=False):
                number += 1
                yield number, cells


class ParquetRows(ArrowRows):
    """A local .parquet file."""

    def __init__(self, path: Path, *, member: str | None, where: str) -> None:
        self._file, self._member = path, member
        size = 0 if path.suffix.lower() in COMPRESSED else path.stat().st_size
        address = str(path) if member is None else f"zip://{member}::{path}"
        super().__init__(
            where,
            lambda: datasets_library().load_dataset("parquet", data_files=[address], split="train", streaming=True),
            size,
        )

    def rows(self, wanted: Sequence[str], columns: dict[str, None]) -> Iterator[tuple[int, list[Any]]]:
        """See `Rows.rows`."""
        # A clear error if the file is missing or locked, or its codec is not installed.
        try:
            open_binary(self._file, self._member).close()
        except OSError as error:
            raise CorpusError(f"{self.where} cannot be read: {error.strerror or error}.") from None
        if self._file.stat().st_size == 0:
            raise CorpusError(f"{self.where} is empty: there is no text to read.", kind=EMPTY)
        try:
            yield from super().rows(wanted, columns)
        # pyarrow and the codecs share no error class.
        except Exception as error:
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
            raise CorpusError(f"{self.where} cannot be read as a table: {reason}.") from None


def file_rows(path: Path, suffix: str, encoding: str | None, *, member: str | None, where: str) -> Rows:
    """The rows of a local file of a format in `FORMATS`; `where` is its name in errors."""
    if suffix == ".parquet":
        return ParquetRows(path, member=member, where=where)
    text = FileText(path, encoding, member=member, where=where)
    return CsvRows(text) if suffix == ".csv" else JsonRows(text, may_be_whole=suffix == ".json")


# -- the text of tables -----------------------------------------------------------------------------------------


class TableText(Text):
    """The text column of one or more tables, its documents joined by a newline."""

    def __init__(self, where: str, tables: Sequence[Rows], column: str, *, share: tuple[int, int] = (0, 1)) -> None:
        """`share` (NUMBER, SHARES) is every SHARES-th row, from row NUMBER on."""
        self.where = where
        self.size_bytes = sum(table.size_bytes for table in tables) if all(t.size_bytes for t in tables) else 0
        self._tables = tables
        self._column = column
        self._share = share
        self.warned = False
        """Whether the warning of rows that are left out was given."""

    def chunks(self, skip: int = 0) -> Iterator[str]:
        """See `Text.chunks`."""
        documents = regroup(self._documents())
        for _ in zip(range(skip), documents, strict=False):
            pass
        return documents

    def documents(self) -> Iterator[str]:
        """See `Text.documents`."""
        for number, document in enumerate(self._documents()):
            # All but the first begin with the newline that joins them.
            yield (document[1:] if number else document) + "\n"

    def _documents(self) -> Iterator[str]:
        number, shares = self._share
        columns: dict[str, None] = {}
        found = missing = other = count = 0
        examples: list[str] = []
        kind = ""
        for table in self._tables:
            for line, cell in table.cells(self._column, columns):
                count += 1
                if (count - 1) % shares != number:
                    continue
                if isinstance(cell, str) and cell:
                    self._check(cell, table, line)
                    yield "\n" + cell if found else cell
                    found += 1
                elif cell is None or cell == "":
                    missing += 1
                else:
                    other += 1
                    kind = kind or type(cell).__name__
                    if len(examples) < MAX_LINES_IN_WARNING:
                        examples.append(self._position(table, line))
        if not (found or missing or other):
            raise CorpusError(f"{self.where} is empty: there is no text to read.", kind=EMPTY)
        if self._column not in columns:
            raise self._no_column(columns)
        if other > found:
            raise CorpusError(
                f"{self.where}: column {self._column!r} holds {kind} values, not text, in {other:,} of "
                f"{found + missing + other:,} rows ({', '.join(examples)}). Columns: {', '.join(columns)}.",
                kind=f"no text in column {self._column!r}",
            )
        if not found:
            raise CorpusError(f"{self.where}: column {self._column!r} holds no text.", kind=EMPTY)
        if (missing or other) and not self.warned:
            self.warned = True
            self._warn(missing, other, examples)

    def _warn(self, missing: int, other: int, examples: Sequence[str]) -> None:
        if missing:
            logger.warning("%s: %d rows without text were left out.", self.where, missing)
        if other:
            more = ", …" if other > len(examples) else ""
            logger.warning(
                "%s: %d %s whose %r is no text %s left out (%s%s).",
                self.where, other, "row" if other == 1 else "rows", self._column,
                "was" if other == 1 else "were", ", ".join(examples), more,
            )  # fmt: skip

    def _position(self, table: Rows, line: int) -> str:
        file = "" if len(self._tables) == 1 else f"{Path(table.where).name}, "
        return f"{file}{table.unit} {line:,}"

    def _check(self, document: str, table: Rows, line: int) -> None:
        """Refuse text that no text file can hold."""
        where = f"{table.where}, {table.unit} {line:,}"
        if "\0" in document:
            raise CorpusError(f"{where}: the text holds a zero character, as binary files do: remove it.")
        try:
            utf8(document)
        except CorpusError as error:
            raise CorpusError(f"{where}: {error}") from None

    def _no_column(self, columns: dict[str, None]) -> CorpusError:
        separator = next((table.separator for table in self._tables if table.separator), None)
        how = "" if separator is None else f", separated by {separator!r}"
        return CorpusError(
            f"{self.where} has no column {self._column!r}.{did_you_mean(self._column, columns)} "
            f"Columns{how}: {', '.join(columns)}; choose one with --text-column.",
            kind=f"without column {self._column!r}",
        )
