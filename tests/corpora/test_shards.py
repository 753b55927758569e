"""A text prepared in shards: the same tokens as in one go, made by jobs of their own, read as one corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lm.config import CorpusConfig, Section
from lm.corpora import Corpus, TokenSplit, open_corpus, prepare, shards
from lm.corpora.batches import make_batches
from lm.corpora.shards import JoinedIds, adopt_tokenizer, learn_tokenizer, prepare_shard
from lm.errors import CorpusError

CHAR = Section(type="char")


def lines(count: int, first: int = 0) -> str:
    return "".join(f"line {number} of a text, {number * number}\n" for number in range(first, first + count))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Five files of about 200 thousand characters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(lines(6000, number * 6000), "utf-8")
    return folder


def shards_of(source: Path | str, out: Path, count: int, *, valid_every: int = 3) -> Corpus:
    config = CorpusConfig(source=str(source))
    learn_tokenizer(config, out, CHAR, characters=300_000)
    # In any order, as jobs do.
    for number in reversed(range(count)):
        prepare_shard(config, out, number, count, valid_every=valid_every)
    return open_corpus(CorpusConfig(source=str(out)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_shards_hold_the_whole_text_once(texts: Path, tmp_path: Path, count: int) -> None:
    corpus = shards_of(texts, tmp_path / "out", count)
    whole = "".join(path.read_text("utf-8") for path in sorted(texts.iterdir()))
    parts = ["".join(corpus.splits[name].chunks()) for name in ("train", "valid")]
    assert sorted("".join(parts).splitlines()) == sorted(whole.splitlines())
    prepared = prepare(corpus, CHAR)
    assert prepared.splits["train"].counts.characters == len(parts[0])
    assert prepared.splits["valid"].counts.tokens == len(parts[1]) > 0
    assert f"prepared in {count} shards" in prepared.notes


def test_rows_of_one_table_are_dealt_out(tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": lines(400, 400 * row)}) + "\n" for row in range(40)), "utf-8")
    corpus = shards_of(table, tmp_path / "out", 3, valid_every=2)
    found = "".join("".join(split.chunks()) for split in corpus.splits.values())
    assert sorted(filter(None, found.splitlines())) == sorted(lines(16_000).splitlines())


@pytest.mark.parametrize(("kind", "text"), [("word", "one\ntwo three 日本 é\n" * 40), ("byte", "日本é\n" * 40)])
def test_the_text_of_shards_is_whole_wherever_its_tokens_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, text: str
) -> None:
    monkeypatch.setattr(shards, "PIECE", 100)
    (tmp_path / "a.txt").write_text(text, "utf-8")
    config, out = CorpusConfig(source=str(tmp_path / "a.txt")), tmp_path / "out"
    learn_tokenizer(config, out, Section(type=kind), characters=10_000)
    prepare_shard(config, out, 0, 1, valid_every=2)
    for size in (1, 7):
        monkeypatch.setattr(shards, "TOKENS_DECODED_AT_ONCE", size)
        assert "".join(
            "".join(split.chunks()) for split in open_corpus(CorpusConfig(source=str(out))).splits.values()
        ) == (text)


def test_what_a_shard_cannot_read_is_left_out_as_in_training(texts: Path, tmp_path: Path) -> None:
    before = "".join("".join(split.chunks()) for split in shards_of(texts, tmp_path / "one", 2).splits.values())
    (texts / "picture.png").write_bytes(b"\x89PNG\0")
    (texts / ".hidden").mkdir()
    (texts / ".hidden" / "a.txt").write_text("hidden")
    after = "".join("".join(split.chunks()) for split in shards_of(texts, tmp_path / "two", 2).splits.values())
    assert before == after


@pytest.mark.parametrize("kind", ["streams", "rotated", "random", "shuffled"])
def test_batches_of_shards_are_those_of_one_file(texts: Path, tmp_path: Path, kind: str) -> None:
    train = prepare(shards_of(texts, tmp_path / "out", 3), CHAR).splits["train"]
    assert isinstance(train.ids, JoinedIds)
    plain = TokenSplit("train", np.asarray(train.ids), train.counts, train.sha256)
    # Long enough rows that many of them cross from one file into the next.
    joined, one = (make_batches(kind, split, 4, 30_000, 1) for split in (train, plain))  # type: ignore[arg-type]
    for index in range(one.per_epoch + 1):
        np.testing.assert_array_equal(joined.batch(index).inputs, one.batch(index).inputs)
        np.testing.assert_array_equal(joined.batch(index).targets, one.batch(index).targets)


def test_joined_ids_keep_one_start_token() -> None:
    parts = [np.array([9, 1, 2], np.uint8), np.array([9], np.uint8), np.array([9, 3], np.uint8)]
    joined = JoinedIds(parts)
    assert len(joined) == 4
    assert np.asarray(joined).tolist() == [9, 1, 2, 3]
    assert joined[0] == 9 and joined[3] == 3
    assert joined[2:4].tolist() == [2, 3] and joined[1:1].tolist() == [] and joined[:-1].tolist() == [9, 1, 2]


def test_a_shard_that_is_there_is_not_made_again(texts: Path, tmp_path: Path) -> None:
    config, out = CorpusConfig(source=str(texts)), tmp_path / "out"
    learn_tokenizer(config, out, CHAR, characters=300_000)
    prepare_shard(config, out, 0, 2, valid_every=4)
    before = (out / "shard-00000-of-00002" / "train.bin").stat().st_mtime_ns
    prepare_shard(config, out, 0, 2, valid_every=4)
    assert (out / "shard-00000-of-00002" / "train.bin").stat().st_mtime_ns == before
    # What a killed job left half made is.
    (out / "shard-00000-of-00002" / "train.bin").write_bytes(b"")
    assert prepare_shard(config, out, 0, 2, valid_every=4).splits["train"].counts.tokens > 1000


def test_missing_shards_are_named(texts: Path, tmp_path: Path) -> None:
    config, out = CorpusConfig(source=str(texts)), tmp_path / "out"
    with pytest.raises(CorpusError, match=r"has no tokenizer.json yet, .*--tokenizer-only"):
        prepare_shard(config, out, 0, 3, valid_every=4)
    learn_tokenizer(config, out, CHAR, characters=300_000)
    prepare_shard(config, out, 1, 3, valid_every=4)
    with pytest.raises(CorpusError, match=r"lacks 2 of 3 shards.*shard-00000-of-00003, shard-00002-of-00003"):
        open_corpus(CorpusConfig(source=str(out)))
    prepare_shard(config, out, 1, 2, valid_every=4)
    with pytest.raises(CorpusError, match="mixes shards of 00002 and 00003"):
        open_corpus(CorpusConfig(source=str(out)))
    with pytest.raises(CorpusError, match="Shard 3 of 3: shards are numbered from 0 to 2"):
        prepare_shard(config, out, 3, 3, valid_every=4)
    with pytest.raises(CorpusError, match="has 5 files, fewer than 9 shards"):
        prepare_shard(config, out, 0, 9, valid_every=4)


def test_another_tokenizer_is_refused(texts: Path, tmp_path: Path) -> None:
    corpus = shards_of(texts, tmp_path / "out", 2)
    other = learn_tokenizer(CorpusConfig(source=str(texts)), tmp_path / "other", Section(type="byte"), characters=1000)
    with pytest.raises(CorpusError, match="prepared with another tokenizer than this run's"):
        prepare(corpus, other)
    with pytest.raises(CorpusError, match="already has shards of another tokenizer"):
        adopt_tokenizer(tmp_path / "out", other)


def test_no_text_held_out_is_said_when_it_is_opened(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="has no text for valid: .*--valid-every"):
        shards_of(texts, tmp_path / "out", 2, valid_every=10_000)
