"""Bodies of requests. What is drawn and how is declared in `SamplingOptions` alone: requests inherit it.

A field that is null counts as left out. A field that nobody knows, or that OpenAI has and this server has not, is
refused.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from lm.config import Options, validate
from lm.generation.options import MOST_ALTERNATIVES, SamplingOptions
from lm.tokenizers.base import UnknownPolicy

UNSUPPORTED = {
    "suffix": "models write forwards only.",
    "tools": "models call no functions.",
    "tool_choice": "models call no functions.",
    "functions": "models call no functions.",
    "function_call": "models call no functions.",
    "parallel_tool_calls": "models call no functions.",
    "response_format": "text is not held to a format.",
    "audio": "models write text only.",
    "modalities": "models write text only.",
    "prediction": "it would change nothing but speed.",
    "reasoning_effort": "models do not reason apart from what they write.",
    "verbosity": "use max_tokens and stop.",
    "store": "nothing is stored.",
    "service_tier": "there is one tier.",
    "web_search_options": "models search nothing.",
    "use_beam_search": "use num_beams.",
    "length_penalty": "hypotheses are compared by their whole likelihood.",
}
"""Fields of OpenAI's API, and of servers like it, that mean something which this server does not do."""

MOST_AT_ONCE = 16_384
"""Entries of a list that pydantic checks in one call, in which no other thread runs."""


def _in_parts(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, list) or len(value) <= MOST_AT_ONCE:
        return check(value)
    checked: list[Any] = []
    for begin in range(0, len(value), MOST_AT_ONCE):
        checked += check(value[begin : begin + MOST_AT_ONCE])
    return tuple(checked)


Token = Annotated[int, Field(ge=0, lt=2**31)]
# The first fault of a long list is told, and not each.
Ids = Annotated[tuple[Token, ...], Field(min_length=1, fail_fast=True), WrapValidator(_in_parts)]
Texts = Annotated[tuple[str, ...], Field(min_length=1, fail_fast=True), WrapValidator(_in_parts)]
Prompt = str | Ids | Texts | Annotated[tuple[Ids, ...], Field(min_length=1, fail_fast=True)]
MOST_ITEMS = 10_000
"""Entries of a list or map that is no prompt."""
MOST_FIELDS = 1000


def _as_sent(schema: dict[str, Any]) -> None:
    """What OpenAI's clients may send beside the types of the fields: null, one stop text, no seed."""
    for name in SamplingOptions.model_fields:
        about = schema["properties"][name]
        kept = {key: about.pop(key) for key in ("title", "description", "default") if key in about}
        choices = about.get("anyOf", [dict(about)])
        if name == "stop":
            choices = [{"type": "string", "minLength": 1}, *choices]
            choices[1]["items"] = {"type": "string", "minLength": 1}
        if name == "seed":
            del kept["default"]
            kept["description"] += " Left out: a new one, told in the answer."
        about.clear()
        about.update(kept, anyOf=[*(choice for choice in choices if choice != {"type": "null"}), {"type": "null"}])


class Part(Options):
    """Base of all that is sent. Bodies of nothing but faults are refused before each fault costs time."""

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if len(value) > MOST_FIELDS:
                raise ValueError(f"{len(value):,} fields are too many")
            for name, part in value.items():
                if isinstance(part, list | dict) and len(part) > MOST_ITEMS and name not in ("prompt", "tokens"):
                    raise ValueError(f"{name[:50]} has {len(part):,} entries: {MOST_ITEMS:,} is the most")
        return value


class Body(Part):
    """Base of all requests: null is the same as left out."""

    model: str | None = Field(None, description="Which model; see GET /v1/models. Default: the first.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields.keys() | UNSUPPORTED.keys()
        return {name: part for name, part in value.items() if part is not None or name not in known}


class StreamOptions(Part):
    """What a stream tells beside the text."""

    include_usage: bool = Field(False, description="End with an event that counts the tokens.")


class Sampled(Body, SamplingOptions):
    """What requests for text have in common."""

    model_config = ConfigDict(json_schema_extra=_as_sent)

    stream: bool = Field(False, description="Send the text as it is written, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="What a stream tells beside the text.")
    user: str | None = Field(None, description="Taken and not used.")
    unknown: UnknownPolicy | None = Field(
        None,
        description="What symbols of the prompt that the model never saw become; default: as the model was trained.",
    )
    return_token_ids: bool = Field(False, description="Tell the ids of the tokens too.")

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, **changed: Any) -> SamplingOptions:
        """The options alone; a seed that was left out is chosen here."""
        given = {name: getattr(self, name) for name in SamplingOptions.model_fields if name in self.model_fields_set}
        given.setdefault("seed", secrets.randbelow(2**31))
        return validate(SamplingOptions, {**given, **changed})


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Prompt = Field(
        "", description="A text, a list of texts, the ids of a text's tokens, or a list of such lists."
    )
    echo: bool = Field(False, description="Begin with the prompt; with logprobs its tokens are scored too.")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Part):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Part):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: str | Annotated[tuple[TextPart, ...], Field(fail_fast=True)] = Field(description="What is said.")
    name: str | None = Field(None, description="Taken and not used.")

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)] = Field(description="The chat so far.")
    max_completion_tokens: int | None = Field(None, ge=0, description="Another name of max_tokens.")
    logprobs: bool = Field(False, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="With logprobs: this many alternatives of each token."
    )
    metadata: dict[str, str] | None = Field(None, description="Taken and not used.")

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens is not None and "max_tokens" in self.model_fields_set:
            raise ValueError("max_completion_tokens and max_tokens are two names of one thing: give one")
        return self


class TokenizeRequest(Body):
    """POST /tokenize."""

    prompt: str = Field(description="A text.")
    add_special_tokens: bool = Field(False, description="Put the start token in front, as the server does itself.")
    return_token_strs: bool = Field(False, description="Tell the text of each token too.")


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[tuple[Token, ...], Field(fail_fast=True), WrapValidator(_in_parts)] = Field(
        description="Ids of tokens."
    )


class ScoreRequest(Body):
    """POST /v1/score."""

    text: str = Field(min_length=1, description="The text to score; its first token is predicted from the start token.")
    top: int = Field(0, ge=0, le=MOST_ALTERNATIVES, description="Tell so many alternatives of each token.")
