"""Corpora known by name: found, checked, downloaded from a local server, with every way that can fail."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lm.config import CorpusConfig, validate
from lm.corpora import Corpus, named, open_corpus
from lm.corpora.named import BUILTIN, NamedCorpus, NamedFile, PublishedHash
from lm.corpora.text import FileText
from lm.errors import ConfigError, CorpusError, DownloadError

TEXT = b"To be, or not to be\n" * 5
PARTS = {"train": b"a b c\n", "valid": b"d\n", "test": b"e\n"}


def opened(name: str, **options: object) -> Corpus:
    return open_corpus(CorpusConfig(source=name), **options)  # type: ignore[arg-type]


def texts(corpus: Corpus) -> dict[str, str]:
    return {name: "".join(split.chunks()) for name, split in corpus.splits.items()}


def sha256(content: bytes) -> PublishedHash:
    return PublishedHash("sha256", hashlib.sha256(content).hexdigest())


def archive() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened_archive:
        for name, content in PARTS.items():
            opened_archive.writestr(f"folder/wiki.{name}.tokens", content)
    return packed.getvalue()


class Server(BaseHTTPRequestHandler):
    """Answers with `contents`; paths below /broken/ promise more than they give."""

    contents: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = self.contents.get(self.path.removeprefix("/broken"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + 1000 * self.path.startswith("/broken")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Server, "contents", {"/text.txt": TEXT, "/parts.zip": archive(), "/not.zip": TEXT})
    monkeypatch.setattr(Server, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def know(
    monkeypatch: pytest.MonkeyPatch, *urls: str, known: PublishedHash | None = None, archive_sha256: str | None = None
):
    """Make "one" a corpus of one file and "parts" one of three, both at `urls`."""
    one = NamedCorpus(urls, archive_sha256, (NamedFile(None, "input.txt", (known or sha256(TEXT),)),), (0.9, 0.1))
    files = tuple(
        NamedFile(name, f"{name}.txt", (sha256(content),), (f"wiki.{name}.tokens",)) for name, content in PARTS.items()
    )
    parts = NamedCorpus(urls, archive_sha256, files)
    monkeypatch.setattr(named, "NAMED", {"one": one, "parts": parts})


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- the built-in corpus ------------------------------------------------------------------------------


def test_the_builtin_corpus_is_english_prose_that_needs_no_download():
    corpus = opened(BUILTIN)
    parts = texts(corpus)
    assert sum(map(len, parts.values())) > 400_000
    assert "statement" in parts["train"] and list(parts) == ["train", "valid", "test"]
    assert corpus.name == corpus.source == "pydoc-topics"
    assert corpus.notes[0].startswith("from Python 3.")


def test_the_builtin_corpus_takes_the_users_fractions():
    assert list(open_corpus(CorpusConfig(source=BUILTIN, split_fractions=(0.5, 0.5))).splits) == ["train", "valid"]


# -- looking it up --------------------------------------------------------------------------------------


def test_the_data_folder_comes_first_then_inkling_data_then_the_cache(tmp_path, monkeypatch, cache, url):
    know(monkeypatch, f"{url}/text.txt")
    places = [tmp_path / "given", tmp_path / "environment", cache / "corpora"]
    monkeypatch.setenv("INKLING_DATA", str(places[1]))
    for place in reversed(places):
        (place / "one").mkdir(parents=True)
        (place / "one" / "input.txt").write_bytes(TEXT)
        used: list[Path] = []
        monkeypatch.setattr(named, "FileText", lambda path, used=used: used.append(path) or FileText(path))
        opened("one", data_dir=places[0])
        assert used == [place / "one" / "input.txt"]
    assert Server.asked == []


def test_a_named_single_file_has_its_customary_split_unless_the_user_gives_another(tmp_path, monkeypatch):
    know(monkeypatch)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "input.txt").write_bytes(TEXT)
    corpus = opened("one", data_dir=tmp_path)
    assert {name: len(text) for name, text in texts(corpus).items()} == {"train": 90, "valid": 10}
    config = CorpusConfig(source="one", split_fractions=(0.5, 0.3, 0.2))
    parts = texts(open_corpus(config, data_dir=tmp_path))
    assert {name: len(text) for name, text in parts.items()} == {"train": 50, "valid": 30, "test": 20}


def test_files_under_their_published_names_are_accepted_too(tmp_path, monkeypatch):
    know(monkeypatch)
    (tmp_path / "parts").mkdir()
    for name, content in PARTS.items():
        (tmp_path / "parts" / f"wiki.{name}.tokens").write_bytes(content)
    assert texts(opened("parts", data_dir=tmp_path)) == {name: part.decode() for name, part in PARTS.items()}


def test_a_file_that_is_not_the_published_one_is_refused_and_named(tmp_path, monkeypatch):
    know(monkeypatch)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "input.txt").write_bytes(TEXT + b"!")
    with pytest.raises(CorpusError, match=r"one/input\.txt is not the published file"):
        opened("one", data_dir=tmp_path)


def test_a_name_means_the_corpus_and_a_path_with_a_separator_the_folder(tmp_path, monkeypatch):
    know(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "input.txt").write_bytes(TEXT)
    (tmp_path / "one" / "more.txt").write_bytes(TEXT)
    assert opened("one", data_dir=tmp_path).source == "one"
    assert sum(map(len, texts(opened("./one")).values())) == 200


def test_the_form_in_which_a_file_is_known_is_noted(tmp_path, monkeypatch):
    sha1 = PublishedHash("sha1", hashlib.sha1(TEXT).hexdigest(), "published order")
    know(monkeypatch, known=sha1)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "input.txt").write_bytes(TEXT)
    assert opened("one", data_dir=tmp_path).notes == (
        "published order",
        "1 file, 100 characters",
        "split by position 0.9,0.1",
    )


# -- downloading ----------------------------------------------------------------------------------------


def test_a_text_is_downloaded_once_and_then_read_from_the_cache(monkeypatch, cache, url):
    know(monkeypatch, f"{url}/text.txt")
    seen: list[tuple[str, int, int]] = []
    first = texts(opened("one", progress=lambda *call: seen.append(call)))
    assert "".join(first.values()).encode() == TEXT
    assert ("downloading", 100, 100) in seen
    assert texts(opened("one")) == first
    assert Server.asked == ["/text.txt"]
    assert files_below(cache) == ["corpora", "corpora/one", "corpora/one/input.txt"]


def test_an_archive_is_downloaded_checked_and_unpacked(monkeypatch, cache, url):
    know(monkeypatch, f"{url}/parts.zip", archive_sha256=hashlib.sha256(archive()).hexdigest())
    assert texts(opened("parts")) == {name: part.decode() for name, part in PARTS.items()}
    assert files_below(cache / "corpora" / "parts") == ["test.txt", "train.txt", "valid.txt"]


def test_the_next_address_is_tried_when_one_fails(monkeypatch, url):
    know(monkeypatch, f"{url}/gone.txt", f"{url}/broken/text.txt", f"{url}/text.txt")
    opened("one")
    assert Server.asked == ["/gone.txt", "/broken/text.txt", "/text.txt"]


@pytest.mark.parametrize(
    ("name", "path", "archive_sha256", "sentence"),
    [
        ("one", "/broken/text.txt", None, "the connection broke after 100 of 1,100 bytes"),
        ("parts", "/broken/parts.zip", None, "the connection broke after"),
        ("one", "/gone.txt", None, "Not Found"),
        ("parts", "/parts.zip", "0" * 64, "the download is not the published archive"),
        ("one", "/not.zip", None, "the archive is damaged"),
        ("one", "/parts.zip", None, "the archive lacks input.txt"),
    ],
)
def test_a_failed_download_says_why_and_leaves_nothing(monkeypatch, cache, url, name, path, archive_sha256, sentence):
    know(monkeypatch, url + path, archive_sha256=archive_sha256)
    with pytest.raises(DownloadError, match=sentence) as caught:
        opened(name)
    assert url in str(caught.value) and "INKLING_DATA" in str(caught.value)
    assert files_below(cache) == ["corpora"]


def test_a_download_with_the_wrong_checksum_is_refused_and_leaves_nothing(monkeypatch, cache, url):
    know(monkeypatch, f"{url}/text.txt", known=sha256(b"another text"))
    with pytest.raises(DownloadError, match="is not the published file"):
        opened("one")
    assert files_below(cache) == ["corpora"]


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch, cache):
    know(monkeypatch, "http://127.0.0.1:9/text.txt")
    with pytest.raises(DownloadError, match="one could not be downloaded"):
        opened("one")
    assert files_below(cache) == ["corpora"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, url):
    know(monkeypatch, f"{url}/text.txt")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "file"))
    with pytest.raises(CorpusError, match="Cannot write to the cache folder .* set INKLING_CACHE"):
        opened("one")


# -- what is known, against the real files where this machine has them --------------------------------------


def test_the_real_files_are_the_known_ones(real_data: Path):
    shakespeare = opened("tiny-shakespeare", data_dir=real_data)
    assert {name: len(text) for name, text in texts(shakespeare).items()} == {"train": 1_003_854, "valid": 111_540}
    wikitext = opened("wikitext-2", data_dir=real_data)
    assert list(wikitext.splits) == ["train", "valid", "test"]
    assert wikitext.notes in (("train: published order",), ("train: articles reordered",))


def test_every_known_hash_has_the_length_of_its_kind():
    for corpus in named.NAMED.values():
        for file in corpus.files:
            assert all(len(known.digest) == {"sha1": 40, "sha256": 64}[known.algorithm] for known in file.known)
        assert corpus.archive_sha256 is None or len(corpus.archive_sha256) == 64


def test_fractions_that_do_not_add_up_are_refused():
    with pytest.raises(ConfigError, match="add up to 1"):
        validate(CorpusConfig, {"source": "a.txt", "split_fractions": "0.9,0.2"})
    assert CorpusConfig(source="a.txt").split_fractions is None
