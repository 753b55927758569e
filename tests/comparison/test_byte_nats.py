"""The nats of each byte: their sum is the report's figure, and each cost is at its place."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.comparison.byte_nats import byte_nats
from lm.config import Section
from lm.corpora import encode_text
from lm.errors import TokenizerError
from lm.registry import TOKENIZERS
from lm.spelling import BYTE_NATS, adaptive_costs, adaptive_nats
from lm.tokenizers.base import Tokenizer

LEARNED = "the cat sat on a mat\nthe dog ran\tto the café\n" * 40
TEXTS = (
    "the cat ran\n",
    "  the  crocodile sat \n\n on\ta mat",
    "naïve 日本 🙂 the café\r\n\r\n",
    "<unk> and <eos> the <unk>\n",
    "\n",
    "x",
)


def trained(kind: str, **options: object) -> Tokenizer:
    section = Section.model_validate({"type": kind, **options})
    return TOKENIZERS.resolve(kind).train([LEARNED], section.resolve("tokenizer"))


@pytest.fixture(scope="module", params=["byte", "char", "subword", "word"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param, **({"size": 300} if request.param == "subword" else {}))


def nats_of(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, float]:
    """The nats of the bytes, and the nats of the whole text as a report sums them."""
    part = encode_text("text", text, tokenizer)
    token_nats = np.random.default_rng(1).exponential(2.0, part.counts.tokens)
    whole = part.counts.whole_nats(float(token_nats.sum()))
    assert whole is not None
    return byte_nats(tokenizer, text, part.ids[1:], token_nats), whole


@pytest.mark.parametrize("text", TEXTS)
def test_the_nats_of_all_bytes_are_those_of_the_report(tokenizer: Tokenizer, text: str) -> None:
    nats, whole = nats_of(tokenizer, text)
    assert len(nats) == len(text.encode("utf-8")) and (nats >= 0).all()
    assert nats.sum() == pytest.approx(whole, rel=1e-12)


@given(st.text(st.sampled_from("the cat\n é日🙂<unk>\r\t"), min_size=1))
def test_the_sum_holds_for_any_text(text: str) -> None:
    for tokenizer in ANY:
        if len(tokenizer.encode(text)):
            nats, whole = nats_of(tokenizer, text)
            assert nats.sum() == pytest.approx(whole, rel=1e-11)


ANY = [trained("char"), trained("word"), trained("subword", size=300)]


def test_a_token_is_spread_evenly_over_its_bytes() -> None:
    nats = byte_nats(trained("char"), "é\n", np.array([0, 1]), np.array([4.0, 1.0]))
    # "é" is in the vocabulary ("café"), so nothing is spelled.
    assert trained("char").encode("é")[0] != trained("char").unknown_id
    assert nats[:2].tolist() == [2.0, 2.0] and nats[2] == 1.0


def test_an_unknown_character_costs_eight_bits_a_byte_at_its_place() -> None:
    tokenizer = trained("char")
    nats = byte_nats(tokenizer, "a日a", tokenizer.encode("a日a"), np.array([1.0, 3.0, 1.0]))
    assert nats.tolist() == pytest.approx([1.0, *([1.0 + BYTE_NATS] * 3), 1.0])


def test_an_unknown_word_pays_for_its_spelling_at_its_place() -> None:
    tokenizer = trained("word")
    known, unknown = "the cat sat on\n", "the zyx sat on\n"
    costs = [
        byte_nats(tokenizer, text, tokenizer.encode(text), np.ones(5)) for text in (known, unknown)
    ]  # fmt: skip
    more = costs[1] - costs[0]
    assert (more[4:7] > 1).all() and np.abs(np.delete(more, [4, 5, 6])).max() < 1e-9


def test_bytes_of_one_character_have_their_own_tokens() -> None:
    nats = byte_nats(trained("byte"), "é", np.array([0xC3, 0xA9]), np.array([5.0, 0.5]))
    assert nats.tolist() == [5.0, 0.5]


@pytest.mark.parametrize("kind", ["char", "word"])
def test_symbols_that_were_left_out_are_an_error(kind: str) -> None:
    tokenizer = trained(kind, unknown="skip")
    text = "the 日 cat"
    with pytest.raises(TokenizerError, match="do not cover the text"):
        byte_nats(tokenizer, text, tokenizer.encode(text), np.ones(len(tokenizer.encode(text))))


def test_the_spans_of_tokens_are_their_bytes(tokenizer: Tokenizer) -> None:
    text = "the café ran\nto 日\n"
    data = text.encode("utf-8")
    spans = tokenizer.byte_spans(text, tokenizer.encode(text))
    parts = [data[begin:end] for begin, end in spans.tolist()]
    if tokenizer.lossless:
        assert b"".join(parts) == data
    else:
        assert parts == [word.encode() for word in ("the", "café", "ran", "\n", "to", "日", "\n")]


def test_the_default_spans_give_a_character_to_the_token_that_completes_it() -> None:
    tokenizer = trained("byte")
    spans = Tokenizer.byte_spans(tokenizer, "aé", tokenizer.encode("aé"))
    assert spans.tolist() == [[0, 1], [1, 1], [1, 3]]


def test_the_costs_of_an_adaptive_code_in_order_sum_to_the_cost_of_the_counts() -> None:
    sequence = [*"aababcaadca"]
    costs = adaptive_costs(sequence, "a", lambda symbol: 7.0)
    assert costs.sum() == pytest.approx(adaptive_nats(Counter(sequence), "a", lambda symbol: 7.0))
    # A new symbol pays for its spelling once.
    assert costs[2] > 7 and costs[4] < 7 and math.isclose(costs[0], math.log(1 + 1 / 16))
