"""What tokens do not say about a text, and what it costs."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from lm.registry import TOKENIZERS
from lm.spelling import BYTE_NATS, NEW, Characters, Spelling, adaptive_nats, spelling_nats
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.word import WordOptions, WordTokenizer

TEXT = "the cat sat\n on  the mat .\n\n\ta dog\r\n" * 3


def cost(tokenizer: Tokenizer, text: str) -> float:
    unknown_counts: Counter[str] = Counter()
    ids = tokenizer.encode(text, unknown_counts=unknown_counts)
    return spelling_nats(tokenizer, text, ids, unknown_counts)


def words(text: str = TEXT, **options: object) -> WordTokenizer:
    return WordTokenizer.train([text], WordOptions.model_validate(options))


@pytest.mark.parametrize("kind", ["byte", "char", "subword"])
def test_tokens_that_determine_the_text_leave_nothing_to_say(kind: str) -> None:
    cls = TOKENIZERS.resolve(kind)
    options = cls.Options(size=290) if kind == "subword" else cls.Options()
    assert cost(cls.train([TEXT], options), TEXT) == 0.0


def test_an_unknown_character_costs_its_bytes() -> None:
    cls = TOKENIZERS.resolve("char")
    assert cost(cls.train(["ab"], cls.Options()), "aé☃a") == pytest.approx(5 * math.log(256))


def test_the_adaptive_code_is_what_its_steps_add_up_to() -> None:
    # " " counts as seen once, all that is new has the weight 1/16; then " ", "\t", " ", "\t", "\t".
    steps = [1 / (1 + NEW), NEW / (2 + NEW), 2 / (3 + NEW), 1 / (4 + NEW), 2 / (5 + NEW)]
    nats = adaptive_nats({" ": 2, "\t": 3}, " ", lambda symbol: 7.0)
    assert nats == pytest.approx(7 - math.fsum(map(math.log, steps)))
    assert adaptive_nats({}, " ") == 0


def test_random_white_space_costs_its_entropy_and_regular_one_next_to_nothing() -> None:
    source = random.Random(1)
    text = "".join("a" + source.choice(" \t") for _ in range(20_000))
    # One bit for each a, and its space or tab.
    assert cost(words(text), text) / math.log(2) / len(text) == pytest.approx(0.5, abs=0.003)
    wikitext = " \n = Title = \n \n Some words , and more . \n" * 1000
    assert cost(words(wikitext), wikitext) / math.log(2) / len(wikitext) < 0.006


@pytest.mark.parametrize("seed", range(20))
def test_gaps_are_counted_as_the_definition_says_however_the_text_is_cut(seed: int) -> None:
    source = random.Random(seed)
    parts = ["a", "bc", "é", " ", "  ", "\t", "\n", "\r\n", "\u3000", "\xa0", " " * 9, "\x1c"]
    text = "a" + "".join(source.choice(parts) for _ in range(50))
    gaps: dict[tuple[bool, bool], Counter[str]] = {pair: Counter() for pair in itertools.product((0, 1), (0, 1))}
    place, newline = 0, True
    for found in re.finditer(r"\n|\S+", text):
        gaps[newline, found[0] == "\n"][text[place : found.start()]] += 1
        place, newline = found.end(), found[0] == "\n"
    gaps[newline, True][text[place:]] += 1
    expected = sum(
        adaptive_nats(counts, "" if any(pair) else " ", lambda gap: (len(gap.encode()) + 1) * BYTE_NATS)
        for pair, counts in gaps.items()
    )
    # All newlines are newlines.
    expected += adaptive_nats({"newline": text.count("\n")}, "newline")
    tokenizer, spelling = words(text), Spelling(words(text))
    for piece in re.findall(r"\s+|\S+", text):
        spelling.add(piece, tokenizer.encode(piece), Counter())
    assert spelling.nats() == pytest.approx(expected) == pytest.approx(cost(tokenizer, text))


def test_the_character_model_gives_all_words_together_no_more_than_certainty() -> None:
    model = Characters(["ab", "ba", "abba"])
    shares = [
        float(np.exp(-model.nats(["".join(letters) for letters in itertools.product("ab", repeat=length)])).sum())
        for length in range(1, 13)
    ]
    assert 0.5 < sum(shares) < 1
    # A character that no word has costs its bytes and more; a word costs the same in any company.
    assert model.nats(["☃"])[0] > 3 * math.log(256)
    assert model.nats(["☃", "ab", "b"])[[1, 2]].tolist() == [model.nats(["ab"])[0], model.nats(["b"])[0]]


def test_words_outside_the_vocabulary_are_spelled_and_a_spelled_unk_is_not() -> None:
    tokenizer = words("the cat sat on the mat")
    known = cost(tokenizer, "the cat " * 100)
    spelled = Characters(["the", "cat", "sat", "on", "mat"]).nats(["hat", "tom"])
    assert cost(tokenizer, "the hat the tom " * 50) - known == pytest.approx(50 * spelled.sum(), rel=0.01)
    assert 0 < cost(tokenizer, "the <unk> " * 100) - known < 10
    # As is a start token.
    assert 0 < cost(tokenizer, "the <eos> " * 100) - known < 10


def test_symbols_that_were_left_out_cannot_be_paid_for() -> None:
    tokenizer = words("the cat", unknown="skip")
    assert cost(tokenizer, "the dog") == math.inf
    assert cost(tokenizer, "the cat") < math.inf


def test_of_an_unknown_way_to_lose_text_nothing_is_known() -> None:
    tokenizer = words("the cat")
    tokenizer.words = None
    assert cost(tokenizer, "the cat") == math.inf
