"""/tokenize, /detokenize, /tokenizer_info and /v1/score."""

from __future__ import annotations

import math

import pytest

import lm
from tests.serve.conftest import CONTEXT, MODELS, Server, make_text, refusal

pytestmark = pytest.mark.slow
TEXT = "the cat sat on dén ☂.\n"


@pytest.mark.parametrize("model", list(MODELS))
def test_ids_are_those_of_the_tokenizer_and_go_back_to_the_text(server: Server, runs, model):
    tokenizer = lm.load(model, runs_dir=runs).tokenizer
    answer = server.post("/tokenize", model=model, prompt=TEXT, return_token_strs=True)
    assert answer["tokens"] == tokenizer.encode(TEXT).tolist()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == (CONTEXT if model == "transformer" else None)
    back = server.post("/detokenize", model=model, tokens=answer["tokens"])["prompt"]
    assert back == tokenizer.decode(answer["tokens"])
    started = server.post("/tokenize", model=model, prompt=TEXT, add_special_tokens=True)["tokens"]
    assert started == [tokenizer.start_id, *answer["tokens"]]


@pytest.mark.parametrize("model", list(MODELS))
def test_the_start_token_has_a_name_that_is_its_one_token(server: Server, runs, model):
    info = server.request("GET", f"/tokenizer_info?model={model}")[2]
    tokenizer = lm.load(model, runs_dir=runs).tokenizer
    assert info["tokenizer_class"] == tokenizer.type and info["vocab_size"] == tokenizer.vocab_size
    for name in ("bos_token", "eos_token"):
        assert server.post("/tokenize", model=model, prompt=info[name])["tokens"] == [tokenizer.start_id]


def test_an_id_outside_the_vocabulary_is_400(server: Server):
    status, error = refusal(server, {"tokens": [9999]}, "/detokenize")
    assert status == 400 and "outside the vocabulary" in error["message"]


@pytest.mark.parametrize("model", list(MODELS))
def test_a_score_is_that_of_the_evaluation(server: Server, runs, model):
    text = make_text(1, seed=8)[: CONTEXT - 1] if model == "transformer" else make_text(40, seed=8)
    answer = server.post("/v1/score", model=model, text=text, top=3)
    report = lm.load(model, runs_dir=runs).evaluate(text=text)
    assert answer["loss"] == pytest.approx(report.loss, rel=1e-5)
    assert answer["perplexity"] == pytest.approx(report.perplexity, rel=1e-5)
    assert answer["bits_per_byte"] == pytest.approx(report.bits_per_byte, rel=1e-5)
    assert answer["bits_per_char"] == pytest.approx(report.bits_per_char, rel=1e-5)
    assert (answer["characters"], answer["bytes"], len(answer["tokens"])) == (
        report.characters, report.bytes, report.tokens
    )  # fmt: skip


def test_a_scored_token_has_its_offset_its_surprise_and_the_alternatives(server: Server):
    answer = server.post("/v1/score", model="gru", text="the cat", top=2)["tokens"]
    assert "".join(token["token"] for token in answer) == "the cat"
    assert [token["offset"] for token in answer] == list(range(7))
    for token in answer:
        assert token["surprise"] == pytest.approx(-token["logprob"] / math.log(2))
        assert len(token["top"]) == 2 and token["top"][0]["logprob"] >= max(
            token["logprob"], token["top"][1]["logprob"]
        )


def test_a_text_without_a_known_token_has_no_score(server: Server):
    assert refusal(server, {"model": "words", "text": "   "}, "/v1/score")[0] == 400
    assert refusal(server, {"model": "words", "text": ""}, "/v1/score")[0] == 400
