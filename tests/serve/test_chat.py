"""POST /v1/chat/completions, as the official client sends it."""

from __future__ import annotations

import jinja2
import pytest

from serve.engines.codec import CHAT_TEMPLATE, PLAIN_TEMPLATE, chat_text, plain_chat_text
from tests.serve.conftest import Server, refusal

MESSAGES = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "sat on"}]
WRITTEN = "System: the cat\nUser: sat on\nAssistant:"


def test_a_chat_is_written_down_as_lines_and_the_template_says_the_same():
    assert chat_text([(message["role"], message["content"]) for message in MESSAGES]) == WRITTEN
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    assert template.render(messages=MESSAGES, add_generation_prompt=True) == WRITTEN
    # A model that learned conversations reads plain turns.
    template = jinja2.Environment().from_string(PLAIN_TEMPLATE)
    turns = [*MESSAGES, {"role": "assistant", "content": " the mat\n"}]
    plain = plain_chat_text([(message["role"], message["content"]) for message in turns])
    assert plain == template.render(messages=turns, add_generation_prompt=True) == "the cat\n\nsat on\nthe mat\n\n"


@pytest.mark.slow
def test_a_reply_continues_the_chat_as_plain_text(server: Server):
    ask = {"model": "gru", "max_tokens": 30, "seed": 3}
    done = server.openai.chat.completions.create(messages=MESSAGES, **ask)
    text = server.openai.completions.create(prompt=WRITTEN, **ask).choices[0].text
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert (done.object, done.id[:9]) == ("chat.completion", "chatcmpl-")
    assert done.usage is not None and done.usage.completion_tokens == 30


@pytest.mark.slow
def test_a_reply_ends_before_the_next_turn(server: Server):
    ids = server.post("/tokenize", model="pieces", prompt="\nUser:")["tokens"]
    # Nothing else can be drawn than, in turn, what spells the next turn.
    done = server.post(
        "/v1/chat/completions", model="pieces", messages=MESSAGES, max_tokens=len(ids) * 30, seed=1,
        logit_bias={str(token): 100 for token in set(ids)}, stop=["~"],
    )  # fmt: skip
    assert "\nUser:" not in done["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_a_stream_starts_with_the_role_and_joins_to_the_reply(server: Server):
    ask = {"model": "gru", "messages": MESSAGES, "max_completion_tokens": 30, "seed": 3, "n": 2}
    whole = server.openai.chat.completions.create(**ask)
    texts = {0: "", 1: ""}
    roles, reasons = [], []
    for chunk in server.openai.chat.completions.create(stream=True, **ask):
        (choice,) = chunk.choices
        roles += [choice.delta.role] if choice.delta.role else []
        reasons += [choice.finish_reason] if choice.finish_reason else []
        texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 2 and reasons == ["length"] * 2


@pytest.mark.slow
def test_logprobs_have_bytes_and_alternatives(server: Server):
    done = server.openai.chat.completions.create(
        model="pieces", messages=MESSAGES, max_tokens=12, seed=1, logprobs=True, top_logprobs=3
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 12
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3 and bytes(entry.bytes or []).decode() == entry.token
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0


@pytest.mark.slow
def test_a_reply_can_be_sent_back_as_the_client_has_it(server: Server):
    ask = {"model": "gru", "max_tokens": 10, "seed": 3}
    first = server.openai.chat.completions.create(messages=MESSAGES, **ask).choices[0].message
    again = {"role": "user", "content": "the"}
    plain = {"role": "assistant", "content": first.content}
    replies = [
        server.openai.chat.completions.create(messages=[*MESSAGES, reply, again], **ask).choices[0].message.content
        for reply in (first, first.model_dump(), plain)
    ]
    assert len(set(replies)) == 1 and first.model_dump().keys() > plain.keys()


@pytest.mark.slow
def test_content_may_come_in_parts(server: Server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "sat "}, {"type": "text", "text": "on"}]}]
    ask = {"model": "gru", "max_tokens": 10, "seed": 3}
    joined = [{"role": "user", "content": "sat on"}]
    replies = [server.post("/v1/chat/completions", messages=each, **ask)["choices"] for each in (parts, joined)]
    assert replies[0] == replies[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"tools": [{"type": "function"}]}, "tools is not supported: models do not call functions."),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url is not supported"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "mean the same: give one"),
        ({"max_completion_tokens": 20_000}, "at most 16,384"),
        ({"prompt": "x"}, "Unknown field 'prompt'."),
    ],
)
def test_an_unsupported_value_is_400_with_the_reason(server: Server, body, sentence):
    status, error = refusal(server, {"model": "gru", "messages": MESSAGES, **body}, "/v1/chat/completions")
    assert status == 400 and sentence in error["message"], error
