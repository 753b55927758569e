"""Stop texts, across the borders of tokens."""

from __future__ import annotations

from lm.generation.stops import StopFinder


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
