"""The index finds every verbatim run, exactly, in characters."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from lm.copies import CopyIndex, figures_of

# One, two, three and four bytes; characters that share their first bytes; zero; half of a surrogate pair.
LETTERS = st.text(st.sampled_from("ab\n\0éêèß€😀😁\ud800"), max_size=30)


def runs_of(source: str, text: str) -> list[tuple[int, int]]:
    """The maximal runs by search at every position."""
    found, reached = [], 0
    for start in range(len(text)):
        length = 0
        while start + length < len(text) and text[start : start + length + 1] in source:
            length += 1
        if length and start + length > reached:
            found.append((start, length))
        reached = max(reached, start + length)
    return found


@given(source=LETTERS, text=LETTERS, again=st.booleans())
def test_runs_are_those_of_a_search_at_every_position(source: str, text: str, again: bool) -> None:
    text = text + source + text if again else text
    index = CopyIndex(source)
    copies = index.find(text)
    expected = runs_of(source, text)
    assert [(run.start, run.length) for run in copies.runs()] == expected
    around = [0] * len(text)
    for start, length in expected:
        around[start : start + length] = [max(each, length) for each in around[start : start + length]]
    assert copies.around.tolist() == around
    for run in copies.runs():
        begin = index.place(run.source).character
        assert source[begin : begin + run.length] == text[run.start : run.start + run.length]


def test_a_planted_copy_is_found_with_its_line_and_its_share() -> None:
    source = "Ein Vers.\nDie Stadt schläft noch, und über ihr steht der Mond.\nEnde.\n"
    line = "Die Stadt schläft noch, und über ihr steht der Mond."
    index = CopyIndex(source)
    copies = index.find(f"## {line} ##")
    assert (copies.longest.start, copies.longest.length) == (3, len(line))
    assert index.place(copies.longest.source) == (10, 2)
    assert copies.spans(50) == [(3, 3 + len(line))]
    assert copies.share(50) == len(line) / (len(line) + 6)
    assert copies.share(len(line) + 1) == 0
    assert index.find("Vers.\nDie Stadt").longest.length == 15


def test_a_match_ends_after_a_whole_character() -> None:
    # é and ê share their first byte, and 😀 and 😁 their first three.
    assert CopyIndex("caf\u00e9").find("caf\u00ea").longest.length == 3
    assert CopyIndex("😀").find("😁").longest.length == 0


def test_a_text_or_an_index_without_characters_has_no_copies() -> None:
    for source, text in (("", "abc"), ("abc", ""), ("", "")):
        copies = CopyIndex(source).find(text)
        assert copies.longest == (0, 0, 0) and copies.share(1) == 0 and copies.spans(1) == [] and copies.runs() == []
    assert CopyIndex("a").find("a").longest == (0, 1, 0)


def test_a_long_copy_is_one_run_also_where_the_text_repeats_itself() -> None:
    source = ("ab" * 500 + "c") * 40
    copies = CopyIndex(source).find(source[7:] + "d")
    assert copies.runs() == [(0, len(source) - 7, 7)]


def test_a_text_of_one_repeated_character_is_searched_in_seconds() -> None:
    index = CopyIndex("a" * 200_000)
    begun = time.process_time()
    # At each position the nearest suffix is the whole text; comparing all of them from their start takes a minute.
    copies = index.find("a" * 100_000 + "b" + "a" * 100)
    assert copies.runs() == [(0, 100_000, 0), (100_001, 100, 199_900)]
    assert time.process_time() - begun < 10


def test_figures_of_several_texts_are_weighted_by_their_lengths() -> None:
    index = CopyIndex("x" * 60)
    figures = figures_of([index.find("x" * 60 + "y" * 40), index.find("y" * 75 + "x" * 25)])
    assert (figures.texts, figures.characters, figures.longest) == (2, 200, 60)
    assert figures.shares == {20: 85 / 200, 50: 60 / 200}
    assert figures_of([]).shares == {20: 0, 50: 0}
