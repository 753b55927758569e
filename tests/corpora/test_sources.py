"""What a source means, how its text is split, and the sentence for each thing that can be wrong."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import io
import lzma
import re
import zipfile
from pathlib import Path

import pytest

from lm.config import CorpusConfig
from lm.corpora import Corpus, open_corpus
from lm.corpora import text as text_module
from lm.corpora.corpus import boundaries
from lm.errors import CorpusError, MissingExtraError


def opened(source: Path | str, **options: object) -> Corpus:
    return open_corpus(CorpusConfig(source=str(source), **options))  # type: ignore[arg-type]


def texts(corpus: Corpus) -> dict[str, str]:
    return {name: "".join(split.chunks()) for name, split in corpus.splits.items()}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "CHUNK", 7)


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
    assert corpus.notes == ("split by position 0.9,0.05,0.05",)


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
    corpus = opened(tmp_path / "a.txt", split_fractions=(0.5, 0.25, 0.25))
    for _ in range(2):  # reading again, now by seeking, gives the same
        assert "".join(texts(corpus).values()) == content
    cut = len(content) // 2
    assert texts(corpus)["train"] == content[:cut]
    for name, split in corpus.splits.items():
        assert split.blocks is not None
        assert b"".join(split.blocks()).decode() == texts(corpus)[name]
        assert all(len(block) <= 7 for block in split.blocks())


def test_chunks_are_cut_after_a_newline_where_there_is_one(tmp_path, small_chunks):
    (tmp_path / "a.txt").write_text("ab\ncd\nefghij klmnopqrstu\nv", encoding="utf-8")
    text = text_module.FileText(tmp_path / "a.txt")
    assert list(text.chunks()) == ["ab\ncd\n", "efghij ", "klmnopq", "rstu\nv"]
    assert list(text.chunks(2)) == ["klmnopq", "rstu\nv"]


def test_reading_in_chunks_reports_progress_up_to_the_whole(tmp_path, small_chunks):
    (tmp_path / "a.txt").write_text("ab\n" * 20, encoding="utf-8")
    seen: list[tuple[str, int, int]] = []
    open_corpus(CorpusConfig(source=str(tmp_path / "a.txt")), progress=lambda *call: seen.append(call))
    assert len(seen) >= 3 and seen[-1] == ("reading", 60, 60)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


# -- what is wrong with a file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"fine\nline two \xff\n", "is not UTF-8: byte 14 (line 2) is 0xff"),
        (b"\xef\xbb\xbfa\n\xe9t\xe9", "is not UTF-8: byte 5 (line 2) is 0xe9"),
        (b"\xff\xfeh\x00i\x00", "UTF-16"),
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

    def refuse(path: Path) -> io.BytesIO:
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


# -- packed files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_a_packed_file_is_read_as_its_text(tmp_path, suffix, pack):
    with pack(tmp_path / f"a.txt{suffix}", "wb") as file:
        file.write(b"\xef\xbb\xbf" + b"0123456789" * 2)
    corpus = opened(tmp_path / f"a.txt{suffix}")
    assert texts(corpus) == {"train": "012345678901234567", "valid": "8", "test": "9"}
    assert corpus.name == "a"


def test_a_zip_of_one_file_is_read_and_one_of_two_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inside.txt", "0123456789")
    assert texts(opened(tmp_path / "a.zip", split_fractions=(0.5, 0.5)))["train"] == "01234"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("one.txt", "1")
        archive.writestr("two.txt", "2")
    with pytest.raises(CorpusError, match="exactly one file"):
        opened(tmp_path / "b.zip")


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
def test_a_folder_with_split_files_is_read_as_its_splits(tmp_path, names):
    for content, name in zip(("a b\n", "c\n", "d\n"), names, strict=True):
        (tmp_path / name).write_text(content)
    (tmp_path / "README.md").write_text("not text to learn")
    corpus = opened(tmp_path)
    assert texts(corpus) == {"train": "a b\n", "valid": "c\n", "test": "d\n"}
    assert corpus.name == tmp_path.name and corpus.notes == ()
    (tmp_path / names[2]).unlink()
    assert list(opened(tmp_path).splits) == ["train", "valid"]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("train.txt", "test.txt"), "no validation split"),
        (("valid.txt", "other.txt"), "none for training"),
        (("train.txt", "wiki.train.tokens", "valid.txt"), "2 files for train: train.txt, wiki.train.tokens"),
        (("train.txt", "valid.txt", "dev.txt"), "2 files for valid: dev.txt, valid.txt"),
        (("notes.md",), "holds no text"),
        (("a.txt", "b.csv"), "holds both text files"),
        ((), "holds no text"),
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
