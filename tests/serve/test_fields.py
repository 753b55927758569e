"""Every field of OpenAI's API: values that ask for nothing are accepted, what cannot be done is refused by name."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import pytest
from fastapi.exceptions import RequestValidationError
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionMessage,
    ChatCompletionStreamOptionsParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampled,
    ScoreRequest,
    TokenizeRequest,
)
from serve.http_errors import error_response_for

USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}

EITHER: dict[str, tuple[list[Any], list[Any]]] = {
    # Field → values that ask for nothing more than what is done without it, and values that are refused.
    "frequency_penalty": ([0, 0.0], [True, "much"]),
    "logit_bias": ([{}], [{"5": True}, {"x": 1}, [1]]),
    "max_tokens": ([300], [True, -1, "few", 1.5]),
    "n": ([1], [True, 0, "two"]),
    "presence_penalty": ([0], [False, 200]),
    "seed": ([-1], [True, -2, "x"]),
    "stop": (["", [], [""]], [3, ["a", ""], [1]]),
    "stream": ([False], ["maybe", 3]),
    "stream_options": ([{}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": False}],
                       [{"include_obfuscation": True}, 3, {"x": 1}]),
    "temperature": ([0.8], [True, [True], 500, "warm"]),
    "top_p": ([1], [True, 2, -1]),
    "user": (["", "somebody"], [3]),
    "metadata": ([{}, {"a": "b"}], [{"a": 1}, "x"]),
    "model": (["gru"], [3]),
    "top_k": ([0, -1], [True, False, -2]),
}  # fmt: skip
COMPLETIONS: dict[str, tuple[list[Any], list[Any]]] = {
    **EITHER,
    "best_of": ([1], [True, 0]),
    "echo": ([False], ["perhaps"]),
    "logprobs": ([False], [True, 21]),
    "prompt": ([""], [True, [True], [1, "a"], 3, [], [1.5], ["a", None]]),
    "suffix": ([""], ["x"]),
}
CHAT: dict[str, tuple[list[Any], list[Any]]] = {
    **EITHER,
    "audio": ([], [{"voice": "x", "format": "wav"}, {}]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logprobs": ([False], [5, "perhaps"]),
    "max_completion_tokens": ([300], [True, -1]),
    "messages": ([], [[], [{"role": "tool", "content": "x"}], "x"]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "moderation": ([], [{"model": "m"}]),
    "parallel_tool_calls": ([True, False], ["x"]),
    "prediction": ([{"type": "content", "content": "x"}], ["x"]),
    "prompt_cache_key": (["x"], [3]),
    "prompt_cache_options": ([{"mode": "explicit"}], ["x"]),
    "prompt_cache_retention": (["24h"], [3]),
    "reasoning_effort": (["none"], ["high", ""]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]),
    "safety_identifier": (["x"], [3]),
    "service_tier": (["auto", "default"], ["flex"]),
    "store": ([False], [True, 0]),
    "tool_choice": (["none", "auto"], ["required", TOOL]),
    "tools": ([[]], [[TOOL], {}]),
    "top_logprobs": ([0], [True, 2]),
    "verbosity": (["medium"], ["low"]),
    "web_search_options": ([], [{}]),
}
MESSAGE: dict[str, tuple[list[Any], list[Any]]] = {
    "annotations": ([[]], [[{"type": "url_citation"}]]),
    "audio": ([], [{"id": "x"}]),
    "content": (["", [], [{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}]],
                [3, [3], True, *([{"type": kind}] for kind in ("image_url", "input_audio", "file", "refusal"))]),
    "function_call": ([], [{"name": "f", "arguments": ""}]),
    "name": (["x"], [3]),
    "refusal": ([""], ["I cannot."]),
    "role": ([], ["tool", "function", 3]),
    "tool_calls": ([[]], [[{"id": "x"}]]),
}  # fmt: skip
REQUIRED = ("messages", "role")


def test_the_tables_have_every_field_of_the_official_client():
    chat = get_type_hints(chat_params.CompletionCreateParamsBase).keys() | {"stream"}
    completions = get_type_hints(completion_params.CompletionCreateParamsBase).keys() | {"stream"}
    message = ChatCompletionMessage.model_fields.keys() | {
        *get_type_hints(ChatCompletionAssistantMessageParam), *get_type_hints(ChatCompletionUserMessageParam)
    }  # fmt: skip
    assert chat <= CHAT.keys() and completions <= COMPLETIONS.keys() and message <= MESSAGE.keys()
    assert get_type_hints(ChatCompletionStreamOptionsParam).keys() == {"include_usage", "include_obfuscation"}


def ask(cls: type[Sampled], body: dict[str, Any]) -> Sampled | dict[str, Any]:
    """The request, or the error that is answered."""
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        findings = [{**finding, "loc": ("body", *finding["loc"])} for finding in error.errors()]
        found: dict[str, Any] = error_response_for(RequestValidationError(findings)).body()["error"]
        return found


def bodies(index: int) -> list[Any]:
    tables = ((CompletionRequest, COMPLETIONS, {}), (ChatRequest, CHAT, {"messages": [USER]}))
    found = [
        pytest.param(cls, {**rest, name: value}, name, id=f"{cls.__name__} {name}={value!r}")
        for cls, table, rest in tables
        for name, values in table.items()
        for value in (*values[index], *([None] if index == 0 and name not in REQUIRED else []))
    ]
    return found + [
        pytest.param(ChatRequest, {"messages": [{**USER, "role": "assistant", name: value}]}, name,
                     id=f"message {name}={value!r}")
        for name, values in MESSAGE.items()
        for value in (*values[index], *([None] if index == 0 and name not in REQUIRED else []))
    ]  # fmt: skip


@pytest.mark.parametrize(("cls", "body", "name"), bodies(0))
def test_a_value_without_effect_is_accepted_and_changes_nothing(cls, body, name):
    plain = {"messages": [USER]} if cls is ChatRequest else {}
    one, other = ask(cls, body), ask(cls, plain)
    assert isinstance(one, cls) and isinstance(other, cls), one
    # The seed that is left out is drawn, to another number each time.
    assert ("seed" in one.model_fields_set) is False
    changed = {name: value for name, value in one.sampling(seed=1) if value != getattr(other.sampling(seed=1), name)}
    assert changed in ({}, {"top_p": 1.0}, {"best_of": 1})


@pytest.mark.parametrize(("cls", "body", "name"), bodies(1))
def test_an_unsupported_value_is_refused_by_name_with_the_terms_of_json(cls, body, name):
    error = ask(cls, body)
    assert isinstance(error, dict), "it was accepted"
    assert name in error["message"] and error["param"] is not None or name == "top_logprobs"
    python = r"\b(tuple|dict(ionary)?|None|True|False|NoneType|instance of|float|str|int|bool|pydantic|[A-Z]\w+Part)\b"
    assert not re.search(python, error["message"]), error["message"]


def test_none_of_the_probability_is_the_likeliest_token_alone():
    request = ask(CompletionRequest, {"top_p": 0})
    assert isinstance(request, CompletionRequest) and 0 < request.sampling().top_p < 1e-300


@pytest.mark.parametrize(("cls", "body"), [
    (TokenizeRequest, {"prompt": "x"}), (DetokenizeRequest, {"tokens": [1]}), (ScoreRequest, {"text": "x"}),
])  # fmt: skip
def test_options_that_are_off_are_accepted_where_nothing_is_sampled(cls, body):
    for value in (0, -1, None):
        assert cls.model_validate({**body, "top_k": value}) == cls.model_validate(body)
    with pytest.raises(ValidationError, match="top_k"):
        cls.model_validate({**body, "top_k": 5})


def test_two_names_of_one_thing_may_agree():
    assert isinstance(ask(ChatRequest, {"messages": [USER], "max_tokens": 3, "max_completion_tokens": 3}), ChatRequest)


def test_only_an_assistant_may_have_said_nothing():
    for role in ("user", "system", "developer"):
        error = ask(ChatRequest, {"messages": [{"role": role, "content": None}]})
        assert isinstance(error, dict) and error["message"] == (
            f"messages.0: content is missing in a message of role {role}."
        )
