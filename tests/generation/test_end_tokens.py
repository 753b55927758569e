"""Texts end before a token that ends a text for the model, if its tokenizer has one."""

from __future__ import annotations

from typing import Any

import pytest

from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.generation.house import House, Sample, gather
from tests.tokenizers.tiny_pretrained import CONFIG, byte_level

TOKENIZER = PretrainedTokenizer.from_json(byte_level(), CONFIG)
TURN_END, TEXT_END = TOKENIZER.end_ids
A = int(TOKENIZER.encode("a")[0])


@pytest.fixture(scope="module")
def house() -> House:
    return House(tokenizer=TOKENIZER)


def ask(house: House, **options: Any) -> tuple[list[Sample], int]:
    """Samples in which only "a" and the end tokens can be drawn, and the tokens that were drawn."""
    only = {token: -100.0 for token in range(TOKENIZER.vocab_size) if token not in (A, TURN_END, TEXT_END)}
    request = house.request("the ", logit_bias={**only, **options.pop("logit_bias", {})}, **options)
    engine = house.engine()
    generation = engine.submit(request)
    while engine.step():
        pass
    return gather(generation.take(), request.options.n), generation.usage.drawn_tokens


@pytest.mark.parametrize("end", [TURN_END, TEXT_END])
def test_a_text_ends_before_an_end_token_and_does_not_show_it(house: House, end: int) -> None:
    (sample,), drawn = ask(house, logit_bias={end: 100.0})
    assert (sample.text, sample.tokens, sample.reasons, drawn) == ("", [], ["stop"], 1)


def test_a_random_text_has_what_was_drawn_before_its_end(house: House) -> None:
    samples, drawn = ask(house, n=8, seed=2, logprobs=0)
    for sample in samples:
        assert sample.reasons == ["stop"]
        assert set(sample.tokens) <= {A} and sample.text == "a" * len(sample.tokens)
        assert len(sample.scores) == len(sample.tokens)
    assert len({sample.text for sample in samples}) > 1
    assert drawn == sum(len(sample.tokens) + 1 for sample in samples)


def test_no_end_token_is_drawn_before_min_tokens(house: House) -> None:
    (sample,), _ = ask(house, logit_bias={TURN_END: 100.0}, min_tokens=5)
    assert (sample.text, sample.reasons) == ("aaaaa", ["stop"])


def test_a_text_continues_past_end_tokens_if_they_are_ignored(house: House) -> None:
    (sample,), _ = ask(house, logit_bias={TURN_END: 100.0}, ignore_eos=True, max_tokens=7)
    assert (sample.text, sample.tokens, sample.reasons) == ("", [TURN_END] * 7, ["length"])


def test_a_search_ends_texts_at_end_tokens_and_counts_their_probability(house: House) -> None:
    samples, _ = ask(house, num_beams=3, n=3, max_tokens=6)
    assert [sample.reasons for sample in samples].count(["stop"]) >= 2
    assert all(sample.text == "a" * len(sample.tokens) for sample in samples)


def test_the_best_of_several_texts_are_compared_with_their_ends(house: House) -> None:
    best, _ = ask(house, best_of=6, n=1, seed=4)
    assert best[0].reasons == ["stop"] and best[0].text == "a" * len(best[0].tokens)


def test_other_tokenizers_have_no_end_token() -> None:
    char = House()
    assert (char.tokenizer.end_ids, char.tokenizer.end_id) == ((), None)
    assert char.ask(seed=3)[0].facts == char.ask(seed=3, ignore_eos=True)[0].facts
