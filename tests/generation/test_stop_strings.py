"""Stop texts, across the borders of tokens."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from lm.generation.stop_strings import StopFinder


def feed_all(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    finder = StopFinder(stops)
    given = []
    for piece in pieces:
        given.append(finder.feed(piece))
        if finder.found:
            return given, True
    return [*given, finder.end()], False


def test_stop_string_is_found_across_token_borders() -> None:
    given, found = feed_all(("END",), ["abE", "N", "Dxyz"])
    assert (given, found) == (["ab", "", ""], True)


def test_stop_string_is_found_when_its_prefix_repeats() -> None:
    given, found = feed_all(("aab",), ["a", "a", "a", "b", "c"])
    assert ("".join(given), found) == ("a", True)


def test_text_that_only_began_like_a_stop_string_is_given_back() -> None:
    given, found = feed_all(("END",), ["x", "EN", "."])
    assert ("".join(given), found) == ("xEN.", False)


def test_text_held_back_at_the_end_is_given() -> None:
    given, found = feed_all(("END",), ["xEN"])
    assert ("".join(given), found) == ("xEN", False)


def test_the_earliest_of_several_stops_wins() -> None:
    given, found = feed_all(("c", "ab"), ["xabc"])
    assert ("".join(given), found) == ("x", True)


LETTERS = st.text("ab", min_size=1, max_size=6)


@given(st.lists(LETTERS, min_size=1, max_size=6), st.lists(st.text("abc", max_size=5), max_size=12))
def test_a_text_is_cut_where_a_plain_search_of_each_stop_text_cuts_it(stops: list[str], pieces: list[str]) -> None:
    text, cut, held = "", None, 0
    expected = []
    for piece in pieces:
        text += piece
        if hits := [at for stop in stops if (at := text.find(stop)) >= 0]:
            cut = min(hits)
            break
        # What ends the text and begins a stop text is held back.
        starts = [size for size in range(1, len(text) + 1) for stop in stops if stop.startswith(text[-size:])]
        held = max(starts, default=0)
        expected.append(text[: len(text) - held])
    given_out, found = feed_all(tuple(stops), pieces)
    assert found == (cut is not None)
    assert "".join(given_out) == (text if cut is None else text[:cut])
    assert ["".join(given_out[: place + 1]) for place in range(len(expected))] == expected


def test_the_time_of_a_character_does_not_depend_on_the_number_and_beginnings_of_stop_texts() -> None:
    def seconds(stops: tuple[str, ...]) -> float:
        begun = time.thread_time()
        feed_all(stops, ["a"] * 20_000)
        return time.thread_time() - begun

    many = tuple("a" * 50 + f"{number:05}" for number in range(2000))
    feed_all(many, [])  # the automaton is made once
    one = min(seconds(("ab",)) for _ in range(3))
    assert min(seconds(many) for _ in range(3)) < 10 * one
