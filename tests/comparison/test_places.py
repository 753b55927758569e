"""Where two models differ: divisions of a text by hand, and passages."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lm.comparison.bootstrap import text_blocks
from lm.comparison.passages import LEAST, MOST, passage_bounds, passages
from lm.comparison.places import NONE, Division, divisions, places

TEXT = "ROMEO:\nThe café 12, said Rome\n"
TRAINING = Counter({"The": 20, "the": 300, "said": 1500, "ROMEO": 3})


def labelled(name: str, training: Counter[str] | None = TRAINING) -> list[tuple[str, str]]:
    """Each run of bytes with one label, with the name of its part."""
    division = next(each for each in divisions(TEXT, training) if each.name == name)
    data, labels = TEXT.encode("utf-8"), division.labels
    assert len(labels) == len(data)
    borders = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(data)]
    return [
        (data[begin:end].decode("utf-8"), "" if labels[begin] == NONE else division.parts[labels[begin]])
        for begin, end in zip(borders[:-1], borders[1:], strict=True)
    ]


def test_first_letters_later_letters_digits_punctuation_and_white_space() -> None:
    found = labelled("part of a word")
    assert found[:4] == [("R", "first letter"), ("OMEO", "later letters"), (":", "punctuation"), ("\n", "white space")]
    assert ("afé", "later letters") in found and ("12", "digits") in found


def test_words_by_their_frequency_in_training() -> None:
    words = [(text, part) for text, part in labelled("frequency in training") if part]
    assert words == [
        ("ROMEO", "1 to 9 times"), ("The", "10 to 99 times"), ("café", "never"), ("said", "1,000 times or more"),
        ("Rome", "never"),
    ]  # fmt: skip


def test_names_begin_upper_case_and_never_occur_in_lower_case() -> None:
    words = [(text, part) for text, part in labelled("names") if part]
    assert words == [("ROMEO", "seen in training"), ("Rome", "not seen in training")]


def test_first_words_and_ends_of_lines() -> None:
    assert labelled("place in the line") == [
        ("ROMEO:", "first word"), ("\n", "line end"), ("The", "first word"), (" café 12, said Rome", "the rest"),
        ("\n", "line end"),
    ]  # fmt: skip


def test_the_opening_then_quarters() -> None:
    division = divisions("x" * 8000, None)[-1]
    assert np.bincount(division.labels).tolist() == [1000, 1000, 2000, 2000, 2000]


def test_without_the_training_text_its_divisions_are_left_out() -> None:
    assert [each.name for each in divisions(TEXT, None)] == ["part of a word", "place in the line", "place in the text"]


def test_each_part_has_its_bytes_its_figures_and_an_interval() -> None:
    blocks = text_blocks(b"word and word\n" * 3000)
    labels = (np.arange(blocks.size) % 4 - 1).astype(np.int8)
    a, b = np.full(blocks.size, np.log(2)), np.full(blocks.size, np.log(2))
    b[labels == 0] *= 3
    divided = [Division("turn", ("first", "second", "third", "none"), labels)]
    found = [*places(divided, [a, b], a, b, blocks, widen=1.0, resamples=200, seed=1)]
    assert [(each.name, each.bytes, each.bits_per_byte) for each in found] == [
        ("first", 10500, (pytest.approx(1), pytest.approx(3))),
        ("second", 10500, (pytest.approx(1), pytest.approx(1))),
        ("third", 10500, (pytest.approx(1), pytest.approx(1))),
    ]
    assert found[0].difference == pytest.approx(2) and found[0].low == pytest.approx(2)
    assert found[1].high == 0.0


def test_passages_cover_the_text_and_have_a_readable_length() -> None:
    text = "short\n\n" * 50 + "a long line of words " * 60 + "\n" + "x" * 1000 + "\nend"
    bounds = passage_bounds(text)
    assert bounds[0][0] == 0 and bounds[-1][1] == len(text)
    assert all(end == begin for (_, end), (begin, _) in zip(bounds[:-1], bounds[1:], strict=True))
    sizes = [end - begin for begin, end in bounds]
    assert max(sizes) <= MOST and sum(size < LEAST // 2 for size in sizes) <= 2


def test_the_passages_are_those_on_which_each_side_wins_most() -> None:
    lines = [f"line {number:03} of a text with enough letters to be a passage of its own, and more of them\n"
             for number in range(40)]  # fmt: skip
    text = "".join(lines)
    a, b = np.ones(len(text)), np.ones(len(text))
    at = text.index("line 007")
    b[at : at + 8] += 2.0
    a[text.index("line 020") :][:4] += 1.0
    wins_a, wins_b = passages(text, a, b, ("A", "B"))
    assert [each.text for each in wins_a] == [lines[7]] and [each.text for each in wins_b] == [lines[20]]
    assert (wins_a[0].line, wins_a[0].begin, wins_a[0].winner) == (8, at, "A")
    assert wins_a[0].bits_b - wins_a[0].bits_a == pytest.approx(16 / np.log(2))
    assert wins_a[0].words[0].text == "line" and wins_a[0].words[0].bits == pytest.approx(8 / np.log(2))
    assert "".join(word.text for word in wins_a[0].words) == lines[7]


def test_a_passage_without_bytes_is_left_out() -> None:
    text, sizes = "漢" * MOST + "\n", np.array([3] * MOST + [0])
    assert passage_bounds(text) == [(0, MOST), (MOST, MOST + 1)]
    a = np.ones(3 * MOST)
    wins_a, wins_b = passages(text, a, a + 1, ("A", "B"), sizes=sizes)
    assert [each.bytes for each in wins_a] == [3 * MOST] and wins_b == []
    # After empty answers the lines are counted on.
    text, sizes = "\n" * 100 + text, np.append(np.zeros(100, np.int64), sizes)
    assert passages(text, a, a + 1, ("A", "B"), sizes=sizes)[0][0].line == 81
    assert passages("\n", np.empty(0), np.empty(0), ("A", "B"), sizes=np.array([0])) == ([], [])
