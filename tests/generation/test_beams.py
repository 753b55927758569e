"""Beam search against the enumeration of every text there is."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest

from lm.tokenizers.char import CharTokenizer
from tests.generation.house import House, finish, gather

LENGTH = 4


@pytest.fixture(params=["gru", "transformer"])
def tiny(request: pytest.FixtureRequest) -> House:
    """A model of "a", "b" and a newline, with marked preferences."""
    house = House(request.param, CharTokenizer.train(["ab\n"], CharTokenizer.Options()))
    for parameter in house.model.parameters():
        parameter.data *= 3
    return house


def enumerate_texts(house: House, prompt: str, *, stop: str | None = None, bias: dict[int, float] | None = None) -> Any:
    """Every text of at most LENGTH letters that ends at `stop`, with the sum of its log-probabilities; best first."""
    letters = house.tokenizer.encode("ab\n").tolist()
    prefix = house.request(prompt).prompt
    sums: dict[str, float] = {}
    for tokens in itertools.product(letters, repeat=LENGTH):
        decoder = house.decoder()
        logits = decoder.prefill(decoder.open(), [*prefix, *tokens]).astype(np.float64)[len(prefix) - 1 : -1]
        logits[:, house.tokenizer.unknown_id] = -np.inf
        for token, value in (bias or {}).items():
            logits[:, token] += value
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        text = house.tokenizer.decode(tokens)
        end = text.find(stop) + len(stop) if stop and stop in text else LENGTH
        sums[text[:end]] = sum(float(logprobs[place, token]) for place, token in enumerate(tokens[:end]))
    return sorted(sums.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("prompt", ["", "ab", "bba\n"])
def test_a_search_with_enough_beams_finds_the_likeliest_texts(tiny: House, prompt: str) -> None:
    expected = enumerate_texts(tiny, prompt)
    found = tiny.ask(prompt, num_beams=30, n=4, max_tokens=LENGTH, logprobs=0)
    assert [sample.text for sample in found] == [text for text, _ in expected[:4]]
    assert [sample.reasons for sample in found] == [["length"]] * 4


@pytest.mark.parametrize("prompt", ["", "ab"])
def test_texts_that_end_early_compete_with_long_ones(tiny: House, prompt: str) -> None:
    expected = enumerate_texts(tiny, prompt, stop="\n")
    newline = int(tiny.tokenizer.encode("\n")[0])
    by_token = tiny.ask(prompt, num_beams=30, n=3, max_tokens=LENGTH, stop_tokens=[newline])
    by_text = tiny.ask(prompt, num_beams=30, n=3, max_tokens=LENGTH, stop=["\n"])
    assert [sample.text for sample in by_token] == [text.removesuffix("\n") for text, _ in expected[:3]]
    assert [sample.facts for sample in by_text] == [sample.facts for sample in by_token]
    assert [sample.reasons[0] for sample in by_token] == [
        "stop" if text.endswith("\n") else "length" for text, _ in expected[:3]
    ]


def test_a_stop_text_of_several_tokens_ends_a_search(tiny: House) -> None:
    expected = enumerate_texts(tiny, "a", stop="ab")
    found = tiny.ask("a", num_beams=30, n=3, max_tokens=LENGTH, stop=["ab"])
    assert [sample.text for sample in found] == [text.removesuffix("ab") for text, _ in expected[:3]]


def test_biases_and_bans_count_in_a_search_and_the_temperature_does_not(tiny: House) -> None:
    a, b, newline = (int(token) for token in tiny.tokenizer.encode("ab\n"))
    expected = enumerate_texts(tiny, "", bias={a: -2.5, b: -math.inf})
    for temperature in (0.0, 0.3, 7.0):
        found = tiny.ask(
            "", num_beams=30, n=2, max_tokens=LENGTH, logit_bias={a: -2.5}, banned_tokens=[b], temperature=temperature
        )
        assert [sample.text for sample in found] == [text for text, _ in expected[:2]]
    assert newline != a


def test_scores_of_a_search_are_those_of_the_model(tiny: House) -> None:
    (sample,) = tiny.ask("", num_beams=30, max_tokens=LENGTH, logprobs=2, allow_unknown=True)
    request = tiny.request("", max_tokens=0, more={"score_prompt": True}, logprobs=2)
    engine = tiny.engine()
    generation = engine.submit(type(request)((*request.prompt, *sample.tokens), request.options, score_prompt=True))
    finish(engine, generation)
    told = generation.prompt_scores[1:]
    assert [score.token for score in sample.scores] == [score.token for score in told if score is not None]
    assert [score.logprob for score in sample.scores] == pytest.approx(
        [score.logprob for score in told if score is not None], abs=1e-5
    )
    assert all(len(score.top) == 2 for score in sample.scores)


def test_one_beam_is_greedy(tiny: House) -> None:
    assert (
        tiny.ask("ab", num_beams=1, max_tokens=20)[0].tokens == tiny.ask("ab", temperature=0, max_tokens=20)[0].tokens
    )


def test_more_beams_never_find_a_less_likely_text_here(tiny: House) -> None:
    sums = []
    for beams in (1, 2, 30):
        (sample,) = tiny.ask("a", num_beams=beams, max_tokens=LENGTH, logprobs=0)
        sums.append(sum(score.logprob for score in sample.scores))
    assert sums == sorted(sums)


def test_a_search_gives_events_only_at_its_end(tiny: House) -> None:
    engine = tiny.engine()
    calls: list[int] = []
    generation = engine.submit(
        tiny.request("", num_beams=3, n=2, max_tokens=LENGTH), lambda each: calls.append(len(each.take()))
    )
    while engine.step():
        pass
    assert generation.done and calls == [2]
    assert engine.stats().slots == 0


def test_where_fewer_texts_exist_than_requested_the_rest_is_empty(tiny: House) -> None:
    a, b = (int(token) for token in tiny.tokenizer.encode("ab"))
    samples = tiny.ask("", num_beams=4, n=3, max_tokens=2, banned_tokens=[a, b])
    assert [sample.text for sample in samples] == ["\n\n", "", ""]
    assert [sample.reasons for sample in samples] == [["length"]] * 3


def test_a_search_of_no_tokens_gives_its_slots_back(tiny: House) -> None:
    engine = tiny.engine(max_batch=4)
    assert gather(engine.run(tiny.request("", num_beams=4, max_tokens=0)))[0].reasons == ["length"]
    assert engine.stats().slots == 0


def test_a_step_of_a_search_for_a_stop_text_does_not_take_longer_the_longer_the_text_is(gru: House) -> None:
    def seconds(**options: Any) -> float:
        begun = time.thread_time()
        gru.ask(num_beams=2, max_tokens=300, **options)
        return time.thread_time() - begun

    plain = min(seconds() for _ in range(2))
    assert min(seconds(stop=["xyzzy"]) for _ in range(2)) < 3 * plain
