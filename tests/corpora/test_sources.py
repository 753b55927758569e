"""What a source means, how its text is split, and the sentence for each thing that can be wrong."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import importlib
import io
import logging
import lzma
import os
import re
import threading
import zipfile
from pathlib import Path

import pytest

from lm.config import CorpusConfig, validate
from lm.corpora import Corpus, open_corpus, open_text
from lm.corpora import sources as sources_module
from lm.corpora import text as text_module
from lm.corpora.corpus import boundaries
from lm.errors import ConfigError, CorpusError, MissingExtraError


def opened(source: Path | str, **options: object) -> Corpus:
    return open_corpus(CorpusConfig(source=str(source), **options))  # type: ignore[arg-type]


def texts(corpus: Corpus) -> dict[str, str]:
    return {name: "".join(split.chunks()) for name, split in corpus.splits.items()}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "CHUNK", 7)
    monkeypatch.setattr(text_module, "MAX_CHUNK", 28)


# -- one file ---------------------------------------------------------------------------------------


def test_the_customary_split_of_tiny_shakespeare_is_exact_whatever_a_float_holds():
    assert boundaries(1_115_394, (0.9, 0.1)) == [1_003_854, 1_115_394]
    assert boundaries(10, (0.7, 0.1, 0.2)) == [7, 8, 10]  # 0.7 + 0.1 is 0.7999... as a float
    assert boundaries(100, (0.9, 0.05, 0.05)) == [90, 95, 100]


def test_a_file_is_split_by_position_90_5_5_in_characters_not_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 40, encoding="utf-8")
    corpus = opened(tmp_path / "a.txt")
    assert {name: len(text) for name, text in texts(corpus).items()} == {"train": 36, "valid": 2, "test": 2}
    assert list(corpus.splits) == ["train", "valid", "test"]
    assert corpus.name == "a" and corpus.source == str(tmp_path / "a.txt")
    assert corpus.notes == ("1 file, 40 characters", "split by position 0.9,0.05,0.05")


def test_two_fractions_give_no_test_split(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789", encoding="utf-8")
    assert texts(opened(tmp_path / "a.txt", split_fractions="0.8,0.2")) == {"train": "01234567", "valid": "89"}


def test_line_ends_are_kept_and_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert "".join(texts(opened(tmp_path / "a.txt", split_fractions=(0.5, 0.5))).values()) == "a\r\nb\rc\n"


@pytest.mark.parametrize(
    "content", ["a\nbb\nccc\n" * 9, "no newline but words " * 5, "日本語" * 20, "x" * 50 + "é" * 9]
)
def test_chunks_are_the_text_and_each_split_starts_where_the_last_ended(tmp_path, small_chunks, content):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    corpus = opened(tmp_path / "a.txt", split_fractions=(0.5, 0.25, 0.25), split_at="character")
    for _ in range(2):  # reading again, now by seeking, gives the same
        assert "".join(texts(corpus).values()) == content
    cut = len(content) // 2
    assert texts(corpus)["train"] == content[:cut]
    for name, split in corpus.splits.items():
        assert split.blocks is not None
        assert b"".join(split.blocks()).decode() == texts(corpus)[name]
        assert all(len(block) <= 28 for block in split.blocks())


def test_chunks_are_cut_after_a_newline_where_there_is_one(tmp_path, small_chunks):
    content = "ab\ncd\nefghij klmnopqrstu\nvwx"
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    text = text_module.FileText(tmp_path / "a.txt")
    expected = ["ab\ncd\n", "efghij ", "klmnopqrstu\n", "vwx"]
    assert list(text.chunks()) == list(text_module.regroup([content])) == expected
    assert list(text.chunks(2)) == ["klmnopqrstu\n", "vwx"]


@pytest.mark.parametrize(
    ("content", "chunks"),
    [
        ("ab\u3000cdef\u3000g", ["ab\u3000", "cdef\u3000", "g"]),  # an ideographic space has three bytes
        ("abcd\tefghi\x85klm", ["abcd\t", "efghi\x85", "klm"]),
        ("abcdef\r\nghijkl", ["abcdef\r\n", "ghijkl"]),  # the two characters of a line end stay together
        ("x" * 60, ["x" * 28, "x" * 28, "x" * 4]),
    ],
)
def test_no_chunk_ends_inside_a_word_that_is_shorter_than_the_bound(tmp_path, small_chunks, content, chunks):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
    assert list(text_module.FileText(tmp_path / "a.txt").chunks()) == chunks
    assert "".join(text_module.regroup(content)) == content
    assert all(chunk[-1].isspace() for chunk in list(text_module.regroup(content))[:-1]) or "x" * 28 in content


@pytest.mark.parametrize(
    ("content", "fractions", "parts"),
    [
        ("one two three four five", (0.4, 0.6), ["one two three ", "four five"]),  # 9 characters end inside "three"
        ("one two three four five", (0.35, 0.65), ["one two ", "three four five"]),  # 8 end behind a space
        ("ab\u3000cdefgh\u3000ijklmn", (0.3, 0.7), ["ab\u3000cdefgh\u3000", "ijklmn"]),
        ("abc\r\ndefghij", (0.35, 0.65), ["abc\r\n", "defghij"]),  # 4 end between "\r" and "\n"
        ("abcdefghij", (0.35, 0.65), ["abc", "defghij"]),  # without white space at the character
        ("abcdefgh i j", (0.5, 0.25, 0.25), ["abcdef", "gh ", "i j"]),  # a cut that would empty a split stays
    ],
)
def test_a_cut_by_position_moves_forward_to_the_next_word(tmp_path, content, fractions, parts):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
    assert list(texts(opened(tmp_path / "a.txt", split_fractions=fractions)).values()) == parts
    exact = texts(opened(tmp_path / "a.txt", split_fractions=fractions, split_at="character"))
    assert len(exact["train"]) == int(len(content) * fractions[0])


def test_a_cut_does_not_search_further_than_a_thousand_characters(tmp_path):
    for reach, train in ((1000, 3000), (1001, 2000)):
        content = "x" * 2000 + "y" * (reach - 1) + " " + "z" * (3000 - reach)
        (tmp_path / "a.txt").write_text(content)
        assert len(texts(opened(tmp_path / "a.txt", split_fractions=(0.4, 0.6)))["train"]) == train


def test_reading_in_chunks_reports_progress_up_to_the_whole(tmp_path, small_chunks):
    (tmp_path / "a.txt").write_text("ab\n" * 20, encoding="utf-8")
    seen: list[tuple[str, int, int]] = []
    open_corpus(CorpusConfig(source=str(tmp_path / "a.txt")), progress=lambda *call: seen.append(call))
    assert len(seen) >= 3 and seen[-1] == ("reading", 60, 60)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


# -- encodings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (codecs.BOM_UTF16_LE + "é\r\nb 日本\n".encode("utf-16-le"), None),
        (codecs.BOM_UTF16_BE + "é\r\nb 日本\n".encode("utf-16-be"), None),
        (codecs.BOM_UTF32_LE + "é\r\nb 日本\n".encode("utf-32-le"), None),
        (codecs.BOM_UTF32_BE + "é\r\nb 日本\n".encode("utf-32-be"), None),
        ("é\r\nb 日本\n".encode("utf-8-sig"), None),
        # A byte-order mark says more than an option that holds for all files.
        ("é\r\nb 日本\n".encode("utf-8-sig"), "cp1252"),
        ("é\r\nb 日本\n".encode("gb18030"), "gb18030"),
        ("é\r\nb 日本\n".encode("utf-16-le"), "utf-16-le"),
        ("é\r\nb 日本\n".encode(), "UTF8"),
    ],
)
def test_text_is_the_same_in_every_encoding_by_every_way_in(tmp_path, monkeypatch, small_chunks, content, encoding):
    (tmp_path / "a.txt").write_bytes(content)
    give_stdin(monkeypatch, content)
    piped = "".join(open_text("-", encoding=encoding).chunks())
    give_stdin(monkeypatch, content)
    kept = texts(opened("-", encoding=encoding, split_fractions=(0.5, 0.5)))
    path = tmp_path / "a.txt"
    found = texts(opened(path, encoding=encoding, split_fractions=(0.5, 0.5)))
    assert kept == found and "".join(found.values()) == piped == "é\r\nb 日本\n"
    assert "".join(open_text(str(path), encoding=encoding).chunks()) == piped


def test_tables_are_read_in_an_encoding_too(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\ncafé\n“q”\n".encode("cp1252"))
    (tmp_path / "b.jsonl").write_bytes('{"text": "é"}\n{"text": "b"}\n'.encode("utf-16"))
    assert "".join(open_text(str(tmp_path / "a.csv"), encoding="cp1252").chunks()) == "café\n“q”"
    assert "".join(open_text(str(tmp_path / "b.jsonl")).chunks()) == "é\nb"


@pytest.mark.parametrize("name", ["nonsense", "base64", "undefined"])
def test_an_encoding_that_python_does_not_have_is_one_sentence(name):
    with pytest.raises(ConfigError, match=rf"^corpus\.encoding = '{name}': unknown text encoding"):
        validate(CorpusConfig, {"source": "a.txt", "encoding": name}, where="corpus")


# -- what is wrong with a file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"fine\nline two \xff\n", "is not UTF-8: byte 14 (line 2) is 0xff"),
        (b"\xef\xbb\xbfa\n\xe9t\xe9", "is not UTF-8: byte 5 (line 2) is 0xe9"),
        (b"caf\xe9 \x93a\x94", "is not UTF-8: byte 3 (line 1) is 0xe9. Name its encoding, such as --encoding cp1252"),
        (b"caf\xe9 \x81", "such as --encoding latin-1"),
        (b"\xff\xfeh\x00i\x00\x00\xdc", "is not utf-16-le: byte 6 (line 1) is 0x00"),
        ("some text".encode("utf-16-le"), "If it is text, name its encoding, such as --encoding utf-16-le"),
        (b"\xff\xfeh\x00\x00\x00i\x00", "looks like a binary file: byte 4 (line 1) is zero"),
        (b"good\nPK\x00\x03", "looks like a binary file: byte 7 (line 2) is zero"),
        (b"abc", "too short to split: of 3 characters none would be left for"),
    ],
)
def test_a_file_that_is_no_text_is_refused_naming_file_and_place(tmp_path, content, sentence):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(sentence)) as caught:
        opened(tmp_path / "a.txt")
    assert str(tmp_path / "a.txt") in str(caught.value)


def test_a_bad_byte_is_placed_rightly_in_a_later_chunk(tmp_path, small_chunks):
    (tmp_path / "a.txt").write_bytes(b"ab\ncd\nef\ngh\ni\xc3\n")
    with pytest.raises(CorpusError, match=r"byte 13 \(line 5\) is 0xc3"):
        opened(tmp_path / "a.txt")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path: Path, member: str | None) -> io.BytesIO:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text_module, "open_binary", refuse)
    with pytest.raises(CorpusError, match=r"a\.txt cannot be read: Permission denied"):
        opened(tmp_path / "a.txt")


def test_a_mistyped_path_or_name_is_answered_with_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "shakespeare.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=r"Did you mean 'shakespeare\.txt'"):
        opened("shakespear.txt")
    with pytest.raises(CorpusError, match="Did you mean 'tiny-shakespeare'"):
        opened("tiny-shakspeare")
    with pytest.raises(CorpusError, match="no file or folder"):
        opened("nowhere/at/all.txt")
    (tmp_path / "link.txt").symlink_to("gone.txt")
    for read in (opened, open_text):
        with pytest.raises(CorpusError, match=r"^link\.txt is a link to gone\.txt, which does not exist\.$"):
            read("link.txt")


# -- packed files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_a_packed_file_is_read_as_its_text(tmp_path, suffix, pack):
    with pack(tmp_path / f"a.txt{suffix}", "wb") as file:
        file.write(b"\xef\xbb\xbf" + b"0123456789" * 2)
    corpus = opened(tmp_path / f"a.txt{suffix}")
    assert texts(corpus) == {"train": "012345678901234567", "valid": "8", "test": "9"}
    assert corpus.name == "a"


def test_the_files_of_a_zip_are_joined_in_the_order_of_their_names_without_what_macos_adds(tmp_path, caplog):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inside.txt", "0123456789")
    assert texts(opened(tmp_path / "a.zip", split_fractions=(0.5, 0.5)))["train"] == "01234"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("two.txt", "2\n" * 5)
        archive.writestr("one.jsonl", '{"text": "first"}\n')
        archive.writestr("__MACOSX/._two.txt", b"\0\5")
        archive.writestr(".DS_Store", b"\0")
        archive.writestr("a.png", b"\x89PNG\0")
    corpus = opened(tmp_path / "b.zip", split_fractions=(0.5, 0.5))
    assert "".join(texts(corpus).values()) == "first\n" + "2\n" * 5
    assert corpus.notes[0] == "2 files, 16 characters"
    assert [r.message for r in caplog.records] == [f"{tmp_path / 'b.zip'}: 1 file is left out: 1 binary (a.png)."]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
def test_a_truncated_packed_file_is_called_damaged(tmp_path, suffix):
    content = bytes(range(97, 123)) * 1000
    path = tmp_path / f"a{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", content)
    else:
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorpusError, match=r"a\.\w+ is damaged and cannot be unpacked"):
        opened(path)


def test_a_codec_that_is_not_installed_is_named_with_the_line_that_brings_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    real = importlib.import_module

    def without(name: str) -> object:
        if name == "zstandard":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match="pip install zstandard"):
        opened(tmp_path / "a.txt.zst")


# -- folders and globs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("en_train.raw", "en_validation.raw", "en_test.raw"),
        ("training.txt", "dev.txt", "test.txt"),
        ("train.txt", "val.txt", "test.txt"),
    ],
)
def test_a_folder_with_split_files_is_read_as_its_splits(tmp_path, names, caplog):
    for content, name in zip(("a b\n", "c\n", "d\n"), names, strict=True):
        (tmp_path / name).write_text(content)
    (tmp_path / "README.md").write_text("not text to learn")
    (tmp_path / "test.py").write_text("code")
    corpus = opened(tmp_path)
    assert texts(corpus) == {"train": "a b\n", "valid": "c\n", "test": "d\n"}
    assert corpus.name == tmp_path.name and corpus.notes == ("3 files",)
    assert [r.message for r in caplog.records] == [
        f"{tmp_path}: 2 files are left out: 2 of no split (README.md, test.py)."
    ]
    (tmp_path / names[2]).unlink()
    assert list(opened(tmp_path).splits) == ["train", "valid"]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("train.txt", "test.txt"), "no validation split"),
        (("valid.txt", "other.txt"), "none for training"),
        (("train.txt", "wiki.train.tokens", "valid.txt"), "2 files for train: train.txt, wiki.train.tokens"),
        (("train.txt", "valid.txt", "dev.txt"), "2 files for valid: dev.txt, valid.txt"),
        (("a.csv", "b.csv"), "holds no text: none of its files can be read: 2 empty (a.csv, b.csv)"),
        ((), "holds no text: there is no file in it"),
    ],
)
def test_a_folder_whose_splits_are_unclear_is_refused_in_one_sentence_that_names_it(tmp_path, names, sentence):
    for name in names:
        (tmp_path / name).write_text("text\n")
    with pytest.raises(CorpusError, match=re.escape(sentence)) as caught:
        opened(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_empty_split_file_is_named_when_it_is_read(tmp_path):
    (tmp_path / "train.txt").write_text("text")
    (tmp_path / "valid.txt").write_text("")
    with pytest.raises(CorpusError, match=r"valid\.txt is empty"):
        texts(opened(tmp_path))


def test_a_folder_of_texts_is_one_text_in_the_order_of_names_with_a_newline_between(tmp_path, small_chunks):
    (tmp_path / "b.txt").write_text("second, longer than a chunk")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "the-test.txt").write_text("third\n")
    (tmp_path / ".hidden.txt").write_text("never")
    corpus = opened(tmp_path, split_fractions=(0.5, 0.5))
    assert "".join(texts(corpus).values()) == "first\nsecond, longer than a chunk\nthird\n"


def test_all_text_files_and_tables_of_a_folder_are_read_and_the_others_named(tmp_path, caplog):
    for number in range(39):
        (tmp_path / f"{number:02}.md").write_text(f"chapter {number:02}\n")
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "b.csv").write_text("n,text\n1,row one\n2,row two\n")
    (tmp_path / "c.json").write_text('{"name": "no column"}')
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\0")
    (tmp_path / "e.txt").write_bytes(b"")
    (tmp_path / "f.txt").write_bytes(b"caf\xe9")
    (tmp_path / "g.txt").symlink_to("gone")
    corpus = opened(tmp_path)
    expected = "".join(f"chapter {number:02}\n" for number in range(39)) + "text\nrow one\nrow two"
    assert "".join(texts(corpus).values()) == expected
    assert corpus.notes[0] == f"41 files, {len(expected)} characters"
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: 5 files are left out: 1 without column 'text' (c.json); 1 binary (d.png); 1 empty (e.txt); "
        "1 not UTF-8; --encoding cp1252 can read it (f.txt); 1 broken link (g.txt)."
    ]


def test_a_glob_takes_any_files_that_match(tmp_path):
    for name in ("b.md", "a.md", "c.txt"):
        (tmp_path / name).write_text(name + "\n")
    corpus = opened(tmp_path / "*.md", split_fractions=(0.5, 0.5))
    assert "".join(texts(corpus).values()) == "a.md\nb.md\n"
    assert corpus.name == tmp_path.name
    assert texts(opened(corpus.source, split_fractions=(0.5, 0.5))) == texts(corpus)
    with pytest.raises(CorpusError, match="No file matches"):
        opened(tmp_path / "*.rst")


def test_a_file_whose_name_has_glob_characters_is_a_file_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("0123456789" * 2)
    assert texts(opened(tmp_path / "a[1].txt"))["test"] == "9"


# -- stdin ----------------------------------------------------------------------------------------------


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_stdin_is_kept_under_its_hash_so_that_it_can_be_read_again(monkeypatch, cache):
    give_stdin(monkeypatch, b"0123456789" * 2)
    corpus = opened("-")
    assert corpus.name == "stdin"
    assert Path(corpus.source) == cache / "stdin" / f"{hashlib.sha256(b'0123456789' * 2).hexdigest()}.txt"
    assert texts(opened(corpus.source)) == texts(corpus)
    give_stdin(monkeypatch, b"0123456789" * 2)
    assert opened("-").source == corpus.source
    assert [path.name for path in (cache / "stdin").iterdir()] == [Path(corpus.source).name]


def test_empty_stdin_is_refused(monkeypatch):
    give_stdin(monkeypatch, b"")
    with pytest.raises(CorpusError, match="Standard input is empty"):
        opened("-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("content", [b"0123456789" * 2, b""])
def test_a_named_pipe_is_read_like_stdin_and_waited_for_with_a_notice(tmp_path, cache, monkeypatch, caplog, content):
    monkeypatch.setattr(sources_module, "WAIT_SECONDS", 0.01)
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        noticed.wait(5)
        (tmp_path / "pipe").write_bytes(content)

    noticed = threading.Event()
    monkeypatch.setattr(logging.getLogger("lm.corpora"), "filters", [lambda record: noticed.set() or True])
    writer = threading.Thread(target=write)
    writer.start()
    if content:
        corpus = opened(tmp_path / "pipe")
        assert texts(corpus)["test"] == "9"
        assert Path(corpus.source) == cache / "stdin" / f"{hashlib.sha256(content).hexdigest()}.txt"
    else:
        with pytest.raises(CorpusError, match=r"pipe is empty: there is no text to read\.$"):
            opened(tmp_path / "pipe")
    writer.join()
    assert [record.message for record in caplog.records] == [f"{tmp_path / 'pipe'}: waiting for text."]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
def test_what_a_shell_gives_for_a_process_is_read(cache):
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b"some text")
    try:
        assert "".join(open_text(f"/dev/fd/{reading}").chunks()) == "some text"
    finally:
        os.close(reading)
