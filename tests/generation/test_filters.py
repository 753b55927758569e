"""Filters and the draw, on distributions small enough to work out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lm.config import validate
from lm.errors import ConfigError
from lm.generation.distribution import draw, softmax, uniforms
from lm.generation.filters import (
    Counts,
    SamplingContext,
    add_bias,
    apply_temperature,
    ban,
    ensure_finite_row,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    penalise_presence,
    penalise_repetition,
)
from lm.generation.options import SamplingOptions
from lm.generation.sampler import Sampler
from lm.tokenizers.byte import ByteTokenizer
from lm.tokenizers.char import CharTokenizer

# Probabilities 1/2, 1/4, 1/8, 1/8.
HALVES = np.log(np.array([[0.5, 0.25, 0.125, 0.125]]))


def kept(logits: np.ndarray) -> list[bool]:
    return np.isfinite(logits)[0].tolist()


def test_softmax_of_log_probabilities_gives_them_back() -> None:
    assert softmax(HALVES)[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])


# -- before the temperature -------------------------------------------------------------------------


def test_a_banned_token_is_never_drawn() -> None:
    assert softmax(ban(HALVES, (0,)))[0].tolist() == pytest.approx([0, 0.5, 0.25, 0.25])


def test_a_bias_is_added() -> None:
    # Twice 1/4 and four times 1/8.
    biased = add_bias(HALVES, [1, 3], [math.log(2), math.log(4)])
    assert softmax(biased)[0].tolist() == pytest.approx([4 / 13, 4 / 13, 1 / 13, 4 / 13])


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits, counts = np.array([3.0, -3.0, 3.0, -math.inf]), np.array([1, 2, 0, 5])
    assert penalise_repetition(logits, counts, 1.5).tolist() == [2.0, -4.5, 3.0, -math.inf]


def test_presence_is_taken_once_and_frequency_each_time() -> None:
    logits, counts = np.array([1.0, 1.0, 1.0]), np.array([0, 1, 3])
    assert penalise_presence(logits, counts, 0.5, 0.25).tolist() == [1.0, 0.25, -0.25]


def test_counts_forget_what_leaves_the_window() -> None:
    counts = Counts(3, 2, (0, 0, 1))
    assert counts.counts.tolist() == [1, 1, 0]
    counts.add(2)
    assert counts.counts.tolist() == [0, 1, 1]
    assert Counts(3, None, (0, 0, 1)).counts.tolist() == [2, 1, 0]


def test_a_row_without_any_probability_gets_an_allowed_token() -> None:
    rows = np.array([[-math.inf, -math.inf], [math.nan, 1.0], [math.inf, 0.0]])
    assert softmax(ensure_finite_row(rows, 1)).tolist() == [[0, 1], [0, 1], [1, 0]]


# -- the temperature --------------------------------------------------------------------------------


def test_temperature_two_takes_square_roots() -> None:
    roots = np.sqrt([0.5, 0.25, 0.125, 0.125])
    assert softmax(apply_temperature(HALVES, 2.0))[0].tolist() == pytest.approx((roots / roots.sum()).tolist())


def test_each_row_may_have_another_temperature() -> None:
    rows = apply_temperature(HALVES.repeat(2, axis=0), np.array([[2.0], [0.5]]))
    assert rows[0].tolist() == apply_temperature(HALVES, 2.0)[0].tolist()
    assert rows[1].tolist() == apply_temperature(HALVES, 0.5)[0].tolist()


def test_a_tiny_temperature_is_as_good_as_none() -> None:
    assert softmax(apply_temperature(np.array([[1.0, 3.0, 2.0]]), 1e-309))[0].tolist() == [0, 1, 0]


# -- after it ---------------------------------------------------------------------------------------


def test_top_k_keeps_k_and_the_lower_ids_among_equals() -> None:
    assert kept(keep_top_k(HALVES, 3)) == [True, True, True, False]
    assert softmax(keep_top_k(HALVES, 2))[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])


def test_top_k_beyond_the_vocabulary_or_the_unmasked_tokens_changes_nothing() -> None:
    assert keep_top_k(HALVES, 9).tolist() == HALVES.tolist()
    masked = ban(HALVES, (0, 1))
    assert keep_top_k(masked, 3).tolist() == masked.tolist()


@pytest.mark.parametrize(("top_p", "count"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_token_that_crosses_the_border(top_p: float, count: int) -> None:
    assert kept(keep_top_p(HALVES, top_p)) == [place < count for place in range(4)]


def test_top_p_keeps_one_token_when_that_token_alone_exceeds_p() -> None:
    assert kept(keep_top_p(np.log(np.array([[0.1, 0.9]])), 0.2)) == [False, True]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999999])
def test_top_p_of_a_large_vocabulary_is_what_sorting_all_of_it_gives(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5000)) * [[0.1], [1.0], [4.0]]
    for row, filtered in zip(logits, keep_top_p(logits, top_p), strict=True):
        order = np.argsort(-row, kind="stable")
        mass = softmax(row[None])[0][order].cumsum()
        count = int((mass < top_p).sum()) + 1
        assert set(np.flatnonzero(np.isfinite(filtered))) == set(order[:count].tolist())


@pytest.mark.parametrize(("min_p", "count"), [(0.0, 4), (0.2, 4), (0.3, 2), (0.6, 1), (1.0, 1)])
def test_min_p_keeps_what_has_that_share_of_the_likeliest(min_p: float, count: int) -> None:
    assert kept(keep_min_p(HALVES, min_p)) == [place < count for place in range(4)]


@pytest.mark.parametrize(
    ("typical_p", "expected"),
    [
        # In bits the surprises are 1, 2, 3, 3 and their mean is 1.75: distances 0.75, 0.25, 1.25, 1.25.
        (0.2, [False, True, False, False]),
        (0.3, [True, True, False, False]),
        (0.75, [True, True, False, False]),
        (0.8, [True, True, True, False]),
        (1.0, [True, True, True, True]),
    ],
)
def test_typical_p_keeps_the_tokens_of_expected_surprise(typical_p: float, expected: list[bool]) -> None:
    assert kept(keep_typical_p(HALVES, typical_p)) == expected


def test_typical_p_leaves_masked_tokens_masked() -> None:
    # 1/2, 1/4, 1/4 remain: mean surprise 1.5 bits, all at the same distance.
    assert kept(keep_typical_p(ban(np.log(np.array([[0.4, 0.2, 0.2, 0.2]])), (3,)), 0.9)) == [True, True, True, False]


# -- the draw ---------------------------------------------------------------------------------------


def drawn(logits: np.ndarray, seed: int, index: int, position: int) -> int:
    return draw(logits, uniforms(seed, index, position, 1))[0]


def test_draws_follow_the_distribution() -> None:
    counts = np.bincount([draw(HALVES, [number])[0] for number in uniforms(7, 0, 0, 4000)], minlength=4) / 4000
    # Four standard deviations of a share of 1/2 over 4,000 draws are 0.032.
    assert counts.tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.032)


def test_a_number_falls_into_the_share_that_holds_it() -> None:
    assert [draw(HALVES, [number])[0] for number in (0.0, 0.499, 0.501, 0.749, 0.751, 0.874, 0.876)] == [
        0, 0, 1, 1, 2, 2, 3,
    ]  # fmt: skip
    assert draw(HALVES, [1 - 2**-53]) == [3]


def test_a_draw_depends_on_seed_index_and_position_alone() -> None:
    uniform = np.zeros((1, 1000))
    assert drawn(uniform, 7, 1, 5) == drawn(uniform, 7, 1, 5)
    assert len({drawn(uniform, *key) for key in [(7, 1, 5), (8, 1, 5), (7, 2, 5), (7, 1, 6)]}) == 4


def test_numbers_made_together_are_those_made_one_by_one() -> None:
    assert uniforms(7, 3, 5, 200) == [uniforms(7, 3, 5 + place, 1)[0] for place in range(200)]


def test_the_numbers_are_those_of_philox() -> None:
    # So that a seed means the same text in every version.
    generator = np.random.Generator(np.random.Philox(key=[2**63 - 1, 4], counter=9))
    assert uniforms(2**63 - 1, 4, 9, 1) == [generator.random()]


def test_masked_tokens_are_never_drawn() -> None:
    masked = np.array([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    assert {drawn(masked, seed, 0, 0) for seed in range(200)} == {1, 3}


# -- all of it --------------------------------------------------------------------------------------

TOKENIZER = CharTokenizer.train(["abcdefghij\n"], CharTokenizer.Options())


def logits_of(**probabilities: float) -> np.ndarray:
    """Float32 logits (1, V) over the letters of TOKENIZER."""
    logits = np.full((1, TOKENIZER.vocab_size), -20.0, dtype=np.float32)
    for letter, probability in probabilities.items():
        logits[0, int(TOKENIZER.encode(letter)[0])] = math.log(probability)
    return logits


def letter(logits: np.ndarray, number: float, position: int = 0, **options: Any) -> str:
    sampler = Sampler(SamplingOptions(**options), TOKENIZER)
    return TOKENIZER.decode(sampler.draw(logits, [SamplingContext(position)], [number]))


def test_temperature_comes_before_top_p() -> None:
    # At temperature 1/2 the shares are 16 : 4 : 1 : 1, so that the first holds 8/11 > 0.7 by itself.
    logits = logits_of(a=0.5, b=0.25, c=0.125, d=0.125)
    assert {letter(logits, number / 100, temperature=0.5, top_p=0.7) for number in range(100)} == {"a"}
    assert {letter(logits, number / 100, temperature=1.0, top_p=0.7) for number in range(100)} == {"a", "b"}


def test_bans_come_before_top_k() -> None:
    logits = logits_of(a=0.5, b=0.25, c=0.125, d=0.125)
    banned = TOKENIZER.encode("a").tolist()
    assert {letter(logits, number / 100, top_k=2, banned_tokens=banned) for number in range(100)} == {"b", "c"}


def test_temperature_zero_takes_the_first_of_the_likeliest_whatever_the_number() -> None:
    logits = logits_of(a=0.2, b=0.4, c=0.4)
    assert {letter(logits, number / 10, temperature=0) for number in range(10)} == {"b"}


def test_a_schedule_of_temperatures_takes_turns() -> None:
    logits = logits_of(a=0.6, b=0.4)
    # At 0.99 the second letter is drawn, except where the temperature is 0.
    assert [letter(logits, 0.99, position, temperature=(1.0, 0.0, 0.5)) for position in range(5)] == list("babba")


def test_biases_reach_tokens_that_are_banned_at_minus_a_hundred() -> None:
    a, b = TOKENIZER.encode("ab").tolist()
    logits = logits_of(a=0.99, b=0.01)
    assert {letter(logits, (number + 0.5) / 10, logit_bias={a: -100}) for number in range(10)} == {"b"}
    assert {letter(logits, (number + 0.5) / 10, logit_bias={b: 50}) for number in range(10)} == {"b"}


def test_a_model_without_a_guess_still_gives_an_allowed_token() -> None:
    nothing = np.full((1, TOKENIZER.vocab_size), -np.inf, dtype=np.float32)
    first = TOKENIZER.decode([0])
    assert letter(nothing, 0.5) == letter(nothing, 0.5, temperature=0) == first
    assert letter(nothing, 0.5, banned_tokens=[0]) == TOKENIZER.decode([1])
    assert letter(np.full_like(nothing, np.nan), 0.5) == first


@pytest.mark.parametrize(
    "options", [{"banned_tokens": list(range(11))}, {"logit_bias": dict.fromkeys(range(11), -100.0)}]
)
def test_options_that_ban_everything_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="ban all 12 tokens"):
        Sampler(SamplingOptions(**options), TOKENIZER)


@pytest.mark.parametrize("options", [{"banned_tokens": [12]}, {"stop_tokens": [12]}, {"logit_bias": {12: 1.0}}])
def test_tokens_outside_the_vocabulary_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="token 12 is outside the vocabulary of 12 tokens"):
        Sampler(SamplingOptions(**options), TOKENIZER)


RANDOM_OPTIONS: list[dict[str, Any]] = [
    {}, {"temperature": 1.0}, {"temperature": 0.0}, {"temperature": (0.3, 0.0, 1.7)}, {"top_k": 5}, {"top_k": 40},
    {"top_p": 0.9}, {"top_p": 0.3, "temperature": 1.5}, {"min_p": 0.1}, {"typical_p": 0.8},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "logit_bias": {3: 2.5, 9: -100}},
]  # fmt: skip


@pytest.mark.parametrize("options", RANDOM_OPTIONS, ids=str)
@pytest.mark.parametrize("size", [65, 256, 3001])
def test_a_row_is_filtered_to_the_same_bits_alone_and_in_a_batch(options: dict[str, Any], size: int) -> None:
    random = np.random.default_rng(5)
    tokenizer = ByteTokenizer.train(["x"], ByteTokenizer.Options())
    tokenizer.vocab_size = size
    sampler = Sampler(SamplingOptions(**options), tokenizer)
    for _ in range(20):
        rows = (random.normal(size=(17, size)) * 3).astype(np.float32)
        # Equals at the borders too.
        rows[::3] = rows[::3].round()
        contexts = [SamplingContext(position) for position in range(17)]
        numbers = random.random(17).tolist()
        alone = [
            sampler.draw(rows[[place]], [context], [number])[0]
            for place, (context, number) in enumerate(zip(contexts, numbers, strict=True))
        ]
        assert sampler.draw(rows, contexts, numbers) == alone
        if 0.0 not in sampler._temperatures:
            together = sampler._filtered(*sampler._penalised(rows, contexts), 0.7, contexts)
            single = [
                sampler._filtered(*sampler._penalised(rows[[place]], [context]), 0.7, [context])
                for place, context in enumerate(contexts)
            ]
            np.testing.assert_array_equal(together, np.concatenate(single))


def test_filters_do_not_change_their_input() -> None:
    logits = np.random.default_rng(1).normal(size=(2, TOKENIZER.vocab_size)).astype(np.float32)
    before = logits.copy()
    options = SamplingOptions(temperature=0.5, top_k=2, top_p=0.9, min_p=0.1, typical_p=0.9, logit_bias={1: 3.0})
    Sampler(options, TOKENIZER).draw(logits, [SamplingContext(0), SamplingContext(0)], [0.0, 0.0])
    assert logits.tolist() == before.tolist()
    for function in (
        lambda rows: keep_top_k(rows, 2), lambda rows: keep_top_p(rows, 0.5), lambda rows: keep_min_p(rows, 0.5),
        lambda rows: keep_typical_p(rows, 0.5), lambda rows: apply_temperature(rows, 0.5),
        lambda rows: ban(rows, [0]), lambda rows: add_bias(rows, [0], [1.0]), lambda rows: ensure_finite_row(rows, 0),
    ):  # fmt: skip
        rows = HALVES.copy()
        function(rows)
        assert rows.tolist() == HALVES.tolist()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": "0.5,x"}, {"temperature": []}, {"top_k": 0}, {"top_p": 0}, {"min_p": 2},
        {"typical_p": 0}, {"repetition_penalty": 0}, {"penalty_window": 0}, {"logit_bias": "x"}, {"max_tokens": -1},
        {"stop": [""]}, {"stop_tokens": [-1]}, {"n": 0}, {"num_beams": 65}, {"logprobs": 21}, {"tempreature": 1},
    ],
)  # fmt: skip
def test_options_out_of_bounds_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        validate(SamplingOptions, bad, where="sampling")


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"n": 3, "best_of": 2}, "best_of 2 must not be less than n 3"),
        ({"n": 3, "num_beams": 2}, "num_beams 2 must not be less than n 3"),
        ({"num_beams": 2, "best_of": 2}, "give one"),
    ],
)
def test_options_that_contradict_each_other_are_refused(bad: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(SamplingOptions, bad, where="sampling")


def test_options_are_read_from_text() -> None:
    given = {"temperature": "0.5, 1.2", "logit_bias": '{"13": -100}', "stop": "END"}
    options = validate(SamplingOptions, given, where="sampling")
    assert (options.temperatures, options.logit_bias, options.stop) == ((0.5, 1.2), {13: -100.0}, ("END",))
    assert validate(SamplingOptions, {"temperature": "0.8"}).temperatures == (0.8,)
