"""Runs that differ by their seed alone are one candidate."""

from __future__ import annotations

import pytest

from lm.comparison.seeds import configuration, group_name, grouped, seed_margin, spread
from lm.config import RunConfig, compose

RECORD = {"corpus": {"sha256": "1"}}


def config(seed: int, rate: float = 0.01) -> RunConfig:
    return compose("x.txt", preset="gru-char", overrides={"training.seed": seed, "training.learning_rate": rate})


def test_the_seed_and_the_path_of_the_text_do_not_make_another_configuration() -> None:
    first = configuration(config(1), RECORD, "best")
    assert configuration(config(2), RECORD, "best") == first
    assert configuration(config(1, rate=0.02), RECORD, "best") != first
    assert configuration(config(1), {"corpus": {"sha256": "2"}}, "best") != first
    assert configuration(config(1), RECORD, "last") != first
    assert configuration(config(1), {**RECORD, "init": "base@best"}, "best") != first


def test_runs_of_one_configuration_are_grouped_unless_that_is_all() -> None:
    assert grouped(["x", "y", "x"]) == [[0, 2], [1]]
    assert grouped(["x", "x"]) == [[0], [1]]


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["gru-s1", "gru-s2"], "gru (2 seeds)"),
        (["gru-seed10", "gru-seed11"], "gru (2 seeds)"),
        (["glass-1", "glass-2", "glass-3"], "glass (3 seeds)"),
        (["one", "two"], "one (2 seeds)"),
        (["alone"], "alone"),
    ],
)
def test_a_group_is_named_by_what_its_runs_have_in_common(names: list[str], name: str) -> None:
    assert group_name(names) == name


def test_the_margin_across_seeds_is_that_of_welch() -> None:
    # Variances 0.01 and 0.01 of two seeds each: standard error 0.1, two degrees of freedom.
    error, margin = seed_margin([1.0, 1.0 + 0.02**0.5], [2.0, 2.0 + 0.02**0.5]) or (0, 0)
    assert error == pytest.approx(0.1) and margin == pytest.approx(0.4303)
    assert seed_margin([1.0], [2.0]) is None
    assert (
        spread([1.0]) is None and spread([1.0, None]) is None and spread([1.0, 1.2]) == pytest.approx(0.1414, abs=1e-4)
    )
