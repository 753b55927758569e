"""Text read in chunks, with constant memory.

Every `Text` gives the same chunks each time it is read: at most half a MB, cut after a newline if the chunk has one,
else after a space, else after other white space. Without white space a chunk grows up to 4 MB, and is then cut between
two characters. Text is not changed (nor its line ends); only a leading byte-order mark is dropped.

All text is read here: files, compressed files, standard input, tables, prompts. So all have the same rules for
encodings, byte-order marks and zero bytes.
"""

from __future__ import annotations

import codecs
import importlib
import io
import lzma
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, cast

from lm.errors import CorpusError, MissingExtraError
from lm.tokenizers.turns import Conversation

# 1.2 times as fast as 2 MB: a chunk and its tokens fit into the processor's caches.
CHUNK = 1 << 19
MAX_CHUNK = 1 << 22
"""Size at which a chunk without white space is cut inside a word."""
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".lzma": "lzma", ".zip": "zip", ".zst": "zstd"}
STDIN = "Standard input"
"""Its name in errors."""
_NEEDS = {"zstd": "zstandard"}
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
_UTF8 = "utf-8"
# Of two marks that begin alike, the longer one first.
_MARKS = (
    (codecs.BOM_UTF8, _UTF8),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MARK_BYTES = 4


class Text(ABC):
    """A text, read in chunks."""

    where: str
    """Its name in errors: a path or a name."""
    size_bytes: int
    """About the size, for progress; 0 if unknown."""
    conversations: Callable[[], Iterator[Conversation]] | None = None
    """Reads its conversations, if it is instruction data; `chunks` gives their plain turns."""

    @abstractmethod
    def chunks(self, skip: int = 0) -> Iterator[str]:
        """The text from its `skip`-th chunk on; the cuts are the same each time.

        Raises:
            CorpusError: the text cannot be read, is empty or has a wrong encoding; names the byte and the line.
        """

    def blocks(self, skip: int = 0) -> Iterator[bytes]:
        """The same chunks as UTF-8 bytes; those of a UTF-8 file are not checked."""
        return map(utf8, self.chunks(skip))

    def documents(self) -> Iterator[str]:
        """Its documents, each with a newline at the end: the files, or the rows of a table; other text is one."""
        text = "".join(self.chunks())
        yield text if text.endswith("\n") else text + "\n"


class MemoryText(Text):
    """A text in memory."""

    def __init__(self, where: str, text: str) -> None:
        self.where = where
        self.size_bytes = len(text.encode("utf-8"))
        self._text = text

    def chunks(self, skip: int = 0) -> Iterator[str]:
        """See `Text.chunks`."""
        return islice(regroup([self._text]), skip, None)


class BinaryText(Text):
    """Text in bytes that can be opened many times."""

    def __init__(
        self, where: str, open_: Callable[[], BinaryIO], encoding: str | None, *, size_bytes: int, seekable: bool
    ) -> None:
        """`encoding` is for text without a byte-order mark; None is UTF-8."""
        self.where = where
        self.size_bytes = size_bytes
        self._open = open_
        self._encoding = encoding
        self._seekable = seekable
        # The start of each chunk, stored while reading, so that later reads can seek.
        self._starts: list[int] = []
        self._codec: tuple[str, int] | None = None

    def chunks(self, skip: int = 0) -> Iterator[str]:
        """See `Text.chunks`."""
        codec, mark = self._coding()
        if codec != _UTF8:
            yield from islice(regroup(self._converted(codec, mark)), skip, None)
            return
        for block, at in self._read(skip, mark):
            yield self._decode(block, at)

    def blocks(self, skip: int = 0) -> Iterator[bytes]:
        """See `Text.blocks`."""
        codec, mark = self._coding()
        return super().blocks(skip) if codec != _UTF8 else (block for block, _ in self._read(skip, mark))

    def _coding(self) -> tuple[str, int]:
        """The name of the codec, and the size of the byte-order mark."""
        if self._codec is None:
            with self._opened() as file:
                start = file.read(_MARK_BYTES)
            given = codecs.lookup(self._encoding or _UTF8).name.removesuffix("-sig")
            marks = ((codec, len(mark)) for mark, codec in _MARKS if start.startswith(mark))
            self._codec = next(marks, (given, 0))
        return self._codec

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The open file; its errors become CorpusErrors."""
        try:
            with self._open() as file:
                yield file
        except _DAMAGE as error:
            raise CorpusError(f"{self.where} is damaged and cannot be unpacked: {error}.", kind="damaged") from None
        except OSError as error:
            raise _unreadable(self.where, error) from None

    def _read(self, skip: int, mark: int) -> Iterator[tuple[bytes, int]]:
        """Blocks of UTF-8, each with its offset in the file."""
        seek = self._seekable and skip < len(self._starts)
        at = self._starts[skip] if seek else mark
        number = skip if seek else 0
        with self._opened() as file:
            if seek:
                file.seek(at)
            else:
                file.read(mark)
            for block in _blocks(file):
                if number == len(self._starts):
                    self._starts.append(at)
                if number >= skip:
                    yield block, at
                at += len(block)
                number += 1
        if not number:
            raise _empty(self.where)

    def _decode(self, block: bytes, at: int) -> str:
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_decodable("UTF-8", at + error.start, block[error.start]) from None
        if "\0" in text:
            raise self._binary(at + block.index(0))
        return text

    def _converted(self, codec: str, mark: int) -> Iterator[str]:
        """Pieces of text in another encoding than UTF-8."""
        decoder = codecs.getincrementaldecoder(codec)()
        at, begun = mark, False
        with self._opened() as file:
            file.read(mark)
            while True:
                block = file.read(CHUNK)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    # `error.object` begins with bytes that the decoder held back from the last block.
                    offset = at + len(block) - len(error.object) + error.start
                    raise self._not_decodable(codec, offset, error.object[error.start]) from None
                except UnicodeError as error:
                    raise CorpusError(f"{self.where} is not {codec}: {error}.", kind=f"not {codec}") from None
                if not begun:
                    text = text.removeprefix("\ufeff")
                if "\0" in text:
                    raise self._binary(at + len(text[: text.index("\0")].encode(codec, "replace")))
                begun = begun or bool(text)
                yield text
                at += len(block)
                if not block:
                    break
        if not begun:
            raise _empty(self.where)

    def _not_decodable(self, codec: str, offset: int, value: int) -> CorpusError:
        problem = f"{self.where} is not {codec}: byte {offset:,} (line {self._line(offset):,}) is 0x{value:02x}."
        if (fits := self._possible_encoding()) is None:
            return CorpusError(f"{problem} It looks like a binary file: give text.", kind="binary")
        return CorpusError(
            f"{problem} Name its encoding, such as --encoding {fits}, convert it to UTF-8, or remove these bytes.",
            kind=f"not {codec}; --encoding {fits} can read it",
        )

    def _binary(self, offset: int) -> CorpusError:
        fits = self._possible_encoding()
        hint = "Give UTF-8 text." if fits is None else f"If it is text, name its encoding, such as --encoding {fits}."
        return CorpusError(
            f"{self.where} looks like a binary file: byte {offset:,} (line {self._line(offset):,}) is zero. {hint}",
            kind="binary",
        )

    def _possible_encoding(self) -> str | None:
        """An encoding in which all bytes can be text; None if none is likely."""
        with self._opened() as file:
            start = file.read(CHUNK)
        if 0 not in start:
            candidates = ["cp1252", "latin-1"]
        else:
            # Every second byte of Latin text in UTF-16 is zero.
            threshold = len(start) // 8
            zeros = {"utf-16-le": start[1::2].count(0), "utf-16-be": start[::2].count(0)}
            candidates = [name for name, count in zeros.items() if count > threshold]
        return next((name for name in candidates if self._is_text_in(name)), None)

    def _is_text_in(self, encoding: str) -> bool:
        decoder = codecs.getincrementaldecoder(encoding)()
        with self._opened() as file:
            try:
                while block := file.read(CHUNK):
                    if "\0" in decoder.decode(block):
                        return False
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return False
        return True

    def _line(self, offset: int) -> int:
        """The line, from 1, of the byte at `offset`."""
        lines, left = 1, offset
        with self._opened() as file:
            while left and (block := file.read(min(left, CHUNK))):
                lines += block.count(b"\n")
                left -= len(block)
        return lines


class FileText(BinaryText):
    """One file of text, compressed or not."""

    def __init__(
        self, path: Path, encoding: str | None = None, *, member: str | None = None, where: str | None = None
    ) -> None:
        """The text of a file.

        Args:
            path: the file.
            encoding: for text without a byte-order mark; None is UTF-8.
            member: the file in a .zip of several.
            where: its name in errors; None is the path.
        """
        where = where or (str(path) if member is None else f"{path}: {member}")
        compressed = path.suffix.lower() in COMPRESSED
        try:
            size = 0 if compressed else path.stat().st_size
        except OSError as error:
            raise _unreadable(where, error) from None
        super().__init__(
            where, lambda: open_binary(path, member), encoding, size_bytes=size, seekable=not compressed
        )  # fmt: skip


class JoinedText(Text):
    """Several texts as one, with a newline between two if the first does not end with one."""

    def __init__(self, where: str, parts: Sequence[Text]) -> None:
        self.where = where
        self.size_bytes = sum(part.size_bytes for part in parts) if all(part.size_bytes for part in parts) else 0
        self._parts = parts

    def chunks(self, skip: int = 0) -> Iterator[str]:
        """See `Text.chunks`."""
        return islice(regroup(self._pieces()), skip, None)

    def documents(self) -> Iterator[str]:
        """See `Text.documents`."""
        for part in self._parts:
            yield from part.documents()

    def _pieces(self) -> Iterator[str]:
        ended = True
        for part in self._parts:
            if not ended:
                yield "\n"
            for chunk in part.chunks():
                yield chunk
                ended = chunk.endswith("\n")


def decode_text(data: bytes, where: str, encoding: str | None = None) -> str:
    """The text of bytes in memory, read as `FileText` does; "" if it is empty.

    Args:
        data: the bytes.
        where: their name in errors.
        encoding: for text without a byte-order mark; None is UTF-8.

    Raises:
        CorpusError: the encoding is wrong, or it is not text.
    """
    try:
        return decode_file(data, where, encoding)
    except CorpusError as error:
        if error.kind != EMPTY:
            raise
        return ""


def decode_file(data: bytes, where: str, encoding: str | None = None) -> str:
    """As `decode_text`, but refuses an empty text."""
    text = BinaryText(where, lambda: io.BytesIO(data), encoding, size_bytes=len(data), seekable=True)
    return "".join(text.chunks())


def utf8(text: str) -> bytes:
    """The text in UTF-8; raises CorpusError for half of a surrogate pair, which UTF-8 cannot express."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"The text holds U+{ord(text[error.start]):04X}, half of a surrogate pair, which is no character: "
            f"remove it (near {text[max(0, error.start - 20) : error.start]!r})."
        ) from None


# -- boundaries of chunks -------------------------------------------------------------------------------

_SPACE = re.compile(r"\s")
# The same in UTF-8, ASCII first.
_SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]
_SPACE_BYTES = re.compile(b"|".join(re.escape(space.encode("utf-8")) for space in _SPACES))


def regroup(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in chunks as `Text.chunks` promises them, from pieces of any size."""
    held: list[str] = []
    size, wanted = 0, CHUNK
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size < wanted:
            continue
        text = "".join(held)
        start = 0
        while len(text) - start >= wanted:
            stop = start + wanted
            end = (text.rfind("\n", start, stop) + 1) or (text.rfind(" ", start, stop) + 1)
            end = end or start + _after_space(text[start:stop])
            if end == start:
                if wanted < MAX_CHUNK:
                    wanted = min(2 * wanted, MAX_CHUNK)
                    continue
                end = stop
            yield text[start:end]
            start, wanted = end, CHUNK
        held, size = [text[start:]], len(text) - start
    if size:
        yield "".join(held)


def lines_of(chunks: Iterable[str], newline: Literal["", "\n"] = "\n") -> Iterator[str]:
    """The lines of a text, each with its end; `newline` as for `open`: "" also ends lines at carriage returns."""
    held: list[str] = []
    for chunk in chunks:
        held.append(chunk)
        if "\n" not in chunk:
            continue
        lines = list(io.StringIO("".join(held), newline=newline))
        # A final carriage return may be half of a line end.
        held = [lines.pop()] if not lines[-1].endswith("\n") else []
        yield from lines
    yield from io.StringIO("".join(held), newline=newline)


def _after_space(text: str) -> int:
    """The position after the last white space, never inside a "\\r\\n"; 0 if there is none."""
    reverse = text[::-1]
    found = _SPACE.search(reverse, 1 if text.endswith("\r") else 0)
    return len(text) - found.start() if found else 0


def _after_space_bytes(data: bytes) -> int:
    """As `_after_space`, in UTF-8."""
    end = 0
    for found in _SPACE_BYTES.finditer(data):
        if found.end() < len(data) or found[0] != b"\r":
            end = found.end()
    return end


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a UTF-8 file in blocks, the chunks of `Text.chunks`.

    The end of a block depends only on its start, so that reading can begin at any block.
    """
    rest, wanted = b"", CHUNK
    while True:
        parts, size = [rest], len(rest)
        while size < wanted and (more := file.read(wanted - size)):
            parts.append(more)
            size += len(more)
        data = b"".join(parts)
        if size < wanted:
            break
        end = (data.rfind(b"\n") + 1) or (data.rfind(b" ") + 1) or _after_space_bytes(data)
        if not end:
            if wanted < MAX_CHUNK:
                rest, wanted = data, min(2 * wanted, MAX_CHUNK)
                continue
            end = _between_characters(data)
        yield data[:end]
        rest, wanted = data[end:], CHUNK
    # The end of the file: the rest is one block.
    if data:
        yield data


# -- bytes of files -------------------------------------------------------------------------------------


def open_binary(path: Path, member: str | None = None) -> BinaryIO:
    """The bytes of a file, decompressed according to its suffix.

    Args:
        path: the file.
        member: the file in a .zip; None if it holds only one.

    Raises:
        MissingExtraError: the codec is not installed.
        CorpusError: a .zip holds more than one file, or cannot be unpacked here.
        OSError: as `open`.
    """
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        return open(path, "rb", buffering=0)
    if codec in _NEEDS:
        try:
            importlib.import_module(_NEEDS[codec])
        except ImportError:
            raise MissingExtraError(
                f"{path} is compressed with {codec}, which needs a library that is not installed: "
                f"pip install {_NEEDS[codec]}"
            ) from None
    if codec == "zip":
        return _open_member(path, member)
    fsspec = importlib.import_module("fsspec")
    return cast(BinaryIO, fsspec.open(str(path), "rb", compression="infer").open())


def zip_members(path: Path) -> list[str]:
    """The files in a .zip, sorted by name, without hidden files and those that macOS adds.

    Raises:
        CorpusError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
    except zipfile.BadZipFile as error:
        raise CorpusError(f"{path} is damaged and cannot be unpacked: {error}.", kind="damaged") from None
    except OSError as error:
        raise _unreadable(str(path), error) from None
    return [
        name for name in names if not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    ]  # fmt: skip


def _open_member(path: Path, member: str | None) -> BinaryIO:
    if member is None:
        names = zip_members(path)
        if len(names) != 1:
            raise CorpusError(f"{path} must hold exactly one file, and has {len(names)}: unpack it, give the folder.")
        member = names[0]
    try:
        return cast(BinaryIO, zipfile.ZipFile(path).open(member))
    # A password, or an unsupported method.
    except (RuntimeError, NotImplementedError) as error:
        raise CorpusError(f"{path} cannot be unpacked: {error}.") from None


def _between_characters(data: bytes) -> int:
    """The last position in `data` that is not inside a UTF-8 character."""
    for start in range(len(data) - 1, max(len(data) - 5, -1), -1):
        lead = data[start]
        if lead & 0xC0 != 0x80:
            size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(data) if start + size <= len(data) else start
    return len(data)


EMPTY = "empty"


def _empty(where: str) -> CorpusError:
    return CorpusError(f"{where} is empty: there is no text to read.", kind=EMPTY)


def _unreadable(where: str, error: OSError) -> CorpusError:
    if isinstance(error, io.UnsupportedOperation) or error.errno is None:
        return CorpusError(f"{where} is damaged and cannot be unpacked: {error}.", kind="damaged")
    return CorpusError(f"{where} cannot be read: {error.strerror}.")
