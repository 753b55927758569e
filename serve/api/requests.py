"""Bodies of requests. What is drawn and how is declared in `SamplingOptions` alone: requests inherit it.

A field that is null, or has a value that asks for nothing, counts as left out. A field that nobody knows is refused,
and so is a value that asks for what OpenAI's server can do and this one cannot.
"""

from __future__ import annotations

import functools
import secrets
import sys
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lm.config import Options, validate
from lm.generation.filters import FILTERS
from lm.generation.options import MOST_ALTERNATIVES, SamplingOptions
from lm.tokenizers.base import UnknownPolicy

NOTHING: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_obfuscation": (False,),
    "tool_calls": ([],),
    "refusal": ("",),
    "annotations": ([],),
    "logprobs": (False,),
    "seed": (-1,),
    "stop": ("", [""]),
    **{name: each.off_in_requests for each in FILTERS if each.off_in_requests for name in each.controls},
}
"""Values that ask for nothing: what a field is where it is left out, or what other servers take for "off"."""
UNREAD_PARTS = ("image_url", "input_audio", "file", "refusal")
"""Types of a message's parts that are no text."""

MOST_AT_ONCE = 16_384
"""Entries of a list that pydantic checks in one call, in which no other thread runs."""


def _in_parts(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, list) or len(value) <= MOST_AT_ONCE:
        return check(value)
    checked: list[Any] = []
    for begin in range(0, len(value), MOST_AT_ONCE):
        checked += check(value[begin : begin + MOST_AT_ONCE])
    return tuple(checked)


def _asks_nothing(name: str, value: Any) -> bool:
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NOTHING[name])


# Neither true nor "5" is the id of a token.
Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
# The first fault of a long list is told, and not each.
Ids = Annotated[tuple[Token, ...], Field(min_length=1, fail_fast=True), WrapValidator(_in_parts)]
Texts = Annotated[tuple[str, ...], Field(min_length=1, fail_fast=True), WrapValidator(_in_parts)]
Prompt = str | Ids | Texts | Annotated[tuple[Ids, ...], Field(min_length=1, fail_fast=True)]
UNUSED = "Taken and not used: it would not change the text."
IDS = ("prompt", "tokens")
"""What may be very long."""
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
            choices = [{"type": "string"}, *choices]
            choices[1]["items"] = {"type": "string", "minLength": 1}
        if name == "top_p":
            choices[0]["minimum"] = choices[0].pop("exclusiveMinimum")
        if name == "seed":
            del kept["default"]
            kept["description"] += " Left out: a new one, told in the answer."
        about.clear()
        about.update(kept, anyOf=[*(choice for choice in choices if choice != {"type": "null"}), {"type": "null"}])


class Part(Options):
    """Base of all that is sent. Bodies of nothing but faults are refused before each fault costs time."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_asked(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise ValueError(f"{len(value):,} fields are too many")
        asked, numbers = {}, _numbers(cls)
        for name, part in value.items():
            parts: Collection[Any] = (part,)
            if isinstance(part, list | dict) and name not in IDS:
                parts = part if isinstance(part, list) else part.values()
                if len(parts) > MOST_ITEMS:
                    raise ValueError(f"{name[:50]} has {len(part):,} entries: {MOST_ITEMS:,} is the most")
            if part is None or (name in NOTHING and _asks_nothing(name, part)):
                continue
            if name in numbers and any(each is True or each is False for each in parts):
                wrong = PydanticCustomError("bool_as_number", "true and false are no numbers")
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": wrong, "loc": (name,), "input": part}]
                )
            asked[name] = part
        return asked


@functools.cache
def _numbers(cls: type[Part]) -> frozenset[str]:
    """The fields that take numbers, whose own types do not tell them from true and false."""

    def types(annotation: Any) -> set[Any]:
        parts = get_args(annotation)
        return {annotation}.union(*(types(part) for part in parts)) if parts else {annotation}

    found = {name: types(about.annotation) for name, about in cls.model_fields.items()}
    return frozenset(name for name, kinds in found.items() if kinds & {int, float} and name not in IDS)


class Body(Part):
    """Base of all requests."""

    model: str | None = Field(None, description="Which model; see GET /v1/models. Default: the first.")


class StreamOptions(Part):
    """What a stream tells beside the text."""

    include_usage: bool = Field(False, description="End with an event that counts the tokens.")


class Sampled(Body, SamplingOptions):
    """What requests for text have in common."""

    model_config = ConfigDict(json_schema_extra=_as_sent)

    stream: bool = Field(False, description="Send the text as it is written, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="What a stream tells beside the text.")
    user: str | None = Field(None, description=UNUSED)
    safety_identifier: str | None = Field(None, description=UNUSED)
    metadata: dict[str, str] | None = Field(None, description=UNUSED)
    prediction: dict[str, Any] | None = Field(None, description=UNUSED)
    prompt_cache_key: str | None = Field(None, description=UNUSED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=UNUSED)
    prompt_cache_retention: str | None = Field(None, description=UNUSED)
    unknown: UnknownPolicy | None = Field(
        None,
        description="What symbols of the prompt that the model never saw become; default: as the model was trained.",
    )
    return_token_ids: bool = Field(False, description="Tell the ids of the tokens too.")

    @field_validator("top_p", mode="before")
    @classmethod
    def _smallest(cls, value: Any) -> Any:
        # None of the probability is held by the likeliest token alone.
        return sys.float_info.min if value == 0 and not isinstance(value, bool) else value

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
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=UNUSED)


class Message(Part):
    """One turn of a chat; what a model answered can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: str | Annotated[tuple[TextPart, ...], Field(fail_fast=True)] = Field(
        "", description="What is said; an assistant may have said nothing."
    )
    name: str | None = Field(None, description=UNUSED)

    @field_validator("content", mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in UNREAD_PARTS:
                raise ValueError(f"a part of the type {kind} is not supported: models read text only")
        return value

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"content is missing in a message of the role {self.role}")
        return self

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

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        given = self.max_tokens if "max_tokens" in self.model_fields_set else None
        if self.max_completion_tokens is not None and given not in (None, self.max_completion_tokens):
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
