"""Filters and the draw, on distributions small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm.config import validate
from lm.errors import ConfigError
from lm.generation.filters import apply_filters, apply_temperature, ban, draw, keep_top_k, keep_top_p, softmax
from lm.generation.options import SamplingOptions

# Probabilities 1/2, 1/4, 1/8, 1/8.
HALVES = np.log(np.array([[0.5, 0.25, 0.125, 0.125]]))


def test_softmax_of_log_probabilities_gives_them_back() -> None:
    assert softmax(HALVES)[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])


def test_temperature_two_takes_square_roots() -> None:
    roots = np.sqrt([0.5, 0.25, 0.125, 0.125])
    assert softmax(apply_temperature(HALVES, 2.0))[0].tolist() == pytest.approx((roots / roots.sum()).tolist())


def test_temperature_zero_keeps_the_first_of_the_likeliest() -> None:
    kept = apply_temperature(np.array([[1.0, 3.0, 3.0]]), 0.0)
    assert softmax(kept)[0].tolist() == [0, 1, 0]


def test_a_tiny_temperature_is_as_good_as_none() -> None:
    assert softmax(apply_temperature(np.array([[1.0, 3.0, 2.0]]), 1e-309))[0].tolist() == [0, 1, 0]


def test_top_k_keeps_k_and_the_lower_ids_among_equals() -> None:
    assert np.isfinite(keep_top_k(HALVES, 3))[0].tolist() == [True, True, True, False]
    assert softmax(keep_top_k(HALVES, 2))[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])


def test_top_k_beyond_the_vocabulary_changes_nothing() -> None:
    assert keep_top_k(HALVES, 9).tolist() == HALVES.tolist()


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_token_that_crosses_the_border(top_p: float, kept: int) -> None:
    assert np.isfinite(keep_top_p(HALVES, top_p)).sum() == kept


def test_top_p_keeps_one_token_when_that_token_alone_exceeds_p() -> None:
    assert np.isfinite(keep_top_p(np.log(np.array([[0.1, 0.9]])), 0.2))[0].tolist() == [False, True]


def test_a_banned_token_is_never_drawn() -> None:
    assert softmax(ban(HALVES, (0,)))[0].tolist() == pytest.approx([0, 0.5, 0.25, 0.25])


def test_filters_do_not_change_their_input() -> None:
    before = HALVES.copy()
    apply_filters(HALVES.astype(np.float32), SamplingOptions(temperature=0.5, top_k=2, top_p=0.9), banned=(1,))
    assert HALVES.tolist() == before.tolist()


def test_temperature_comes_before_top_p() -> None:
    # At temperature 1/2 the shares are 16 : 4 : 1 : 1, so that the first holds 8/11 > 0.7 by itself.
    kept = apply_filters(HALVES.astype(np.float32), SamplingOptions(temperature=0.5, top_p=0.7))
    assert np.isfinite(kept).sum() == 1


def test_draws_follow_the_distribution() -> None:
    drawn = [int(draw(HALVES, 7, 0, position)[0]) for position in range(4000)]
    counts = np.bincount(drawn, minlength=4) / 4000
    # Four standard deviations of a share of 1/2 over 4,000 draws are 0.032.
    assert counts.tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.032)


def test_a_draw_depends_on_seed_index_and_position_alone() -> None:
    uniform = np.zeros((1, 1000))
    assert draw(uniform, 7, 1, 5) == draw(uniform, 7, 1, 5)
    assert len({int(draw(uniform, *key)[0]) for key in [(7, 1, 5), (8, 1, 5), (7, 2, 5), (7, 1, 6)]}) == 4


def test_masked_tokens_are_never_drawn() -> None:
    masked = np.array([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    assert {int(draw(masked, seed, 0, 0)[0]) for seed in range(200)} == {1, 3}


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"max_tokens": 0}, {"stop": [""]}, {"tempreature": 1}]
)
def test_options_out_of_bounds_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        validate(SamplingOptions, bad, where="sampling")
