"""The floor beside a report: what counting reaches on the same tokens."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lm.evaluation.floor as floor_module
from lm.config import CorpusConfig, Section
from lm.corpora import Counts, PreparedCorpus, TokenSplit, encode_text, open_corpus, prepare
from lm.corpora.cache import cache_folder
from lm.evaluation.floor import find_floor, floor_order, overlap
from lm.evaluation.report import Floor, make_report
from lm.evaluation.score_sums import Scores
from lm.models.kneser_ney import count_text

FACTS = {
    "run": "r", "state": "best", "step": 1, "corpus": "c", "split": "valid", "text_sha256": "0",
    "device": "cpu", "precision": "fp32", "version": "0",
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedCorpus:
    source = random.Random(str(tmp_path))  # another text each time: nothing is cached yet
    words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "den", "in fog")
    path = tmp_path / "words.txt"
    path.write_text("".join(" ".join(source.choice(words) for _ in range(8)) + ".\n" for _ in range(200)), "utf-8")
    return prepare(open_corpus(CorpusConfig(source=str(path))), Section(type="char"))


def test_the_floor_is_the_loss_of_the_counts_of_the_training_split(corpus: PreparedCorpus) -> None:
    train, valid = corpus.splits["train"], corpus.splits["valid"]
    found = find_floor(corpus, valid)
    counts = count_text(train.ids, order=7, vocab_size=corpus.tokenizer.vocab_size)
    assert found == Floor(
        -float(np.mean(counts.log_probabilities_of(valid.ids))),
        "7-gram counts of the training text, without a network",
    )


def test_short_tokens_are_counted_in_longer_runs() -> None:
    assert [floor_order(size) for size in (2, 257, 1000, 1001, 33_278)] == [7, 7, 7, 4, 4]


def test_a_text_is_counted_once(corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_floor(corpus, corpus.splits["valid"])
    monkeypatch.setattr(floor_module, "count_text", None)
    assert find_floor(corpus, corpus.splits["valid"]) == first


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1, "losses": 3}', '{"version": 0, "losses": {}}', "{"])
def test_a_damaged_cache_is_counted_again(corpus: PreparedCorpus, content: str) -> None:
    first = find_floor(corpus, corpus.splits["valid"])
    path = cache_folder() / "tokens" / corpus.key / "floor.json"
    assert path.is_file()
    path.write_text(content, "utf-8")
    assert find_floor(corpus, corpus.splits["valid"]) == first


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(corpus: PreparedCorpus) -> None:
    first = find_floor(corpus, corpus.splits["valid"])
    tokens = {name: np.array(split.ids) for name, split in corpus.splits.items()}
    shutil.rmtree(cache_folder() / "tokens" / corpus.key)
    assert find_floor(corpus, corpus.splits["valid"]) == first
    assert tokens["train"].size > 0 and not (cache_folder() / "tokens" / corpus.key).exists()


def mixed(corpus: PreparedCorpus, parts: int, read: int) -> TokenSplit:
    """A text of so many parts of 500 characters, of which some stand in the training text."""
    known = text_of(corpus)
    source = random.Random(3)
    new = ["".join(source.choices(sorted(set(known)), k=500)) for _ in range(parts - read)]
    return encode_text("mine", "".join([known[700 * n : 700 * n + 500] for n in range(read)] + new), corpus.tokenizer)


def test_a_text_that_the_counts_have_read_has_no_floor(corpus: PreparedCorpus) -> None:
    assert find_floor(corpus, corpus.splits["train"]) == Floor(None, None, 1.0)
    for own in (corpus, words_of(corpus)):
        found = find_floor(own, encode_text("mine", text_of(corpus)[300:5000], own.tokenizer))
        # A word may be cut at an end.
        assert (found.loss, found.sentence) == (None, None) and found.overlap > 0.9
        assert find_floor(own, own.splits["valid"]).overlap == 0


@pytest.mark.parametrize(("read", "share"), [(0, 0.0), (5, 0.5), (10, 1.0)])
def test_the_share_that_stands_in_the_training_text_is_found(corpus: PreparedCorpus, read: int, share: float) -> None:
    # Each part has 10 whole windows.
    assert overlap(corpus, mixed(corpus, 10, read)) == pytest.approx(share, abs=0.01)


def test_tokens_of_two_bytes_are_found_where_they_begin(tmp_path: Path) -> None:
    def of(ids: list[int]) -> TokenSplit:
        return TokenSplit("t", np.array([0, *ids], np.uint16), Counts(100, 0, 0, 0, 0, len(ids), 0), "")

    tokenizer = SimpleNamespace(unknown_id=None)
    # Shifted by a byte, the second text stands in the first: as other tokens.
    known = [number << 8 for number in range(1, 40)]
    corpus: Any = SimpleNamespace(splits={"train": of(known)}, tokenizer=tokenizer)
    assert overlap(corpus, of(known[5:20])) == 1
    assert overlap(corpus, of([*range(5, 20)])) == 0


def test_unknown_words_say_nothing_about_where_a_text_stands(corpus: PreparedCorpus) -> None:
    few = words_of(corpus, max_size=3)
    assert few.splits["valid"].counts.unknown_tokens > 0.5 * few.splits["valid"].counts.tokens
    assert find_floor(few, few.splits["valid"]).overlap == 0


def text_of(corpus: PreparedCorpus) -> str:
    return corpus.tokenizer.decode(corpus.splits["train"].ids[1:])


def words_of(corpus: PreparedCorpus, **options: object) -> PreparedCorpus:
    return prepare(open_corpus(CorpusConfig(source=corpus.source)), Section(type="word", **options))


def test_a_text_of_ones_own_has_a_floor_too(corpus: PreparedCorpus) -> None:
    # Longer than a window of the search for copies, and no text of the corpus.
    text = "a mat saw its den and one red hen ran in the fog by its cat.\n"
    found = find_floor(corpus, encode_text("mine", text, corpus.tokenizer))
    assert found is not None and found.loss is not None and 0 < found.loss < 3


def test_of_a_very_long_text_the_beginning_is_counted(corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor_module, "MAX_COUNTED", 500)
    found = find_floor(corpus, corpus.splits["valid"])
    assert found is not None and "of the first 500 tokens of the training text" in found.sentence


def report(corpus: PreparedCorpus, nats_per_token: float, floor: Floor | None) -> object:
    counts = corpus.splits["valid"].counts
    return make_report(Scores("all", counts.tokens, nats_per_token * counts.tokens), counts, floor, **FACTS)


def test_a_report_notes_a_leak_but_not_one_window_by_chance() -> None:
    scores = Scores("all", 1000, 1000.0)
    for share, notes in ((0.15, 1), (0.05, 0), (0.0, 0)):
        counts = Counts(1000, 1000, 200, 10, 200, 1000, 0, spelling_nats=0.0)
        made = make_report(scores, counts, Floor(None, None, share), **FACTS)
        sentence = f"{share:.1%} of this text also stands in the training text: its figures are too good."
        assert made.notes == (sentence,) * notes and not made.remembered


def test_a_report_says_when_counting_is_better(corpus: PreparedCorpus) -> None:
    floor = Floor(1.2, "2-gram counts of the training text, without a network")
    above, below, alone = (report(corpus, nats, given) for nats, given in ((1.3, floor), (1.1, floor), (1.3, None)))
    assert above.misses_floor and not below.misses_floor and not alone.misses_floor  # type: ignore[attr-defined]
    # A character is a byte here: 1.2 nats are 1.2 / ln 2 bits.
    bits = f"{1.2 / np.log(2):.4f} bits per byte, the model {1.3 / np.log(2):.4f}"
    assert above.notes == (  # type: ignore[attr-defined]
        "The model does not beat the floor: 2-gram counts of the training text, without a network, predict these "
        f"tokens better ({bits}).",
    )
    assert below.notes == alone.notes == ()  # type: ignore[attr-defined]
    # Where the text was read before, that is all there is to say.
    seen = report(corpus, 1.3, Floor(None, None, 0.93))
    assert seen.notes == (  # type: ignore[attr-defined]
        "About 93 % of this text is in the training text: the figures show how well it is memorised, not how well "
        "new text is predicted.",
    )
    assert report(corpus, 1.3, Floor(None, None, 0.03)).notes == ()  # type: ignore[attr-defined]
    assert alone.floor_loss is alone.floor_bits_per_byte is alone.floor is None  # type: ignore[attr-defined]
