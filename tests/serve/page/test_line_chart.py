"""Line charts as HTML."""

from __future__ import annotations

import re

import pytest

from lm.html_parts.line_chart import MAX_DOTS, Line, _ticks, line_chart_html


def draw(*lines: Line, **settings: float) -> str:
    return line_chart_html(lines, x_title="step", y_title="loss", **settings)


def test_points_have_the_positions_of_their_numbers():
    # The plot is 1000 by 1000, its top a twentieth above the highest point: 3.1, and its bottom 0.9.
    html = draw(Line("a", [(0, 3.0), (50, 1.0)]), x_end=100)
    assert 'd="M0.0 45.5L500.0 954.5"' in html
    # Without x_end the last point is at the right edge.
    assert 'L1000.0 954.5"' in draw(Line("a", [(0, 3.0), (50, 1.0)]))


def test_a_line_without_points_is_in_the_legend_and_a_chart_without_points_is_empty():
    assert draw() == draw(Line("a", [])) == ""
    html = draw(Line("a", [(1, 1)]), Line("b", []))
    assert html.count("<li>") == 2 and 'class="line"' not in html and html.count('class="dot"') == 1


def test_few_points_are_marked_with_their_values_and_many_are_a_line():
    assert "<title>a, step 2: 1.5000</title>" in draw(Line("a", [(1, 2), (2, 1.5)]))
    html = draw(Line("a", [(number, 1.0) for number in range(MAX_DOTS + 1)]))
    assert 'class="line"' in html and 'class="dot"' not in html


def test_a_name_with_markup_is_text():
    html = draw(Line("<script>x</script>${1}'\"", [(1, 1)]))
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
