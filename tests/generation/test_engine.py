"""The engine with the reference decoder: what a request gives depends on the request alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lm.errors import ConfigError
from lm.evaluation.perplexity import score
from lm.generation import engine as module
from lm.generation.engine import PREFILL_CHUNK, Engine, Generation, Request
from lm.generation.filters import SamplingContext
from lm.generation.options import SamplingOptions
from lm.generation.sampler import Sampler
from lm.generation.torch_decoder import TorchDecoder
from lm.tokenizers.byte import ByteTokenizer
from lm.tokenizers.word import WordTokenizer
from tests.generation.house import TEXT, House, finish, gather

# -- one request ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_and_another_seed_another(house: House) -> None:
    assert house.text(seed=7) == house.text(seed=7)
    assert house.text(seed=7) != house.text(seed=8)


def test_a_longer_sample_begins_with_the_shorter_one(house: House) -> None:
    assert house.text(max_tokens=40).startswith(house.text(max_tokens=15))


def test_a_sample_ends_at_max_tokens_and_says_so(gru: House) -> None:
    (sample,) = gru.ask(max_tokens=12)
    assert (len(sample.text), len(sample.tokens), sample.reasons) == (12, 12, ["length"])
    assert sample.offsets == list(range(12))
    assert gru.tokenizer.decode(sample.tokens) == sample.text


def test_nothing_is_drawn_for_max_tokens_0(gru: House) -> None:
    for sample in gru.ask(max_tokens=0, n=3):
        assert sample.facts == ("", [], [], [], ["length"])


def test_the_first_token_is_drawn_from_what_follows_the_prompt(gru: House) -> None:
    decoder = gru.decoder()
    slot = decoder.open()
    request = gru.request(TEXT * 5, temperature=0, max_tokens=1)
    logits = decoder.prefill(slot, request.prompt)[-1].copy()
    logits[gru.tokenizer.unknown_id] = -np.inf
    assert gru.ask(TEXT * 5, temperature=0, max_tokens=1)[0].tokens == [int(logits.argmax())]


def test_greedy_text_is_that_of_a_plain_loop(house: House) -> None:
    decoder = house.decoder()
    slot = decoder.open()
    logits = decoder.prefill(slot, house.request().prompt)[-1:]
    tokens = []
    for _ in range(30):
        logits[0, house.tokenizer.unknown_id] = -np.inf
        tokens.append(int(logits[0].argmax()))
        logits = decoder.step([slot], tokens[-1:])
    assert house.ask(temperature=0, max_tokens=30)[0].tokens == tokens


def test_the_unknown_token_is_not_drawn_unless_allowed() -> None:
    tokenizer = WordTokenizer.train([TEXT], WordTokenizer.Options())
    house = House("gru", tokenizer)
    with torch.no_grad():
        house.model.output.weight.zero_()
        house.model.output.bias.zero_()
        house.model.output.bias[tokenizer.unknown_id] = 100.0
    assert "<unk>" not in house.text("the xylophone", max_tokens=20)
    assert house.text("the xylophone", max_tokens=20, allow_unknown=True).split() == ["<unk>"] * 20


def test_a_streamed_byte_model_never_emits_half_a_character() -> None:
    house = House("gru", ByteTokenizer.train([TEXT], ByteTokenizer.Options()))
    engine, request = house.engine(), house.request("é", max_tokens=200)
    events = list(engine.run(request))
    (sample,) = gather(events)
    assert sample.text == house.tokenizer.decode(sample.tokens)
    assert all(event.text.encode("utf-8").decode("utf-8") == event.text for event in events)


def test_a_word_follows_the_prompt_with_its_space() -> None:
    house = House("gru", WordTokenizer.train([TEXT], WordTokenizer.Options()))
    (sample,) = house.ask("the quick", max_tokens=12)
    assert house.tokenizer.decode([*house.tokenizer.encode("the quick"), *sample.tokens]) == "the quick" + sample.text


# -- where a text ends --------------------------------------------------------------------------------


def test_a_sample_ends_before_a_stop_text_and_says_so(house: House) -> None:
    whole = house.text()
    stop = whole[10:12]
    (sample,) = house.ask(stop=[stop, "never there"])
    assert sample.text == whole[: whole.find(stop)]
    assert sample.reasons == ["stop"]
    assert house.tokenizer.decode(sample.tokens) == sample.text


class Scripted:
    """A decoder that wants to say one text, whatever it reads: for texts that no model can be made to say."""

    name, context_length, max_slots = "scripted", None, None

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokens = [*tokens, *[0] * 1000]
        self._read: dict[int, int] = {}

    def open(self) -> int:
        self._read[len(self._read)] = -1
        return len(self._read) - 1

    def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> np.ndarray:
        self._read[slot] += 1
        return self._wish(slot)

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.prefill(slot, ids) for slot in slots])

    def _wish(self, slot: int) -> np.ndarray:
        logits = np.zeros((1, self.vocab_size), dtype=np.float32)
        logits[0, self._tokens[self._read[slot]]] = 50.0
        return logits

    def close(self, slot: int) -> None:
        pass


def said(text: str, **options: Any) -> tuple[Any, ...]:
    """What an engine makes of a model that says `text`, byte by byte."""
    tokenizer = ByteTokenizer.train([TEXT], ByteTokenizer.Options())
    decoder: Any = Scripted(list(text.encode()), 256)
    settings = SamplingOptions.model_validate({"temperature": 0, "max_tokens": len(text.encode()), **options})
    (sample,) = gather(Engine(decoder, tokenizer).run(Request((0,), settings)))
    return sample.text, bytes(sample.tokens).decode(errors="replace"), sample.reasons[0]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("to be or not", {"stop": ["or"]}, ("to be ", "to be ", "stop")),
        ("aaaab!", {"stop": ["aab"]}, ("aa", "aa", "stop")),
        ("to EN be", {"stop": ["END"]}, ("to EN be", "to EN be", "length")),
        ("to be EN", {"stop": ["END"]}, ("to be EN", "to be EN", "length")),
        ("xabcx", {"stop": ["c", "ab"]}, ("x", "x", "stop")),
        ("né à Paris", {"stop": ["à"]}, ("né ", "né ", "stop")),
        ("né à Paris", {"stop": ["é à"], "max_tokens": 3}, ("né", "né", "length")),
        ("né", {"max_tokens": 2}, ("n\N{REPLACEMENT CHARACTER}", "n\N{REPLACEMENT CHARACTER}", "length")),
        ("ab.cd.ef", {"stop": ["."], "min_tokens": 3}, ("ab.cd", "ab.cd", "stop")),
        ("ab.cd.ef", {"stop": ["."], "min_tokens": 2}, ("ab", "ab", "stop")),
        ("ab--cd--", {"stop": ["--"], "min_tokens": 3}, ("ab--cd", "ab--cd", "stop")),
        ("ab.cd.ef", {"stop_tokens": [ord("d")]}, ("ab.c", "ab.c", "stop")),
        ("ab.cd.ef", {"stop_tokens": [ord("d")], "stop": [".cx"]}, ("ab.c", "ab.c", "stop")),
        ("", {"stop_tokens": [0], "max_tokens": 9}, ("", "", "stop")),
    ],
)
def test_a_text_ends_where_it_should(text: str, options: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert said(text, **options) == expected


def test_stop_tokens_are_not_drawn_before_min_tokens(gru: House) -> None:
    stop = gru.ask(temperature=0)[0].tokens[0]
    (at_once,) = gru.ask(temperature=0, stop_tokens=[stop])
    assert at_once.facts == ("", [], [], [], ["stop"])
    (sample,) = gru.ask(temperature=0, stop_tokens=[stop], min_tokens=10)
    assert len(sample.tokens) >= 10 and stop not in sample.tokens
    assert (
        gru.ask(min_tokens=10, stop_tokens=range(5), seed=3)[0].tokens[:10]
        == (gru.ask(banned_tokens=range(5), seed=3)[0].tokens[:10])
    )


def test_a_stop_token_that_is_banned_as_all_others_are_is_refused(gru: House) -> None:
    everything = range(gru.tokenizer.vocab_size)
    assert gru.ask(stop_tokens=everything)[0].reasons == ["stop"]
    with pytest.raises(ConfigError, match="ban all"):
        gru.ask(stop_tokens=everything, min_tokens=1)


# -- penalties, through the engine --------------------------------------------------------------------


def test_a_presence_penalty_spreads_the_text(gru: House) -> None:
    plain, spread = (set(gru.ask(max_tokens=25, presence_penalty=value)[0].tokens) for value in (0.0, 50.0))
    assert len(spread) == 25 > len(plain)


def test_the_presence_penalty_forgets_what_leaves_its_window(gru: House) -> None:
    tokens = gru.ask(max_tokens=30, temperature=0, presence_penalty=100.0, penalty_window=2)[0].tokens
    assert all(len(set(tokens[place : place + 3])) == 3 for place in range(28))
    assert len(set(tokens)) < 30


def test_the_repetition_penalty_counts_the_prompt_and_the_others_do_not(gru: House) -> None:
    first = gru.ask("a", temperature=0, max_tokens=1)[0].tokens
    prompt = gru.tokenizer.decode(first)
    assert gru.ask(prompt, temperature=0, max_tokens=1, presence_penalty=100.0)[0].tokens == (
        gru.ask(prompt, temperature=0, max_tokens=1)[0].tokens
    )
    decoder = gru.decoder()
    logits = decoder.prefill(decoder.open(), gru.request(prompt).prompt)[-1].astype(np.float64)
    logits[gru.tokenizer.unknown_id] = -np.inf
    for token in set(gru.request(prompt).prompt):
        logits[token] = logits[token] / 30 if logits[token] > 0 else logits[token] * 30
    assert gru.ask(prompt, temperature=0, max_tokens=1, repetition_penalty=30)[0].tokens == [int(logits.argmax())]


# -- several samples ------------------------------------------------------------------------------------


def test_each_of_several_samples_is_its_own_and_the_first_is_the_one_alone(house: House) -> None:
    several = house.ask(n=5)
    assert len({sample.text for sample in several}) == 5
    assert several[0].facts == house.ask(n=1)[0].facts
    assert [sample.facts for sample in several[:3]] == [sample.facts for sample in house.ask(n=3)]


def test_more_samples_than_slots_take_turns(house: House) -> None:
    expected = [sample.facts for sample in house.ask(n=7)]
    engine = house.engine(max_batch=2)
    (samples,) = finish(engine, engine.submit(house.request(n=7)))
    assert [sample.facts for sample in samples] == expected
    assert engine.stats().slots == 0


@pytest.mark.slow
def test_best_of_is_what_sorting_all_samples_gives(house: House) -> None:
    every = house.ask(n=6, logprobs=0)
    ranked = sorted(every, key=lambda sample: -sum(score.logprob for score in sample.scores) / len(sample.scores))
    assert [sample.facts for sample in house.ask(n=3, best_of=6, logprobs=0)] == [sample.facts for sample in ranked[:3]]
    assert [sample.text for sample in house.ask(n=1, best_of=6)] == [ranked[0].text]
    assert house.ask(n=1, best_of=6)[0].scores == []


# -- scores -------------------------------------------------------------------------------------------


def test_a_greedy_token_has_exactly_the_log_probability_of_the_likeliest(house: House) -> None:
    (sample,) = house.ask(temperature=0, logprobs=3, allow_unknown=True)
    assert len(sample.scores) == len(sample.tokens) == 40
    for token, scored in zip(sample.tokens, sample.scores, strict=True):
        assert (scored.token, scored.logprob) == (token, max(value for _, value in scored.top))
        assert scored.top[0] == (token, scored.logprob) and len(scored.top) == 3
        assert [value for _, value in scored.top] == sorted((value for _, value in scored.top), reverse=True)


def test_probabilities_of_all_alternatives_sum_to_one(gru: House) -> None:
    tokenizer = WordTokenizer.train(["a b c d\n"], WordTokenizer.Options())
    (sample,) = House("gru", tokenizer).ask("a", logprobs=20)
    for scored in sample.scores:
        assert len(scored.top) == tokenizer.vocab_size
        assert sum(np.exp(value) for _, value in scored.top) == pytest.approx(1.0, abs=1e-12)


def test_scores_are_those_before_the_filters_and_change_no_draw(house: House) -> None:
    (plain,), (told,) = house.ask(top_k=2), house.ask(top_k=2, logprobs=5)
    assert plain.tokens == told.tokens and plain.scores == []
    assert [len(scored.top) for scored in told.scores] == [5] * 40
    (hot,) = house.ask(temperature=0.1, logprobs=0, max_tokens=1)
    (cold,) = house.ask(temperature=0, logprobs=1, max_tokens=1)
    assert hot.scores[0].top == () and cold.scores[0].logprob == cold.scores[0].top[0][1]


def test_the_lower_id_comes_first_among_equals() -> None:
    house = House("gru")
    with torch.no_grad():
        house.model.output.weight.zero_()
        house.model.output.bias.zero_()
    (sample,) = house.ask(logprobs=4, max_tokens=2)
    assert [[token for token, _ in scored.top] for scored in sample.scores] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("length", [0, 1, 5, PREFILL_CHUNK - 1, PREFILL_CHUNK, 200])
def test_the_scores_of_a_prompt_are_those_of_its_evaluation(length: int) -> None:
    # Without a window: the evaluation slides it in another way.
    house = House("gru")
    prompt = (TEXT * 5)[:length]
    request = house.request(prompt, max_tokens=0, more={"score_prompt": True}, logprobs=2)
    engine = house.engine()
    generation = engine.submit(request)
    finish(engine, generation)
    first, *scores = generation.prompt_scores
    assert first is None
    assert [scored.token for scored in scores] == list(request.prompt[1:])
    if scores:
        nats = score(house.model, np.array(request.prompt)).nats
        assert -sum(scored.logprob for scored in scores) == pytest.approx(nats, abs=1e-3)


@pytest.mark.slow
def test_prompt_scores_do_not_depend_on_company_nor_on_what_was_read_before(house: House) -> None:
    prompts = [(TEXT * 6)[:length] for length in (70, 130, 199, 200)]
    requests = [house.request(prompt, max_tokens=0, more={"score_prompt": True}, logprobs=1) for prompt in prompts]

    def scores(engine: Engine, request: Request) -> Any:
        generation = engine.submit(request)
        finish(engine, generation)
        return generation.prompt_scores

    alone = [scores(house.engine(), request) for request in requests]
    engine = house.engine(max_batch=3)
    crowd = [engine.submit(request) for request in [house.request(prompts[-1]), *requests, *requests]]
    finish(engine, *crowd)
    assert [generation.prompt_scores for generation in crowd[1:]] == alone * 2


# -- named states -----------------------------------------------------------------------------------------


def test_a_request_continues_from_the_state_of_another(house: House) -> None:
    engine = house.engine()
    generation = engine.submit(house.request(TEXT, max_tokens=0, more={"keep_state": True}))
    finish(engine, generation)
    ids = tuple(house.tokenizer.encode("the ").tolist())
    options = house.request().options
    (onward,) = gather(engine.run(Request(ids, options, state=generation.state)))
    # In two parts, the last bits of the logits may differ.
    assert onward.text == house.text(TEXT + "the ")


# -- in company ---------------------------------------------------------------------------------------------


def random_request(house: House, source: random.Random) -> Request:
    """Anything that can be asked for."""
    size = house.tokenizer.vocab_size
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 0.5, 1.0, 1.7, (0.3, 1.5, 0.0)],
        "top_k": [1, 3, 10], "top_p": [0.5, 0.9], "min_p": [0.02, 0.2], "typical_p": [0.5, 0.95],
        "repetition_penalty": [0.8, 1.3], "presence_penalty": [0.7], "frequency_penalty": [-0.2, 0.4],
        "penalty_window": [1, 5], "logit_bias": [{source.randrange(size): 3.0, source.randrange(size): -100.0}],
        "banned_tokens": [[source.randrange(size)]], "stop": [["e"], ["the", "o"], ["zz"]],
        "stop_tokens": [[source.randrange(size)]], "min_tokens": [1, 5], "n": [2, 3], "logprobs": [0, 3],
        "best_of": [4], "num_beams": [3],
    }  # fmt: skip
    options = {name: source.choice(values) for name, values in choices.items() if source.random() < 0.25}
    if "num_beams" in options:
        options.pop("best_of", None)
    options |= {"max_tokens": source.choice([0, 1, 3, 8, 20]), "seed": source.randrange(2**40)}
    prompt = (TEXT * 4)[: source.choice([0, 1, 4, 20, 70, 130])]
    more = {"score_prompt": source.random() < 0.1}
    return house.request(prompt, more=more, **{"temperature": 1.0, **options})


def crowd(house: House, requests: list[Request], source: random.Random, engine: Engine) -> list[Any]:
    """What each request gives where they come and go at random."""
    generations: list[Generation] = []
    waiting = list(requests)
    while waiting or not all(generation.done for generation in generations):
        count = source.randrange(4)
        generations += [engine.submit(request) for request in waiting[:count]]
        del waiting[:count]
        engine.step()
        assert engine.stats().slots <= engine.max_batch
    assert not engine.step()
    return [
        ([sample.facts for sample in gather(each.take(), each.request.options.n)], each.prompt_scores)
        for each in generations
    ]


def alone(house: House, request: Request) -> Any:
    engine = house.engine()
    generation = engine.submit(request)
    (samples,) = finish(engine, generation)
    return [sample.facts for sample in samples], generation.prompt_scores


@pytest.mark.slow
def test_requests_that_come_and_go_get_the_text_they_get_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUANTUM", 5)
    source = random.Random(3)
    requests = [random_request(house, source) for _ in range(40)]
    expected = [alone(house, request) for request in requests]
    assert crowd(house, requests, source, house.engine(max_batch=6)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "usual"),
    [
        pytest.param("gru", False, id="gru-reference"),
        pytest.param("gru", True, id="gru-usual decoder"),
        pytest.param("transformer", True, id="transformer-usual decoder"),
        # The slowest of the four; the shorter test above has it too.
        pytest.param("transformer", False, id="transformer-reference", marks=pytest.mark.soak),
    ],
)
def test_thousands_of_requests_get_the_text_they_get_alone(
    name: str, usual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUANTUM", 6)
    house, source = House(name, usual=usual), random.Random(17)
    distinct = [random_request(house, source) for _ in range(150 if usual else 50)]
    expected = {id(request): alone(house, request) for request in distinct}
    for max_batch, cache in ((16, 1 << 20), (5, 3000)):
        # The reference takes its time over each.
        requests = [source.choice(distinct) for _ in range(1000 if usual else 250)]
        engine = house.engine(max_batch=max_batch, prefix_cache_bytes=cache)
        assert crowd(house, requests, source, engine) == [expected[id(request)] for request in requests]
        assert engine.stats().cached_tokens > 0
        assert engine.stats().cache_bytes <= cache


def test_one_engine_serves_threads_that_submit_and_cancel(gru: House) -> None:
    engine = gru.engine(max_batch=4)
    expected = {seed: gru.text(seed=seed) for seed in range(12)}
    found: dict[int, str] = {}
    stop = threading.Event()

    def client(number: int) -> None:
        for seed in range(number, 12, 3):
            generation = engine.submit(gru.request(seed=seed))
            dropped = engine.submit(gru.request(seed=seed, max_tokens=10_000))
            text = ""
            while not generation.done:
                time.sleep(0.001)
                text += "".join(event.text for event in generation.take())
                if text:
                    engine.cancel(dropped)
            engine.cancel(dropped)
            found[seed] = text + "".join(event.text for event in generation.take())

    def work() -> None:
        while not stop.is_set():
            if not engine.step():
                time.sleep(0.001)

    worker = threading.Thread(target=work)
    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in (worker, *clients):
        thread.start()
    for thread in clients:
        thread.join(60)
    stop.set()
    worker.join(60)
    while engine.step():
        pass
    assert found == expected
    assert engine.stats().slots == 0


def test_news_come_once_a_step(gru: House) -> None:
    calls: list[int] = []
    engine = gru.engine()
    generation = engine.submit(
        gru.request(n=3, max_tokens=10, stop=["never there"]),
        lambda each: calls.append(len([*each.take()])),
    )
    steps = 0
    while engine.step():
        steps += 1
    # The first token is drawn in the step that reads the prompt, which decodes too.
    assert generation.done and len(calls) == steps == 9
    assert set(calls) == {3}


# -- turns ------------------------------------------------------------------------------------------------------


def test_a_long_text_makes_room_for_others_and_comes_back_exactly(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = house.ask(max_tokens=50, seed=1)[0].facts
    monkeypatch.setattr(module, "QUANTUM", 7)
    engine = house.engine(max_batch=1)
    long = engine.submit(house.request(max_tokens=50, seed=1))
    shorts = [engine.submit(house.request(max_tokens=5, seed=seed)) for seed in range(4)]
    ended: list[Generation] = []
    while engine.step():
        ended += [each for each in (long, *shorts) if each.done and each not in ended]
    assert ended == [*shorts, long]
    assert gather(long.take())[0].facts == expected
    for seed, short in enumerate(shorts):
        assert gather(short.take())[0].text == house.text(max_tokens=5, seed=seed)


def test_a_text_that_changes_places_is_counted_at_every_moment(gru: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUANTUM", 7)
    counted: list[int] = []

    class Counted(TorchDecoder):
        """Looks at the figures where another thread may: whenever the engine is in the middle of a step."""

        def __getattribute__(self, name: str) -> Any:
            if name in ("open", "close", "restore", "export", "prefill", "step"):
                stats = engine.stats()
                counted.append(stats.running + stats.prefilling + stats.waiting)
            return super().__getattribute__(name)

    engine = Engine(Counted(gru.model), gru.tokenizer, max_batch=1)
    assert engine.stats().waiting == 0
    both = [engine.submit(gru.request(max_tokens=30, seed=seed)) for seed in range(2)]
    assert engine.stats().waiting == 2
    while not any(generation.done for generation in both):
        engine.step()
    # They took turns, and were read, parked and restored on the way.
    assert len(counted) > 60 and set(counted) == {2}
    finish(engine, *both)
    stats = engine.stats()
    assert (stats.running, stats.prefilling, stats.waiting, stats.slots) == (0, 0, 0, 0)


def test_a_paused_request_holds_no_slot_and_continues_exactly(house: House) -> None:
    expected = [sample.facts for sample in house.ask(n=3, max_tokens=30, seed=1, logprobs=2)]
    engine = house.engine(max_batch=2)
    # Two of its three samples have slots, the third waits.
    paused = engine.submit(house.request(n=3, max_tokens=30, seed=1, logprobs=2))
    for number in range(5):
        for _ in range(4):
            engine.step()
        engine.pause(paused)
        stats = engine.stats()
        assert (stats.running, stats.slots, stats.waiting) == (0, 0, 3)
        assert not engine.step()
        other = engine.submit(house.request(max_tokens=5, seed=number))
        assert finish(engine, other)[0][0].text == house.text(max_tokens=5, seed=number)
        engine.resume(paused)
    assert [sample.facts for sample in finish(engine, paused)[0]] == expected
    engine.pause(paused)
    engine.resume(paused)
    assert not engine.step()


def test_a_paused_request_can_be_cancelled(gru: House) -> None:
    engine = gru.engine(max_batch=2)
    paused = engine.submit(gru.request(n=3, max_tokens=30))
    engine.step()
    engine.pause(paused)
    engine.cancel(paused)
    assert [sample.reasons for sample in finish(engine, paused)[0]] == [["cancelled"]] * 3
    engine.resume(paused)
    assert not engine.step()
    assert (engine.stats().slots, engine.stats().waiting) == (0, 0)


def test_nothing_is_preempted_where_no_job_waits(gru: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUANTUM", 3)
    monkeypatch.setattr(TorchDecoder, "export", None)
    engine = gru.engine(max_batch=2)
    finish(engine, *[engine.submit(gru.request(seed=seed)) for seed in range(2)])


def test_a_search_that_needs_many_slots_is_not_overtaken_for_ever(gru: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUANTUM", 4)
    engine = gru.engine(max_batch=4)
    expected = gru.ask(num_beams=4, max_tokens=10)[0].facts
    running = [engine.submit(gru.request(max_tokens=10_000, seed=seed)) for seed in range(4)]
    engine.step()
    search = engine.submit(gru.request(num_beams=4, max_tokens=10))
    later = [engine.submit(gru.request(max_tokens=10_000, seed=seed)) for seed in range(9, 12)]
    for _ in range(120):
        engine.step()
    assert search.done
    assert gather(search.take())[0].facts == expected
    for generation in (*running, *later):
        engine.cancel(generation)
    finish(engine)
    assert engine.stats().slots == 0


def test_a_long_prompt_does_not_stall_the_others(gru: House) -> None:
    engine = gru.engine()
    short = engine.submit(gru.request(max_tokens=30))
    engine.step()
    long = engine.submit(gru.request(TEXT * 40, max_tokens=3))
    # One chunk of it a step, and one token for the other each time.
    for _ in range(10):
        before = short.usage.drawn_tokens
        engine.step()
        assert short.usage.drawn_tokens == before + 1
    assert engine.stats().prefilling == 1
    _, (whole,) = finish(engine, short, long)
    assert whole.text == gru.text(TEXT * 40, max_tokens=3)


def test_a_long_prompt_is_read_in_chunks_that_begin_at_multiples(gru: House) -> None:
    read: list[tuple[int, bool]] = []

    class Watched(TorchDecoder):
        def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> np.ndarray:
            read.append((len(ids), only_last))
            return super().prefill(slot, ids, only_last=only_last)

    engine = Engine(Watched(gru.model), gru.tokenizer, prefix_cache_bytes=0)
    finish(engine, engine.submit(gru.request("t" * 149, max_tokens=1)))
    assert read == [(64, True), (64, True), (22, True)]


# -- equal starts ---------------------------------------------------------------------------------------------


def test_a_prompt_that_was_read_before_is_not_read_again(house: House) -> None:
    prompt = (TEXT * 5)[:150]
    expected = [sample.facts for sample in house.ask(prompt, logprobs=2)]
    engine = house.engine()
    for cached in (0, 128):
        generation = engine.submit(house.request(prompt, logprobs=2))
        (samples,) = finish(engine, generation)
        assert [sample.facts for sample in samples] == expected
        assert (generation.usage.prompt_tokens, generation.usage.cached_tokens) == (151, cached)
    assert engine.stats().prefilled_tokens == 151 + 23
    assert engine.stats().cached_tokens == 128
    assert engine.stats().cache_bytes > 0


def test_a_start_that_two_prompts_share_serves_the_third(gru: House) -> None:
    start = (TEXT * 5)[:140]
    engine = gru.engine()
    cached = []
    for ending in ("quick" * 20, "brown" * 20, "fox" * 40):
        generation = engine.submit(gru.request(start + ending))
        (samples,) = finish(engine, generation)
        assert samples[0].text == gru.text(start + ending)
        cached.append(generation.usage.cached_tokens)
    assert cached == [0, 0, 128]


def test_equal_prompts_that_come_together_are_read_once(house: House) -> None:
    prompt = (TEXT * 5)[:200]
    expected = [house.text(prompt, seed=seed) for seed in range(6)]
    engine = house.engine()
    generations = [engine.submit(house.request(prompt, seed=seed)) for seed in range(6)]
    samples = finish(engine, *generations)
    assert [each.text for (each,) in samples] == expected
    assert engine.stats().prefilled_tokens == 201 + 5 * (201 - 192)
    assert [generation.usage.cached_tokens for generation in generations] == [0] + [192] * 5


def test_who_waits_for_a_reader_reads_by_itself_when_that_one_goes(gru: House) -> None:
    prompt = (TEXT * 5)[:200]
    engine = gru.engine()
    first, second = (engine.submit(gru.request(prompt, seed=seed)) for seed in (1, 2))
    engine.step()
    engine.cancel(first)
    _, (whole,) = finish(engine, first, second)
    assert whole.text == gru.text(prompt, seed=2)


def test_states_of_equal_prompts_are_distinguished(gru: House) -> None:
    engine = gru.engine()
    prompt = (TEXT * 5)[:150]
    kept = engine.submit(gru.request("zzz", max_tokens=0, more={"keep_state": True}))
    finish(engine, kept)
    plain = gru.request(prompt)
    onward = Request(plain.prompt, plain.options, state=kept.state)
    for request in (plain, onward, plain, onward):
        (samples,) = finish(engine, engine.submit(request))
        assert [sample.facts for sample in samples] == alone(gru, request)[0]
    assert engine.stats().cached_tokens == 2 * 128


@pytest.mark.slow
def test_the_cache_keeps_to_its_memory(house: House) -> None:
    engine = house.engine(prefix_cache_bytes=20_000)
    for number in range(40):
        prompt = f"{'abcdefghij'[number % 10] * 40}{TEXT * 3}"[: 70 + number]
        finish(engine, engine.submit(house.request(prompt, max_tokens=1)))
        assert engine.stats().cache_bytes <= 20_000
    assert engine.stats().cache_bytes > 0
    nothing = house.engine(prefix_cache_bytes=0)
    finish(nothing, *[nothing.submit(house.request(TEXT * 3, max_tokens=1)) for _ in range(3)])
    assert nothing.stats().cache_bytes == nothing.stats().cached_tokens == 0


# -- ends -----------------------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_slots_at_the_next_step(house: House) -> None:
    engine = house.engine(max_batch=4)
    generation = engine.submit(house.request(n=3, max_tokens=1000))
    other = engine.submit(house.request(max_tokens=20))
    for _ in range(5):
        engine.step()
    assert engine.stats().slots == 4
    engine.cancel(generation)
    engine.step()
    assert engine.stats().slots == 1 and generation.done
    samples = gather(generation.take(), 3)
    assert [sample.reasons for sample in samples] == [["cancelled"]] * 3
    assert all(house.text(n=1).startswith(samples[0].text[:5]) for sample in samples)
    (whole,) = finish(engine, other)
    assert whole[0].text == house.text(max_tokens=20)


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 30])
@pytest.mark.parametrize("options", [{}, {"n": 5}, {"best_of": 3}, {"num_beams": 2}, {"stop": ["ab"]}], ids=str)
def test_a_request_can_be_cancelled_at_any_time(gru: House, steps: int, options: dict[str, Any]) -> None:
    engine = gru.engine(max_batch=3)
    filler = engine.submit(gru.request(max_tokens=1000))
    generation = engine.submit(gru.request(TEXT * 3, max_tokens=20, **options))
    for _ in range(steps):
        engine.step()
    engine.cancel(generation)
    engine.step()
    engine.cancel(generation)
    engine.step()
    assert generation.done
    assert engine.stats().slots == 1
    count = generation.request.options.n
    assert all(len(sample.reasons) == 1 for sample in gather(generation.take(), count))
    engine.cancel(filler)
    finish(engine)
    assert (engine.stats().slots, engine.stats().waiting) == (0, 0)


def test_closing_the_iterator_frees_the_slots(gru: House) -> None:
    engine = gru.engine()
    events = engine.run(gru.request())
    next(events)
    assert engine.stats().slots == 1
    events.close()
    assert engine.stats().slots == 0


def test_a_decoder_that_fails_ends_everybody_and_is_not_hidden(gru: House) -> None:
    class Broken(TorchDecoder):
        def step(self, slots: Sequence[int], ids: Sequence[int]) -> np.ndarray:
            if len(slots) > 2:
                raise RuntimeError("the power is out")
            return super().step(slots, ids)

    engine = Engine(Broken(gru.model), gru.tokenizer)
    told: list[Generation] = []
    generations = [engine.submit(gru.request(seed=seed, n=2), told.append) for seed in range(2)]
    with pytest.raises(RuntimeError, match="the power is out"):
        while engine.step():
            pass
    for generation in generations:
        assert generation.done and isinstance(generation.error, RuntimeError)
        assert [sample.reasons for sample in gather(generation.take(), 2)] == [["error"]] * 2
    assert set(told) == set(generations)
    assert not engine.step() and engine.stats().slots == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": ()}, "The prompt is empty"),
        ({"prompt": (0, 99)}, "Token 99 of the prompt is outside the vocabulary of 29 tokens"),
        ({"prompt": (0, -1)}, "Token -1 of the prompt is outside"),
        ({"num_beams": 33}, "num_beams = 33: no more than 32"),
        ({"banned_tokens": [29]}, "token 29 is outside"),
        ({"logit_bias": dict.fromkeys(range(28), -100)}, "ban all 29 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_up_front(gru: House, change: dict[str, Any], sentence: str) -> None:
    prompt = change.pop("prompt", (0,))
    with pytest.raises(ConfigError, match=sentence):
        gru.engine().submit(Request(prompt, gru.request(**change).options))


def test_no_more_slots_are_used_than_the_decoder_has(gru: House) -> None:
    class Small(TorchDecoder):
        max_slots = 2

        def _new_slot(self, state: Any) -> int:
            assert len(self._slots) < 2
            return super()._new_slot(state)

    engine = Engine(Small(gru.model), gru.tokenizer)
    assert engine.max_batch == 2
    requests = [gru.request(n=3), gru.request(num_beams=2), gru.request(best_of=4, n=2), gru.request(TEXT * 4)]
    told = finish(engine, *[engine.submit(request) for request in requests])
    for samples, request in zip(told, requests, strict=True):
        assert [each.facts for each in samples] == alone(gru, request)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": (0.5, 0.0, 1.5), "top_k": 5},
        {"temperature": 0.7, "top_p": 0.8, "min_p": 0.02, "logit_bias": {3: 4.0}},
        {"typical_p": 0.6, "repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    ],
    ids=["plain", "greedy", "turns", "nucleus", "penalties"],
)
def test_the_reported_probabilities_are_those_that_tokens_are_drawn_with(gru: House, options: dict[str, Any]) -> None:
    settings = SamplingOptions.model_validate(options)
    sampler = Sampler(settings, gru.tokenizer)
    size = gru.tokenizer.vocab_size
    logits = np.random.default_rng(3).normal(size=(1, size)).astype(np.float32)
    context = SamplingContext.after((1, 2, 3), (4, 5, 5, 6), settings, size)
    probabilities = sampler.probabilities(logits, [context])[0]
    borders = np.cumsum(probabilities)
    assert borders[-1] == pytest.approx(1.0)
    for number in np.linspace(0.001, 0.999, 333).tolist():
        assert sampler.draw(logits, [context], [number]) == [int(borders.searchsorted(number, "right"))]


def test_the_logits_after_a_prompt_are_kept_on_request(house: House) -> None:
    request = house.request("the quick ", max_tokens=0, more={"keep_logits": True})
    engine = house.engine()
    generation = engine.submit(request)
    while engine.step():
        pass
    decoder = house.decoder()
    expected = decoder.prefill(decoder.open(), request.prompt)[-1:]
    assert generation.logits is not None and np.array_equal(generation.logits, expected)
    assert engine.submit(house.request("the ")).logits is None
