"""The options that a sweep varies: their values, and the configurations of a search."""

from __future__ import annotations

import math

import pytest

from lm.errors import ConfigError
from lm.jobs.sweep_axes import Axis, draw, grid, label, parse_axes, parse_over


def test_values_stand_between_commas_outside_brackets() -> None:
    axes = parse_axes(
        {"preset": "gru-char, lstm-char", "model.table_orders": "[2,3],[]", "training.grad_clip": "none,1"}
    )
    assert axes == [
        Axis("preset", ("gru-char", "lstm-char")), Axis("model.table_orders", ([2, 3], [])),
        Axis("training.grad_clip", (None, 1)),
    ]  # fmt: skip


def test_a_value_that_comes_twice_counts_once() -> None:
    assert parse_axes({"training.learning_rate": "1e-3,0.001"}) == [Axis("training.learning_rate", (0.001,))]


def test_a_grid_has_all_combinations_and_the_last_axis_varies_first() -> None:
    axes = parse_axes({"preset": ["a", "b"], "training.batch_size": [1, 2]})
    assert [label(values) for values in grid(axes)] == [
        "a, batch_size=1", "a, batch_size=2", "b, batch_size=1", "b, batch_size=2",
    ]  # fmt: skip


def test_a_range_is_logarithmic_and_each_stratum_has_one_value() -> None:
    axes = parse_axes({"training.learning_rate": "1e-3..1e-1", "preset": "a,b"})
    assert axes[0].at(0.0) == 0.001 and axes[0].at(0.5) == 0.01 and axes[0].at(1.0) == 0.1
    drawn = draw(axes, 10, seed=1)
    shares = sorted(math.log10(values["training.learning_rate"] / 1e-3) / 2 for values in drawn)
    assert [int(share * 10 + 0.01) for share in shares] == list(range(10))
    assert [values["preset"] for values in drawn].count("a") == 5
    assert draw(axes, 10, seed=1) == drawn != draw(axes, 10, seed=2)


def test_a_range_from_0_is_linear_and_one_of_an_integer_option_has_whole_numbers() -> None:
    axes = parse_axes({"model.dropout": "0..0.5", "model.hidden_size": "64..256"})
    assert axes[0].at(0.5) == 0.25
    assert axes[1].at(0.5) == 128 and all(isinstance(each["model.hidden_size"], int) for each in draw(axes, 5, 1))


def test_random_search_over_lists_draws_from_the_grid_without_repeats() -> None:
    axes = parse_axes({"preset": "a,b,c", "training.batch_size": "1,2"})
    drawn = draw(axes, 4, seed=3)
    assert len(drawn) == 4 and all(drawn.count(each) == 1 and each in grid(axes) for each in drawn)
    assert len(draw(axes, 100, seed=3)) == 6


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"learning_rat": "1"}, "Did you mean 'training.learning_rate' or 'training.learning_rate_floor'"),
        ({"hidden_size": "1"}, r"Did you mean 'model\.hidden_size'"),
        ({"optim.lr": "1"}, "there is no such option"),
        ({"training.seed": "1,2"}, "a sweep does not vary it .--seeds sets it"),
        ({"corpus.split_at": "word"}, "need the same text"),
        ({"training.learning_rate": "1..high"}, "a range is two numbers"),
        ({"training.learning_rate": "2..1"}, "the lower one first"),
        ({"training.batch_size": "1..2.5"}, "takes whole numbers"),
        ({"training.batch_size": []}, "at least one value"),
    ],
)
def test_what_cannot_vary_is_a_sentence(over: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_axes(over)


def test_what_is_not_name_and_values_is_a_sentence() -> None:
    for entries, sentence in ((["preset"], "write NAME=VALUE,VALUE"), (["a=1", "a=2"], "is given twice")):
        with pytest.raises(ConfigError, match=sentence):
            parse_over(entries)
    with pytest.raises(ConfigError, match="is a range: add --random N"):
        grid(parse_axes({"training.learning_rate": "1..2"}))
