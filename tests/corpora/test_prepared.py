"""Text as counted, hashed, cached tokens."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lm.config import CorpusConfig, Section
from lm.corpora import Corpus, Split, encode_text, load_prepared, load_prepared_or_prepare, open_corpus, prepare
from lm.corpora import encode as encode_module
from lm.corpora import prepared as prepared_module
from lm.corpora import text as text_module
from lm.corpora.cache import cache_folder, workplace
from lm.errors import CorpusError, UnknownSymbolError
from lm.registry import TOKENIZERS
from lm.tokenizers.base import Tokenizer

CHAR = Section(type="char")
WIDE_SPACES = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())


def trained(kind: str, text: str, **options: object) -> Tokenizer:
    cls = TOKENIZERS.resolve(kind)
    return cls.train([text], cls.Options(**options))  # type: ignore[arg-type]


def corpus_of(**texts: str) -> Corpus:
    """A corpus in memory, in pieces of three characters."""

    def split(name: str, text: str) -> Split:
        return Split(name, lambda: (text[start : start + 3] for start in range(0, len(text), 3)))

    return Corpus("small", "/small", {name: split(name, text) for name, text in texts.items()}, ("a fact",))


def counted(text: str, pieces: int) -> dict[str, int]:
    measure = encode_module.Measure()
    cuts = sorted(random.Random(len(text)).randint(0, len(text)) for _ in range(pieces))
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        measure.update(text[start:end].encode())
    counts = measure.counts()
    assert measure.sha256 == hashlib.sha256(text.encode()).hexdigest()
    names = ("characters", "bytes", "words", "lines", "lm_eval_words", "crlf_lines")
    return {name: getattr(counts, name) for name in names}


# -- counting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "a",
        " a",
        "a ",
        " a b ",
        "a b\nc\r\nd\n",
        "\r\n\r\r\n\n\r",
        "naïve “quotes”\u3000日本語\u00a0x\u2003\u2028y\u0085",
        WIDE_SPACES,
        "x".join(WIDE_SPACES),
        "¢€\u2010\u180e\u200b\u2060\ufeff\U0001f600 a",  # look like white space in some of their bytes, and are none
    ],
)
def test_counts_are_those_of_python_itself_wherever_the_pieces_are_cut(text):
    expected = {
        "characters": len(text),
        "bytes": len(text.encode()),
        "words": len(text.split()),
        "lines": text.count("\n"),
        "lm_eval_words": len(re.split(r"\s+", text)),
        "crlf_lines": text.count("\r\n"),
    }
    for pieces in range(6):
        assert counted(text, pieces) == expected


def test_counts_agree_with_python_on_random_text_of_every_width():
    draw = random.Random(7)
    alphabet = WIDE_SPACES + "abé日\U0001f600\u2019\u1681\u303f\n"
    for _ in range(200):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(1, 40)))
        got = counted(text, 3)
        assert (got["words"], got["lm_eval_words"]) == (len(text.split()), len(re.split(r"\s+", text))), repr(text)


# -- preparing ------------------------------------------------------------------------------------------


def test_ids_are_the_start_token_and_then_every_token_in_the_smallest_type():
    prepared = prepare(corpus_of(train="abba\n", valid="ab", test="b"), CHAR)
    # "\n" 0, "a" 1, "b" 2
    assert {name: split.ids.tolist() for name, split in prepared.splits.items()} == {
        "train": [0, 1, 2, 2, 1, 0],
        "valid": [0, 1, 2],
        "test": [0, 2],
    }
    assert prepared.splits["train"].ids.dtype == np.uint8
    assert isinstance(prepared.splits["train"].ids, np.memmap) and not prepared.splits["train"].ids.flags.writeable
    assert prepared.splits["train"].counts.tokens == 5
    assert prepared.splits["valid"].sha256 == hashlib.sha256(b"ab").hexdigest()
    assert (prepared.name, prepared.source, prepared.notes) == ("small", "/small", ("a fact",))
    hashes = "".join(f"{name} {hashlib.sha256(text).hexdigest()}\n" for name, text in
                     (("train", b"abba\n"), ("valid", b"ab"), ("test", b"b")))  # fmt: skip
    assert prepared.sha256 == hashlib.sha256(hashes.encode()).hexdigest()


@pytest.mark.parametrize(
    ("train", "newline"), [("a\r\nb\r\nc\n", "\r\n"), ("a\r\nb\n", "\n"), ("a\rb\n", "\n"), ("ab", "\n")]
)
def test_a_prepared_corpus_records_what_most_of_its_lines_end_with(train, newline):
    assert prepare(corpus_of(train=train, valid="a\r\n"), CHAR).newline == newline


def test_tokens_that_an_older_version_kept_are_read_without_the_count_of_line_ends(cache):
    key = prepare(corpus_of(train="abba\r\n", valid="ab"), CHAR).key
    path = cache / "tokens" / key / "meta.json"
    meta = json.loads(path.read_text())
    for split in meta["splits"].values():
        assert split["counts"].pop("crlf_lines") in (0, 1)
    path.write_text(json.dumps(meta))
    prepared = load_prepared(key)
    assert prepared is not None and prepared.newline == "\n"


def test_splits_of_equal_text_are_noted_and_said(caplog):
    prepared = prepare(corpus_of(train="abba\n", valid="abba\n", test="ab"), CHAR)
    assert prepared.notes == ("a fact", "valid is the same text as train")
    assert [record.message for record in caplog.records] == [
        "small: valid is the same text as train, so its loss says nothing about other text."
    ]


def test_words_between_wide_spaces_are_whole_in_a_text_of_several_chunks(tmp_path):
    words = [f"word{number % 500:03}" for number in range(180_000)]
    (tmp_path / "a.txt").write_text("\u3000".join(words), "utf-8")
    corpus = open_corpus(CorpusConfig(source=str(tmp_path / "a.txt")))
    assert sum(1 for _ in corpus.splits["train"].chunks()) > 2
    prepared = prepare(corpus, Section(type="word"))
    assert prepared.tokenizer.vocab_size == 502
    assert [split.counts.tokens for split in prepared.splits.values()] == [162_000, 9_000, 9_000]
    assert sum(split.counts.unknown_tokens for split in prepared.splits.values()) == 0


def test_wider_vocabularies_take_two_bytes_a_token():
    many = "".join(chr(0x4E00 + number) for number in range(300)) + "\n"
    prepared = prepare(corpus_of(train=many * 2, valid=many), CHAR)
    assert prepared.splits["train"].ids.dtype == np.uint16
    assert prepared.tokenizer.decode(prepared.splits["valid"].ids[1:]) == many


def test_the_tokenizer_is_trained_on_the_training_split_alone():
    prepared = prepare(corpus_of(train="aabb\n", valid="abcc"), CHAR)
    assert prepared.tokenizer.unknown_id is not None
    assert prepared.splits["valid"].counts.unknown_tokens == 2
    assert prepared.splits["train"].counts.unknown_tokens == 0


def test_unknown_symbols_are_one_notice_with_the_most_frequent_first(caplog):
    corpus = corpus_of(train="aabb\n", valid="xaxyx", test="y")
    for _ in range(2):  # the second comes from the cache, and is told the same
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lm.corpora"):
            prepare(corpus, CHAR)
        assert [record.message for record in caplog.records] == [
            "small: symbols outside the vocabulary were found 5 times and replaced by the unknown token: "
            "'x' (3×), 'y' (2×)."
        ]


def test_skipped_symbols_are_no_tokens_but_stay_in_the_counts_of_the_text():
    prepared = prepare(corpus_of(train="ab\n", valid="axb"), Section(type="char", unknown="skip"))
    counts = prepared.splits["valid"].counts
    assert (counts.tokens, counts.unknown_tokens, counts.characters) == (2, 0, 3)


def test_the_policy_error_refuses_the_text():
    with pytest.raises(UnknownSymbolError, match="x"):
        prepare(corpus_of(train="ab\n", valid="axb"), Section(type="char", unknown="error"))


def test_a_file_gives_the_same_tokens_as_its_text_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", 64)
    text = "Wörter, words and 言葉\nof several lines\n" * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus(CorpusConfig(source=str(tmp_path / "a.txt"), split_fractions=(0.9, 0.1)))
    for kind in ("byte", "char"):
        tokenizer = trained(kind, text)
        prepared = prepare(corpus, tokenizer)
        cut = int(len(text) * 0.9)
        assert prepared.splits["train"].ids[1:].tolist() == tokenizer.encode(text[:cut]).tolist()
        assert prepared.splits["valid"].ids[1:].tolist() == tokenizer.encode(text[cut:]).tolist()
        assert prepared.splits["valid"].counts.bytes == len(text[cut:].encode())


def test_words_are_the_same_in_chunks_cut_after_newlines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", 64)
    text = " the cat sat \n \n = title = \n the end \n" * 20
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(text)
    tokenizer = trained("word", text)
    prepared = prepare(open_corpus(CorpusConfig(source=str(tmp_path))), tokenizer)
    assert prepared.splits["train"].ids[1:].tolist() == tokenizer.encode(text).tolist()
    assert prepared.splits["train"].counts.words == len(text.split())


def test_a_training_split_of_one_token_is_too_short(cache):
    with pytest.raises(CorpusError, match="train split of 1 characters gives 1 tokens"):
        prepare(corpus_of(train="a", valid="a"), CHAR)
    assert list((cache / "tokens").iterdir()) == []


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(CorpusError, match=r"U\+D800, half of a surrogate pair"):
        prepare(corpus_of(train="ab\ud800", valid="a"), CHAR)


def test_bad_utf8_in_a_split_file_is_refused_when_it_is_prepared(tmp_path, cache):
    (tmp_path / "train.txt").write_bytes(b"fine\nbad \xff\n")
    (tmp_path / "valid.txt").write_bytes(b"fine\n")
    with pytest.raises(CorpusError, match=r"train\.txt is not UTF-8: byte 9 \(line 2\)"):
        prepare(open_corpus(CorpusConfig(source=str(tmp_path))), CHAR)
    assert list(cache.rglob("*.bin")) == []


def test_progress_reaches_the_whole_in_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", 64)
    (tmp_path / "a.txt").write_text("0123456789\n" * 100)
    seen: dict[str, list[tuple[int, int]]] = {}
    corpus = open_corpus(CorpusConfig(source=str(tmp_path / "a.txt"), split_fractions=(0.5, 0.5)))
    prepare(corpus, CHAR, progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    assert {stage: calls[-1] for stage, calls in seen.items()} == {
        "reading": (1100, 1100),
        "training the tokenizer": (550, 550),
        "encoding": (1100, 1100),
        "comparing the splits": (550, 550),
    }
    assert all(len(calls) > 5 for calls in seen.values())


# -- the cache ------------------------------------------------------------------------------------------


def count_encodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    calls: Counter[str] = Counter()
    write = prepared_module._write
    monkeypatch.setattr(prepared_module, "_write", lambda *args: (calls.update(["write"]), write(*args))[1])
    return calls


def test_the_second_time_nothing_is_encoded(monkeypatch):
    calls = count_encodes(monkeypatch)
    corpus = corpus_of(train="abba\n", valid="ab")
    first, second = prepare(corpus, CHAR), prepare(corpus, CHAR)
    assert calls["write"] == 1
    assert second.key == first.key and second.splits["train"].ids.tolist() == first.splits["train"].ids.tolist()


def test_other_text_other_options_and_another_tokenizer_have_other_keys():
    corpus = corpus_of(train="abba\n", valid="ab")
    prepared = [
        prepare(corpus, CHAR),
        prepare(corpus, Section(type="char", unknown="skip")),
        prepare(corpus, Section(type="byte")),
        prepare(corpus_of(train="abba\n", valid="ba"), CHAR),
        prepare(corpus_of(train="abba\n", valid="ab", test="a"), CHAR),
        prepare(corpus, trained("char", "abc\n")),
        prepare(corpus, trained("char", "abcd\n")),
    ]
    assert len({each.key for each in prepared}) == len(prepared)


def test_prepared_tokens_are_found_again_by_key_without_the_text(monkeypatch):
    prepared = prepare(corpus_of(train="abba\n", valid="ab"), CHAR)
    found = load_prepared(prepared.key)
    assert found is not None
    assert found.splits["train"].ids.tolist() == [0, 1, 2, 2, 1, 0]
    assert (found.sha256, found.key, found.source) == (prepared.sha256, prepared.key, "/small")
    assert found.tokenizer.sha256 == prepared.tokenizer.sha256
    assert load_prepared("no such key") is None


def test_a_corpus_comes_from_the_first_key_of_its_tokenizer_or_is_prepared_again(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("abba " * 40)
    where = CorpusConfig(source=str(path))
    prepared = prepare(open_corpus(where), CHAR)
    sha256, tokenizer = prepared.tokenizer.sha256, prepared.tokenizer
    calls = count_encodes(monkeypatch)
    assert load_prepared_or_prepare(["gone", prepared.key], sha256).key == prepared.key
    assert load_prepared_or_prepare([prepared.key], "of another tokenizer") is None
    assert calls["write"] == 0
    again = load_prepared_or_prepare(["gone"], sha256, corpus=where, tokenizer=tokenizer)
    assert calls["write"] == 1 and (again.sha256, again.tokenizer.sha256) == (prepared.sha256, sha256)


def test_a_cache_folder_may_be_given(tmp_path, cache):
    prepared = prepare(corpus_of(train="abba\n", valid="ab"), CHAR, cache=tmp_path)
    assert sorted(path.name for path in (tmp_path / "tokens" / prepared.key).iterdir()) == [
        "leaks.json", "meta.json", "tokenizer.json", "train.bin", "valid.bin",
    ]  # fmt: skip
    assert load_prepared(prepared.key) is None and load_prepared(prepared.key, cache=tmp_path) is not None
    assert (tmp_path / "tokens" / prepared.key / "train.bin").read_bytes() == bytes([0, 1, 2, 2, 1, 0])


def truncate(folder: Path) -> None:
    os.truncate(folder / "train.bin", 3)


def drop(folder: Path) -> None:
    (folder / "valid.bin").unlink()


def spoil_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("{")


def exchange_tokenizer(folder: Path) -> None:
    trained("char", "xyz\n").save(folder / "tokenizer.json")


def raise_version(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))


@pytest.mark.parametrize("damage", [truncate, drop, spoil_meta, exchange_tokenizer, raise_version])
def test_a_damaged_folder_is_made_again(cache, monkeypatch, damage):
    corpus = corpus_of(train="abba\n", valid="ab")
    key = prepare(corpus, CHAR).key
    damage(cache / "tokens" / key)
    assert load_prepared(key) is None
    calls = count_encodes(monkeypatch)
    assert prepare(corpus, CHAR).splits["train"].ids.tolist() == [0, 1, 2, 2, 1, 0]
    assert calls["write"] == 1
    assert [path.name for path in (cache / "tokens").iterdir()] == [key]


def test_of_two_processes_that_prepare_at_once_the_first_one_is_kept(cache, monkeypatch):
    corpus = corpus_of(train="abba\n", valid="ab")
    write = prepared_module._write

    def slow(*args: object) -> None:
        monkeypatch.setattr(prepared_module, "_write", write)
        prepare(corpus, CHAR)  # the other process, which is done while this one is at work
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(prepared_module, "_write", slow)
    prepared = prepare(corpus, CHAR)
    assert prepared.splits["train"].ids.tolist() == [0, 1, 2, 2, 1, 0]
    assert [path.name for path in (cache / "tokens").iterdir()] == [prepared.key]


def test_a_kill_leaves_nothing_that_is_taken_for_whole_and_is_swept_up_later(cache, monkeypatch):
    corpus = corpus_of(train="abba\n", valid="ab")
    left = cache / "tokens" / ".building-killed"
    left.mkdir(parents=True)
    (left / "train.bin").write_bytes(b"\0")
    prepare(corpus, CHAR)
    assert left.exists()  # it may belong to a process at work
    os.utime(left, (0, 0))
    prepare(corpus, Section(type="byte"))
    assert not left.exists()


def test_a_process_at_work_keeps_its_folder_whatever_the_clock_says(cache):
    with workplace(cache / "tokens") as place:
        os.utime(place, (0, 0))
        with workplace(cache / "tokens"):
            assert place.exists()
    assert list((cache / "tokens").iterdir()) == []


def test_an_interruption_while_encoding_leaves_the_cache_empty(cache, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared_module, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_of(train="abba\n", valid="ab"), CHAR)
    assert list((cache / "tokens").iterdir()) == []


def test_a_full_disk_is_one_sentence(cache, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared_module, "sync", full)
    with pytest.raises(CorpusError, match="No space left on device. Make room there, or set INKLING_CACHE"):
        prepare(corpus_of(train="abba\n", valid="ab"), CHAR)
    assert list((cache / "tokens").iterdir()) == []


def test_text_that_changes_while_it_is_read_is_refused():
    texts = iter(["abba\n", "abba\n", "abba, and more\n"])
    changing = Split("train", lambda: iter([next(texts)]))
    corpus = Corpus("c", "/c", {"train": changing, "valid": Split("valid", lambda: iter(["ab"]))})
    with pytest.raises(CorpusError, match="/c changed while it was read"):
        prepare(corpus, CHAR)


# -- in memory ------------------------------------------------------------------------------------------


def test_a_text_is_encoded_in_memory_with_its_counts(caplog):
    tokenizer = trained("char", "ab \n")
    with caplog.at_level(logging.WARNING, "lm.corpora"):
        split = encode_text("new.txt", "a bé\n", tokenizer)
    assert split.ids.tolist() == [0, 2, 1, 3, 4, 0] and split.name == "new.txt"
    # The tokens do not say the two bytes of the é.
    assert split.counts == encode_module.Counts(5, 6, 2, 1, 3, 5, 1, spelling_nats=pytest.approx(2 * math.log(256)))
    assert split.sha256 == hashlib.sha256("a bé\n".encode()).hexdigest()
    (record,) = caplog.records
    assert "new.txt: symbols outside the vocabulary were found once" in record.message
    in_pieces = encode_text("new.txt", iter(["a ", "b", "é\n"]), tokenizer)
    assert in_pieces.ids.tolist() == split.ids.tolist() and in_pieces.counts == split.counts


@pytest.mark.parametrize(("kind", "valid", "known"), [("char", "ab", 0.0), ("char", "a?", None), ("word", "ab", None)])
def test_what_an_older_inkling_prepared_is_measured_where_the_text_is_available(kind, valid, known):
    corpus = corpus_of(train="a b a b\n", valid=valid)
    now = prepare(corpus, Section(type=kind))
    path = cache_folder() / "tokens" / now.key / "meta.json"
    meta = json.loads(path.read_text())
    for split in meta["splits"].values():
        del split["counts"]["spelling_nats"]
    path.write_text(json.dumps(meta))
    old = load_prepared(now.key)
    assert old is not None and old.splits["valid"].counts.spelling_nats == known
    again = prepare(corpus, Section(type=kind))
    assert again.splits["valid"].counts == now.splits["valid"].counts
    assert load_prepared(now.key).splits["valid"].counts.spelling_nats is not None


def test_an_empty_text_has_nothing_to_score():
    with pytest.raises(CorpusError, match=r"new\.txt is empty"):
        encode_text("new.txt", "", trained("char", "ab\n"))


# -- the real corpus --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wikitext_2_has_its_published_counts(real_data):
    corpus = open_corpus(CorpusConfig(source="wikitext-2"), data_dir=real_data)
    prepared = prepare(corpus, Section(type="word"))
    assert prepared.tokenizer.vocab_size == 33_278
    counts = {name: split.counts for name, split in prepared.splits.items()}
    assert {name: each.tokens for name, each in counts.items()} == {
        "train": 2_088_628,
        "valid": 217_646,
        "test": 245_569,
    }
    assert {name: each.lines for name, each in counts.items()} == {"train": 36_718, "valid": 3_760, "test": 4_358}
    assert counts["valid"].bytes == 1_121_681 and counts["valid"].words == 217_646 - 3_760
