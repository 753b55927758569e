"""The result of a pair in one sentence."""

from __future__ import annotations

import pytest

from lm.comparison.bootstrap import Interval
from lm.comparison.sentences import difference_sentence


@pytest.mark.parametrize(
    ("bits", "span", "margin", "sentence"),
    [
        (-0.031, Interval(-0.037, -0.025), None,
         "B is better than A by 0.031 ± 0.006 bits per byte; that is not chance."),
        (0.031, Interval(0.025, 0.037), (0.001, 0.004),
         "A is better than B by 0.031 ± 0.006 bits per byte; that is not chance."),
        (0.002, Interval(-0.004, 0.008), None, "A and B differ by 0.002 ± 0.006 bits per byte; that may be chance."),
        (0.031, Interval(0.025, 0.037), (0.01, 0.04),
         "A is better than B by 0.031 ± 0.006 bits per byte on this text; but seeds alone make differences up to "
         "0.040."),
        (0.2, None, None,
         "A is better than B by 0.200 bits per byte on this text, which is too short for an interval."),
        (0.0, Interval(0.0, 0.0), None, "A and B are equal on this text."),
        (-0.00012, Interval(-0.00016, -0.00008), None,
         "B is better than A by 0.00012 ± 0.00004 bits per byte; that is not chance."),
    ],
)  # fmt: skip
def test_the_sentence_says_who_is_better_and_whether_it_is_chance(
    bits: float, span: Interval | None, margin: tuple[float, float] | None, sentence: str
) -> None:
    assert difference_sentence("A", "B", bits, span, margin, comparable=True) == sentence


def test_runs_that_are_not_comparable_get_no_conclusion() -> None:
    sentence = difference_sentence("A", "B", 0.2, Interval(0.1, 0.3), None, comparable=False)
    assert (
        sentence
        == "No conclusion, as the runs are not comparable; their figures differ by 0.200 ± 0.100 bits per byte."
    )
