"""Text in a column of .jsonl, .json, .csv, .parquet or hub data sets, through the `datasets` library.

Documents are joined by one newline; missing ones are left out with a notice. Local files are streamed, hub data sets
memory-mapped, so memory stays flat (a .json file that is one list is the exception: it is read whole).
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lm.corpora.corpus import logger
from lm.corpora.text import COMPRESSED, FileText, Text, open_binary, regroup
from lm.errors import CorpusError
from lm.registry import did_you_mean

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Cells stay as they are written: "NA" and "12" are text. datasets builds tables of this many rows at a time.
_CSV = {"na_filter": False}
_ROWS = 1000


def table_suffix(path: Path) -> str | None:
    """ ".csv" for a.csv and a.csv.gz; None where the file is no table."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def datasets_library() -> Any:
    """The `datasets` library, told to show no progress bars and to leave the reporting of errors to us."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    # Else each opening, of a local file too, is counted at the hub: a request, and without a network a wait.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return datasets


class TableText(Text):
    """The text column of a data set, its documents joined by a newline."""

    def __init__(self, where: str, rows: Callable[[], Any], column: str, *, size_bytes: int = 0) -> None:
        """`rows` opens the data set (a `datasets` Dataset or IterableDataset); it is called for each reading."""
        self.where = where
        self.size_bytes = size_bytes
        self.rows = rows
        self._column = column
        self._noticed = False

    def chunks(self, skip: int = 0) -> Iterator[str]:
        """See `Text.chunks`."""
        return islice(regroup(self._documents()), skip, None)

    def _documents(self) -> Iterator[str]:
        missing, found, columns = 0, False, list[str]()
        for table in self.rows().with_format("arrow").iter(batch_size=_ROWS):
            columns += [name for name in table.column_names if name not in columns]
            # A .jsonl line may lack what others have: only a column that no line has is a mistake.
            if self._column not in table.column_names:
                missing += table.num_rows
                continue
            column = table.column(self._column)
            values = column.to_pylist()
            documents = [value for value in values if isinstance(value, str) and value]
            if not documents and any(value is not None and not isinstance(value, str) for value in values):
                raise CorpusError(
                    f"{self.where}: column {self._column!r} holds {column.type}, not text. "
                    f"Columns: {', '.join(columns)}."
                )
            missing += len(values) - len(documents)
            if documents:
                yield ("\n" if found else "") + "\n".join(documents)
                found = True
        if not columns or (not found and not missing):
            raise CorpusError(f"{self.where} is empty: there is no text to read.")
        if self._column not in columns:
            raise CorpusError(
                f"{self.where} has no column {self._column!r}.{did_you_mean(self._column, columns)} "
                f"Columns: {', '.join(columns)}; choose one with --text-column."
            )
        if not found:
            raise CorpusError(f"{self.where}: column {self._column!r} holds no text.")
        if missing and not self._noticed:
            self._noticed = True
            logger.warning("%s: %d rows without text were left out.", self.where, missing)


def table_files(where: str, files: Sequence[Path], column: str) -> TableText:
    """The text of files of one table format, in the order given."""
    suffix = table_suffix(files[0])
    assert suffix is not None
    options = {**_CSV, "converters": {column: str}} if suffix == ".csv" else {}

    def rows() -> Any:
        return datasets_library().load_dataset(
            FORMATS[suffix], data_files=[str(file) for file in files], split="train", streaming=True, **options
        )

    packed = any(file.suffix.lower() in COMPRESSED for file in files)
    size = 0 if packed else sum(file.stat().st_size for file in files)
    return _Guarded(where, rows, column, files=files, size_bytes=size)


class _Guarded(TableText):
    """A table in local files, whose errors name the file and the line or byte."""

    def __init__(
        self, where: str, rows: Callable[[], Any], column: str, *, files: Sequence[Path], size_bytes: int
    ) -> None:
        super().__init__(where, rows, column, size_bytes=size_bytes)
        self._files = files

    def _documents(self) -> Iterator[str]:
        for file in self._files:
            # Fails here, in one sentence, where the file is missing, locked or its codec is not installed.
            try:
                open_binary(file).close()
            except OSError as error:
                raise CorpusError(f"{file} cannot be read: {error.strerror or error}.") from None
        if self.size_bytes == 0 and all(file.stat().st_size == 0 for file in self._files):
            raise CorpusError(f"{self.where} is empty: there is no text to read.")
        try:
            yield from super()._documents()
        except CorpusError:
            raise
        # The readers beneath (pyarrow, pandas, ujson, the codecs) share no error class of their own.
        except Exception as error:
            self._explain()
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
            raise CorpusError(f"{self.where} cannot be read as a table: {reason}.") from None

    def _explain(self) -> None:
        """Raise an error that names the place, where it can be found by reading the files as text."""
        for file in self._files:
            suffix = table_suffix(file)
            if suffix == ".parquet":
                continue
            for _ in FileText(file).chunks():
                pass
            if suffix == ".jsonl":
                _check_lines(file)


def _check_lines(file: Path) -> None:
    with open_binary(file) as binary:
        rest = b""
        number = 0
        while block := binary.read(1 << 20):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                _check_line(file, number, line)
        _check_line(file, number + 1, rest)


def _check_line(file: Path, number: int, line: bytes) -> None:
    try:
        if line.strip():
            json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise CorpusError(f"{file}, line {number:,}, is not JSON: {error}.") from None
