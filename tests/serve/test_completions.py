"""POST /v1/completions, as the official client sends it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess

import pytest

import lm
from lm.generation.options import SamplingOptions
from serve.api.requests import CompletionRequest
from tests.serve.conftest import Server, refusal

pytestmark = pytest.mark.slow

SEEDED = {"max_tokens": 40, "seed": 7}
EXTRA = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}


def alone(runs, name, prompt, index=0, **options):
    """What the library gives in this process."""
    run = lm.load(name, runs_dir=runs)
    request = run.request(prompt, SamplingOptions(n=index + 1, **options))
    return "".join(event.text for event in run.engine(max_batch=index + 1).run(request) if event.index == index)


@pytest.mark.parametrize("model", ["gru", "transformer", "words", "pieces"])
def test_request_and_seed_give_the_text_of_the_library(server: Server, runs, model):
    done = server.openai.completions.create(model=model, prompt="the cat", **SEEDED, extra_body=EXTRA)
    (choice,) = done.choices
    assert choice.text == alone(runs, model, "the cat", **SEEDED, **EXTRA)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (done.object, done.model, done.id[:5]) == ("text_completion", model, "cmpl-")
    assert done.usage is not None
    prompt = server.post("/tokenize", model=model, prompt="the cat")["count"]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt, 40)
    assert done.usage.total_tokens == prompt + 40


def test_a_stream_joins_to_the_same_text_and_ends_with_usage(server: Server, runs):
    stream = server.openai.completions.create(
        model="gru", prompt="a ☂ mat", stream=True, stream_options={"include_usage": True}, **SEEDED
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone(runs, "gru", "a ☂ mat", **SEEDED)
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done_and_tells_no_usage_unasked(server: Server):
    body = {"model": "gru", "prompt": "the", "max_tokens": 3, "stream": True}
    status, headers, text = server.request("POST", "/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text.endswith("data: [DONE]\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert all("usage" not in event for event in events)


def test_prompts_samples_and_ids_are_numbered_in_order(server: Server, runs):
    prompts = ["the cat", "a mat"]
    ids = [server.post("/tokenize", prompt=prompt, add_special_tokens=True)["tokens"] for prompt in prompts]
    for given in (prompts, ids):
        done = server.openai.completions.create(model="gru", prompt=given, n=3, **SEEDED)
        assert [choice.index for choice in done.choices] == list(range(6))
        expected = [alone(runs, "gru", prompt, index, **SEEDED) for prompt in prompts for index in range(3)]
        assert [choice.text for choice in done.choices] == expected
    streamed = [""] * 6
    for chunk in server.openai.completions.create(model="gru", prompt=prompts, n=3, stream=True, **SEEDED):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_token_ids_are_read_exactly_as_they_are(server: Server, runs):
    ids = server.post("/tokenize", prompt="the cat")["tokens"]
    bare = server.openai.completions.create(model="gru", prompt=ids, **SEEDED)
    assert bare.usage is not None and bare.usage.prompt_tokens == len(ids)
    echoed = server.openai.completions.create(model="gru", prompt=ids, echo=True, max_tokens=0)
    assert echoed.choices[0].text == "the cat"


def test_echo_with_logprobs_scores_the_prompt_after_a_leading_null(server: Server, runs):
    ids = server.post("/tokenize", prompt="the cat", add_special_tokens=True)["tokens"]
    done = server.openai.completions.create(
        model="gru", prompt=ids, echo=True, logprobs=2, max_tokens=1, temperature=0, seed=1234
    )
    told = done.choices[0].logprobs
    assert told is not None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 9
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert "".join(told.tokens) == done.choices[0].text
    assert told.text_offset == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob <= 0 and 2 <= len(top) <= 3
    # The last was drawn greedily, so it is the likeliest.
    assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())
    report = lm.load("gru", runs_dir=runs).evaluate(text="the cat")
    assert -math.fsum(told.token_logprobs[1:-1]) == pytest.approx(report.loss * 7, rel=1e-4)


def test_echo_of_a_text_needs_no_tokens(server: Server):
    done = server.openai.completions.create(model="words", prompt="the  cat qqq", echo=True, max_tokens=0)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("the  cat qqq", "length")
    assert done.usage is not None and done.usage.completion_tokens == 0


def test_logprobs_of_a_stream_are_those_of_the_whole(server: Server):
    asked = {"model": "pieces", "prompt": "dén", "logprobs": 3, "echo": True, **SEEDED}
    whole = server.openai.completions.create(**asked).choices[0]
    text, tokens, logprobs, offsets = "", [], [], []
    for chunk in server.openai.completions.create(stream=True, **asked):
        (choice,) = chunk.choices
        text += choice.text
        if choice.logprobs is not None:
            tokens += choice.logprobs.tokens
            logprobs += choice.logprobs.token_logprobs
            offsets += choice.logprobs.text_offset
    assert whole.logprobs is not None and text == whole.text
    assert (tokens, logprobs, offsets) == (
        whole.logprobs.tokens, whole.logprobs.token_logprobs, whole.logprobs.text_offset
    )  # fmt: skip
    assert all(0 <= a <= b <= len(text) for a, b in zip(offsets, offsets[1:], strict=False))


def test_a_seed_left_out_is_chosen_and_told_and_gives_the_text_again(server: Server):
    first = server.post("/v1/completions", model="gru", prompt="the", max_tokens=60)
    second = server.post("/v1/completions", model="gru", prompt="the", max_tokens=60)
    again = server.post("/v1/completions", model="gru", prompt="the", max_tokens=60, seed=first["seed"])
    assert first["seed"] != second["seed"] and first["choices"][0]["text"] != second["choices"][0]["text"]
    assert again["choices"] == first["choices"]


def test_stop_texts_end_a_text_before_they_appear(server: Server):
    long = server.post("/v1/completions", model="gru", prompt="the", **SEEDED)["choices"][0]["text"]
    stop = long[10:13]
    for stops in (stop, [stop], ["~~", stop]):
        choice = server.post("/v1/completions", model="gru", prompt="the", stop=stops, **SEEDED)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (long[: long.index(stop)], "stop")


def test_a_bias_of_minus_100_bans_and_of_100_forces(server: Server):
    (letter,) = server.post("/tokenize", prompt="e")["tokens"]
    ask = {"model": "gru", "prompt": "the", "max_tokens": 30, "seed": 1}
    assert "e" not in server.post("/v1/completions", logit_bias={str(letter): -100}, **ask)["choices"][0]["text"]
    assert set(server.post("/v1/completions", logit_bias={str(letter): 100}, **ask)["choices"][0]["text"]) == {"e"}


def test_best_of_keeps_the_likeliest(server: Server):
    ask = {"model": "gru", "prompt": "the", "logprobs": 0, **SEEDED}
    best = server.post("/v1/completions", best_of=4, **ask)["choices"]
    every = server.post("/v1/completions", n=4, **ask)["choices"]
    means = {choice["text"]: math.fsum(choice["logprobs"]["token_logprobs"]) for choice in every}
    assert [choice["text"] for choice in best] == [max(means, key=means.__getitem__)]


def test_null_counts_as_left_out(server: Server):
    nulls = dict.fromkeys(
        ("best_of", "logit_bias", "logprobs", "n", "stop", "stream", "suffix", "temperature", "top_p", "user", "echo")
    )
    given = server.post("/v1/completions", model="gru", prompt="the", **SEEDED, **nulls)
    assert given["choices"] == server.post("/v1/completions", model="gru", prompt="the", **SEEDED)["choices"]


def test_ids_of_tokens_are_told_when_asked(server: Server):
    asked = {"model": "gru", "prompt": "the", "return_token_ids": True, **SEEDED}
    choice = server.post("/v1/completions", **asked)["choices"][0]
    assert server.post("/detokenize", tokens=choice["token_ids"])["prompt"] == choice["text"]


def test_plain_curl_gets_text_and_events(server: Server):
    curl = shutil.which("curl")
    assert curl is not None
    command = [curl, "-sS", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    body = {"prompt": "the", "max_tokens": 5, "seed": 3}
    done = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    text = json.loads(done.stdout)["choices"][0]["text"]
    assert len(text) == 5
    body["stream"] = True
    done = subprocess.run([*command, json.dumps(body), "-N"], capture_output=True, text=True, timeout=60, check=True)
    lines = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == text


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"suffix": "x"}, "suffix", "suffix is not supported: models write no text before a suffix."),
        ({"topk": 1}, "topk", "Unknown field 'topk'. Did you mean 'top_k'?"),
        ({"stream_options": {"include_use": True}}, "stream_options.include_use", "Unknown field"),
        ({"temperature": 500}, "temperature", "from 0 to 100"),
        ({"temperature": "warm"}, "temperature", "temperature = 'warm'"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens = -1: input should be greater than or equal to 0"),
        ({"max_tokens": 20_000}, "max_tokens", "at most 16,384"),
        ({"n": 17}, "n", "at most 16"),
        ({"n": 16, "prompt": ["a"] * 100}, "prompt", "is for 1,600 texts"),
        ({"best_of": 2, "n": 3}, None, "best_of 2 must not be less than n 3"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"num_beams": 33}, "num_beams", "num_beams = 33"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt", "at least 1 item"),
        ({"prompt": ["a", 1]}, "prompt", "prompt"),
        ({"prompt": [1, 10_000]}, None, "Token 10000 is outside the vocabulary"),
        ({"prompt": [-1]}, "prompt", "prompt"),
        ({"prompt": "☃", "unknown": "error"}, None, "Line 1, column 1: '☃' (U+2603) is outside the vocabulary"),
        ({"stop": ["a", ""]}, "stop", "must not be empty"),
        (
            {"stop": ["zz"] * 1001},
            "stop",
            "1,001 stop strings with 2,002 characters. The limit is 1,000 strings with",
        ),
        ({"stop": ["z" * 10_001]}, "stop", "1 stop strings with 10,001 characters"),
        ({"prompt": ["a" * 10_000] * 10, "echo": True, "logprobs": 20}, "logprobs", "2,100,000 log-probabilities"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "valid integer"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias", "finite number"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"seed": -2}, "seed", "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_done_is_400_and_names_the_field(server: Server, body, param, sentence):
    status, error = refusal(server, {"model": "gru", "prompt": "the", **body})
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert sentence in error["message"] and error["message"].endswith((".", "?")), error["message"]


def test_defaults_and_bounds_are_those_of_the_sampling_options():
    properties = CompletionRequest.model_json_schema()["properties"]
    own = SamplingOptions.model_json_schema()["properties"]
    assert own.keys() < properties.keys()
    request = CompletionRequest(prompt="a")
    for name, about in own.items():
        assert properties[name]["description"].startswith(about["description"])
        assert {"type": "null"} in properties[name]["anyOf"]
        assert getattr(request, name) == getattr(SamplingOptions(), name)
