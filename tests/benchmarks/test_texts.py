"""Texts from packages: joined in order, cleaned, cut at a line end, checked. Packages here are made up: no network."""

import gzip
import hashlib
import re
from pathlib import Path

import pytest

from benchmarks.texts import TEXTS, Package, Text, TextError, arabic_paragraphs, build, fortunes, unpacked

PACKAGE = Package("debian", "tiny", "1:2.0")


def package(folder: Path, **files: bytes) -> Path:
    """An unpacked package with files under doc/."""
    root = folder / "packages" / PACKAGE.folder / "doc"
    root.mkdir(parents=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


def text(content: str = "", **parts) -> Text:
    facts = {"size": 20, "files": ("doc/*",), "sha256": hashlib.sha256(content.encode()).hexdigest(), **parts}
    return Text("tiny", "made up", "tune", packages=(PACKAGE,), **facts)


def test_files_are_joined_in_the_order_of_their_paths_and_cut_at_a_line_end(tmp_path):
    root = package(tmp_path, b=b"second\nthird\n", a=b"first", c=b"never reached\n")
    (root / "0").symlink_to("c")
    path = build(text("first\nsecond\nthird\n"), tmp_path)
    assert path == tmp_path / "tiny.txt"
    assert path.read_text() == "first\nsecond\nthird\n"


def test_compressed_files_line_ends_and_control_characters_become_plain_text(tmp_path):
    package(tmp_path, **{"a.gz": gzip.compress("\ufeffone\r\n\r\n\r\n \r\ntwo\x07\n".encode()), "b.dat": b"\xff"})
    made = build(text("one\n\ntwo\n", size=9, leave_out=("*.dat",)), tmp_path)
    assert made.read_bytes() == b"one\n\ntwo\n"


def test_the_start_is_left_out(tmp_path):
    package(tmp_path, a=b"head\nbody of the text\n")
    assert build(text("body of the text\n", size=17, start=5), tmp_path).read_text() == "body of the text\n"


def test_another_text_than_the_declared_one_is_refused(tmp_path):
    package(tmp_path, a=b"0123456789\n01234567\n")
    with pytest.raises(TextError, match=r"tiny.*sha256 [0-9a-f]{64}, declared is [0-9a-f]{64}"):
        build(text("something else"), tmp_path)
    assert not (tmp_path / "tiny.txt").exists()


def test_a_built_text_is_kept_and_a_changed_one_is_built_again(tmp_path):
    package(tmp_path, a=b"0123456789\n01234567\n")
    made = text("0123456789\n01234567\n")
    path = build(made, tmp_path)
    before = path.stat().st_mtime_ns
    assert build(made, tmp_path).stat().st_mtime_ns == before
    path.write_text("changed")
    assert build(made, tmp_path).read_text() == "0123456789\n01234567\n"


def test_a_text_that_is_too_short_or_no_utf8_is_named(tmp_path):
    root = package(tmp_path, a=b"short\n")
    with pytest.raises(TextError, match="tiny=1:2.0 gives 6 of 20 bytes"):
        build(text(), tmp_path)
    (root / "a").write_bytes(b"abc\xff")
    with pytest.raises(TextError, match="not UTF-8 at byte 3"):
        build(text(), tmp_path)


def test_a_package_that_cannot_be_had_gives_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TextError, match=r"^Package tiny=1:2.0 cannot be had \(apt-get is not installed\): .*\.$"):
        unpacked(PACKAGE, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())


def test_fortunes_lose_their_colours_and_separators():
    assert fortunes("\x1b[32mred\x1b[m rose\n%\n50 % off\n") == "red rose\n\n50 % off\n"


def test_only_paragraphs_with_arabic_letters_are_kept():
    page = "<head><title>كتاب</title></head><p>Only <b>English</b></p><p>نص\n عربي &amp; Latin</p><pre>كود</pre>"
    assert arabic_paragraphs(page) == "نص عربي & Latin\n"


def test_each_half_has_one_text_of_each_size():
    sizes = {half: [each.size for each in TEXTS.values() if each.half == half] for half in ("tune", "report")}
    assert sizes["tune"] == sizes["report"] == [5_000, 20_000, 100_000, 300_000, 1_000_000, 3_000_000, 12_000_000]
    assert all(re.fullmatch("[0-9a-f]{64}", each.sha256) for each in TEXTS.values())
