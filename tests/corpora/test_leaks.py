"""Leaks between splits: planted ones are found, others are not claimed, and both ways out work."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lm.config import CorpusConfig, Section
from lm.corpora import Corpus, open_corpus, prepare
from lm.corpora import windows as windows_module
from lm.corpora.corpus import Split
from lm.corpora.leaks import Leak, cut_windows, find_leaks, joined_leaks, leak_notes, says_something
from lm.corpora.windows import WindowFinder, code_points
from lm.errors import CorpusError

CHAR = Section(type="char")


def prose(lines: int, seed: int) -> str:
    source = random.Random(seed)
    return "".join("".join(source.choices("abcdefghijklmnop é", k=70)) + "\n" for _ in range(lines))


def splits_of(**texts: str) -> dict[str, Split]:
    return {name: Split(name, lambda text=text: iter([text]), len(text)) for name, text in texts.items()}  # type: ignore[misc]


def opened(path: Path, **options: Any) -> Corpus:
    return open_corpus(CorpusConfig(source=str(path), **options))


def text_of(corpus: Corpus, split: str) -> str:
    return "".join(corpus.splits[split].chunks())


def lines_in(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


# -- windows ----------------------------------------------------------------------------------------------


def test_windows_are_found_where_a_search_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "_AT_ONCE", 32)
    source = random.Random(1)
    for _ in range(60):
        size = source.choice([2, 3, 5])
        text = "".join(source.choices("ab€", k=source.randint(0, 150)))
        wanted = cut_windows(code_points("".join(source.choices("ab€", k=80))), size)
        finder, codes = WindowFinder(wanted), code_points(text)
        while len(codes):
            step = source.randint(1, 70)
            finder.read(codes[:step])
            codes = codes[step:]
        assert finder.result().tolist() == ["".join(map(chr, row)) in text for row in wanted.tolist()]


def test_windows_with_equal_hashes_are_still_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    # Under the multiplier 1 a window and its permutations have one hash; the next multiplier separates them.
    monkeypatch.setattr(windows_module, "_MULTIPLIERS", (1, windows_module._MULTIPLIERS[0]))
    finder = WindowFinder(cut_windows(code_points("abcdbadc"), 4))
    finder.read(code_points("xxbadcxx"))
    assert finder.result().tolist() == [False, True]
    # A hit by chance in the other text is confirmed.
    monkeypatch.setattr(windows_module, "_MULTIPLIERS", (1,))
    finder = WindowFinder(cut_windows(code_points("abcd"), 4))
    finder.read(code_points("dcba"))
    assert finder.result().tolist() == [False]
    finder.read(code_points("abcd"))
    assert finder.result().tolist() == [True]


def test_rules_and_blanks_say_nothing() -> None:
    rows = [
        "-" * 50,
        " " * 20 + "-" * 30,
        "ab" * 25,
        "| " + "-" * 46 + " |",
        "acgt" * 12 + "ac",
        "ab cd ef gh " * 4 + "ij",
    ]
    kept = says_something(cut_windows(code_points("".join(rows)), 50))
    assert kept.tolist() == [False, False, False, False, True, True]


# -- leaks --------------------------------------------------------------------------------------------------


def test_the_share_of_a_planted_leak_is_exact() -> None:
    train, new = prose(200, seed=1), prose(200, seed=2)
    # 30 of 100 windows, from any place of the training text.
    valid = new[:2500] + train[777 : 777 + 1500] + new[2500:3500]
    leaks = find_leaks(splits_of(train=train, valid=valid, test=new[5000:7500]))
    assert leaks["valid"].share == 0.3 and leaks["valid"].windows == 100
    assert (leaks["test"].windows, leaks["test"].found, leaks["test"].examples, leaks["test"].near) == (50, 0, (), 0)
    assert len(leaks["valid"].examples) == 3 and all(each in train for each in leaks["valid"].examples)
    assert leaks["valid"].examples[0] == train[777 : 777 + 50]


def test_texts_without_a_window_have_no_leak_and_no_note() -> None:
    for valid in ("", "short", "x" * 500):
        leaks = find_leaks(splits_of(train="short" + "x" * 500, valid=valid))
        assert leaks["valid"] == Leak(0, 0) and [*leak_notes(leaks)] == []


def test_a_leak_is_warned_of_noted_and_computed_once(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, new = prose(90, seed=1), prose(3, seed=2)
    (tmp_path / "a.txt").write_text(train + train[:200] + new, "utf-8")
    corpus = opened(tmp_path / "a.txt", split_fractions=(0.93, 0.07))
    prepared = prepare(corpus, CHAR)
    assert "in train too: " in prepared.notes[-2] and "% of valid, in windows of 50 characters" in prepared.notes[-2]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("a: ") and "of valid also stands in the training text" in warning
    assert warning.count("', '") == 2 and "--dedupe" in warning and "--split-by" in warning
    stored = json.loads((cache / "tokens" / prepared.key / "leaks.json").read_text())
    assert stored["splits"]["valid"]["found"] >= 3
    monkeypatch.setattr("lm.corpora.leaks.find_leaks", None)
    caplog.clear()
    assert prepare(corpus, CHAR).notes == prepared.notes
    # The notes have it; the warning is given once.
    assert not caplog.records


def edited(text: str, every: int) -> str:
    """The text in lower case, in one line, with another word at each `every`-th place."""
    words = text.lower().split()
    return " ".join("changed" if place % every == every - 1 else word for place, word in enumerate(words))


def test_near_duplicates_are_found_through_other_lines_case_and_words() -> None:
    source = random.Random(3)
    words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 9))) for _ in range(3000)]
    lines = [" ".join(source.choices(words, k=12)).title() + ".\n" for _ in range(600)]
    train, new = "".join(lines[:400]), "".join(lines[400:])
    for every in (10_000, 27, 12):
        copy = edited(train[5000:15000], every)
        found = find_leaks(splits_of(train=train, valid=new[:10000] + copy, test=new[:10000]))
        leak, size = found["valid"], len(copy)
        assert leak.share < 0.01 and leak.near_share == pytest.approx(size / (size + 10000), abs=0.06)
        assert all(each in new[:10000] + copy for each in leak.near_examples)
        assert found["test"].near == 0


def test_a_near_duplicate_alone_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, new = prose(90, seed=1), prose(3, seed=2)
    (tmp_path / "a.txt").write_text(train + train[700:2800].upper().replace("\n", " ") + new, "utf-8")
    prepared = prepare(opened(tmp_path / "a.txt", split_fractions=(0.73, 0.27)), CHAR)
    assert prepared.notes[-1].startswith("in train with small changes: ")
    warning = caplog.records[-1].getMessage()
    assert "of valid stands in the training text with small changes" in warning and warning.count("', '") == 2


@pytest.mark.parametrize("content", ["", "[]", '{"version": 0}', '{"version": 1, "splits": {"valid": 3}}'])
def test_a_missing_or_damaged_result_is_computed_again(tmp_path: Path, cache: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(prose(30, seed=1), "utf-8")
    corpus = opened(tmp_path / "a.txt")
    prepared = prepare(corpus, CHAR)
    path = cache / "tokens" / prepared.key / "leaks.json"
    good = path.read_text()
    path.write_text(content)
    assert prepare(corpus, CHAR).notes == prepared.notes and path.read_text() == good
    path.unlink()
    assert prepare(corpus, CHAR).notes == prepared.notes and path.read_text() == good


def test_one_window_by_chance_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, new = prose(90, seed=1), prose(10, seed=2)
    (tmp_path / "a.txt").write_text(train + train[:60] + new, "utf-8")
    prepare(opened(tmp_path / "a.txt", split_fractions=(0.9, 0.1)), CHAR)
    assert not caplog.records


def test_named_corpora_raise_no_false_alarm(
    real_data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INKLING_DATA", str(real_data))
    leaks = find_leaks(open_corpus(CorpusConfig(source="tiny-shakespeare")).splits)
    assert leaks["valid"] == Leak(2230, 0, (), 527, 0, ())


def test_shards_are_joined_by_their_windows() -> None:
    joined = joined_leaks(
        [{"valid": Leak(90, 9, ("a",), 9, 2, ("c",))}, {"valid": Leak(10, 1, ("b",), 1, 1), "test": Leak(5, 0)}]
    )
    assert joined == {"valid": Leak(100, 10, ("a", "b"), 10, 3, ("c",)), "test": Leak(5, 0)}


# -- the ways out -------------------------------------------------------------------------------------------


def test_dedupe_leaves_copied_lines_out_of_held_out_splits_alone(tmp_path: Path) -> None:
    train, new = prose(90, seed=1), prose(10, seed=2)
    lines, own = train.splitlines(keepends=True), new.splitlines(keepends=True)
    # A line that is half new stays; one that is a copy apart from its ends goes.
    mixed = ["x" * 40 + lines[8][:30] + "\n", "# " + lines[9]]
    (tmp_path / "train.txt").write_text(train, "utf-8")
    (tmp_path / "valid.txt").write_text("".join([*own[:5], *lines[3:6], *mixed, *own[5:]]), "utf-8")
    corpus = opened(tmp_path, dedupe=True)
    assert text_of(corpus, "train") == train
    assert text_of(corpus, "valid") == "".join([*own[:5], mixed[0], *own[5:]])
    assert corpus.notes[-1] == "4 of 15 lines of valid left out as copies"
    assert find_leaks(corpus.splits)["valid"].found == 0


def test_dedupe_finds_copies_of_short_lines(tmp_path: Path) -> None:
    verse = "".join(f"{line[:20]}\n" for line in prose(30, seed=1).splitlines())
    (tmp_path / "train.txt").write_text(verse + prose(30, seed=3), "utf-8")
    (tmp_path / "valid.txt").write_text(prose(2, seed=2) + verse[210:420] + prose(2, seed=4), "utf-8")
    assert text_of(opened(tmp_path, dedupe=True), "valid") == prose(2, seed=2) + prose(2, seed=4)


def test_dedupe_of_a_split_without_new_lines_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(prose(9, seed=1), "utf-8")
    (tmp_path / "valid.txt").write_text(prose(2, seed=1), "utf-8")
    with pytest.raises(CorpusError, match="every line of valid stands in the training text"):
        opened(tmp_path, dedupe=True)


def test_equal_lines_are_in_one_split_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = prose(60, seed=1).splitlines(keepends=True)
    text = "\n\n" + "".join(lines * 2) + "\n\n" + lines[0].rstrip()
    (tmp_path / "a.txt").write_text(text, "utf-8")
    corpus = opened(tmp_path / "a.txt", split_by="line", split_fractions=(0.8, 0.1, 0.1))
    parts = {name: lines_in(text_of(corpus, name)) for name in corpus.splits}
    assert sorted(sum(parts.values(), [])) == sorted(lines_in(text))
    assert not set(parts["train"]) & set(parts["valid"]) and not set(parts["valid"]) & set(parts["test"])
    assert sum(len(text_of(corpus, name)) for name in parts) == len(text)
    assert len(text_of(corpus, "train")) == pytest.approx(0.8 * len(text), abs=300)
    assert all(leak.found == 0 for leak in find_leaks(corpus.splits).values())
    assert corpus.notes[-1] == "split by whole units 0.8,0.1,0.1 of 121 lines"
    # The order of the text does not matter.
    (tmp_path / "b.txt").write_text("".join(reversed(lines)), "utf-8")
    again = opened(tmp_path / "b.txt", split_by="line", split_fractions=(0.8, 0.1, 0.1))
    assert set(lines_in(text_of(again, "valid"))) == set(parts["valid"])


def test_parts_between_blank_lines_stay_whole_and_in_order(tmp_path: Path) -> None:
    parts = [f"stanza {number}\nof two lines\n\n" for number in range(40)]
    (tmp_path / "a.txt").write_text("".join(parts), "utf-8")
    corpus = opened(tmp_path / "a.txt", split_by="blank-line")
    for name in corpus.splits:
        text = text_of(corpus, name)
        mine = [part for part in parts if part in text]
        assert text == "".join(mine) and mine
    assert corpus.notes[-1].endswith("of 40 parts between blank lines")


def test_documents_are_files_or_rows(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    documents = [f"document {number}\n\nof several parts" for number in range(12)]
    for number, document in enumerate(documents):
        (tmp_path / "files" / f"{number:02}.txt").write_text(document, "utf-8")
    rows = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    opened_as = [
        opened(tmp_path / name, split_by="document", split_fractions=(0.7, 0.3)) for name in ("files", "rows.jsonl")
    ]
    for corpus in opened_as:
        train, valid = (text_of(corpus, name) for name in ("train", "valid"))
        assert sorted(document in train for document in documents) == sorted(
            document not in valid for document in documents
        )
        assert len(train + valid) == sum(len(document) + 1 for document in documents)
    assert text_of(opened_as[0], "valid") == text_of(opened_as[1], "valid")


@pytest.mark.parametrize("by", ["document", "line", "blank-line"])
def test_a_text_with_too_few_units_says_so(tmp_path: Path, by: str) -> None:
    (tmp_path / "a.txt").write_text("one line\n", "utf-8")
    with pytest.raises(CorpusError, match=r"has 1 different .*, and none would be left for valid"):
        opened(tmp_path / "a.txt", split_by=by)


def test_a_text_with_its_own_splits_is_not_split_again(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(prose(3, seed=1), "utf-8")
    with pytest.raises(CorpusError, match="has its own splits"):
        opened(tmp_path, split_by="line")
