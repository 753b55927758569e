"""Curves drawn as HTML."""

from __future__ import annotations

import re

import pytest

from serve.page.curves import MOST_DOTS, Curve, _ticks, curves_html


def draw(*curves: Curve, **settings: float) -> str:
    return curves_html(curves, x_title="step", y_title="loss", **settings)


def test_points_lie_where_their_numbers_say():
    # The plot is 1000 by 1000, its top a twentieth above the highest point: 3.1, and its bottom 0.9.
    html = draw(Curve("a", [(0, 3.0), (50, 1.0)]), x_most=100)
    assert 'd="M0.0 45.5L500.0 954.5"' in html
    # Without x_most the last point lies at the right edge.
    assert 'L1000.0 954.5"' in draw(Curve("a", [(0, 3.0), (50, 1.0)]))


def test_a_curve_without_points_is_in_the_legend_and_no_curve_at_all_is_nothing():
    assert draw() == draw(Curve("a", [])) == ""
    html = draw(Curve("a", [(1, 1)]), Curve("b", []))
    assert html.count("<li>") == 2 and 'class="line"' not in html and html.count('class="dot"') == 1


def test_few_points_are_marked_with_their_values_and_many_are_a_line():
    assert "<title>a, step 2: 1.5000</title>" in draw(Curve("a", [(1, 2), (2, 1.5)]))
    html = draw(Curve("a", [(number, 1.0) for number in range(MOST_DOTS + 1)]))
    assert 'class="line"' in html and 'class="dot"' not in html


def test_a_name_is_text_whatever_it_is():
    html = draw(Curve("<script>x</script>${1}'\"", [(1, 1)]))
    assert "<script" not in html and "${" not in html and "&lt;script&gt;" in html
    assert not re.search(r"[<=][^>]*['\"]\"", html.replace('""', ""))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 409, [0, 100, 200, 300, 400]),
        (1.6, 4.0, [2, 2.5, 3, 3.5, 4]),
        (0, 1e-9, [0, 2e-10, 4e-10, 6e-10, 8e-10, 1e-9]),
        (-0.05, 0.05, [-0.04, -0.02, 0, 0.02, 0.04]),
    ],
)
def test_ticks_are_few_and_round(low: float, high: float, expected: list[float]):
    assert _ticks(low, high) == expected
