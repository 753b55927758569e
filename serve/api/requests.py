"""Bodies of requests. They inherit the sampling options from `SamplingOptions`.

A field counts as absent if it is null or has a value without effect (`NO_EFFECT`). Unknown fields are errors, and so
are values that need a feature of OpenAI's API that this server does not have.
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
from lm.generation.options import MAX_ALTERNATIVES, SamplingOptions
from lm.tokenizers.base import UnknownPolicy

NO_EFFECT: dict[str, tuple[Any, ...]] = {
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
"""Values that mean the same as an absent field, or that other servers use for "off"."""
SWITCHED_OFF = frozenset(name for each in FILTERS if each.off_in_requests for name in each.controls)
"""Options that such a value switches off; None does it as well."""
UNSUPPORTED_PARTS = ("image_url", "input_audio", "file", "refusal")
"""Types of message parts that are not text."""
MAX_PART = 16_384
"""Entries of a list in one call of pydantic, which blocks all other threads."""
MAX_ITEMS = 10_000
"""Entries of a list or map that is not a prompt."""
MAX_FIELDS = 1000
LONG_FIELDS = ("prompt", "tokens")
"""Fields without the limit MAX_ITEMS."""
UNUSED = "Accepted and ignored."


def _in_parts(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Validate a long list in parts."""
    if not isinstance(value, list) or len(value) <= MAX_PART:
        return check(value)
    checked: list[Any] = []
    for begin in range(0, len(value), MAX_PART):
        checked += check(value[begin : begin + MAX_PART])
    return tuple(checked)


def _has_no_effect(name: str, value: Any) -> bool:
    same = (each for each in NO_EFFECT.get(name, ()) if isinstance(value, bool) == isinstance(each, bool))
    return value is None or any(value == each for each in same)


# Strict: true and "5" are not token ids.
Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
# fail_fast: report only the first error of a long list.
Ids = Annotated[tuple[Token, ...], Field(min_length=1, fail_fast=True), WrapValidator(_in_parts)]
Texts = Annotated[tuple[str, ...], Field(min_length=1, fail_fast=True), WrapValidator(_in_parts)]
Prompt = str | Ids | Texts | Annotated[tuple[Ids, ...], Field(min_length=1, fail_fast=True)]


def _openai_types(schema: dict[str, Any]) -> None:
    """Add to the schema what OpenAI's clients may send too: null, one stop string, no seed."""
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
            kept["description"] += " Default: a random seed, which the answer contains."
        about.clear()
        about.update(kept, anyOf=[*(choice for choice in choices if choice != {"type": "null"}), {"type": "null"}])


class Part(Options):
    """Base of all parts of a body. It checks the size first: to report thousands of errors takes long."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"{len(value):,} fields are too many")
        fields: dict[str, Any] = {}
        numbers = _number_fields(cls)
        for name, part in value.items():
            parts: Collection[Any] = (part,)
            if isinstance(part, list | dict) and name not in LONG_FIELDS:
                parts = part if isinstance(part, list) else part.values()
                if len(parts) > MAX_ITEMS:
                    raise ValueError(f"{name[:50]} has {len(part):,} entries: the limit is {MAX_ITEMS:,}")
            if _has_no_effect(name, part):
                if part is not None and name in SWITCHED_OFF and name in cls.model_fields:
                    # Off, whatever the model's own default is.
                    fields[name] = None
                continue
            if name in numbers and any(each is True or each is False for each in parts):
                wrong = PydanticCustomError("bool_as_number", "true and false are not numbers")
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": wrong, "loc": (name,), "input": part}]
                )
            fields[name] = part
        return fields


@functools.cache
def _number_fields(cls: type[Part]) -> frozenset[str]:
    """The fields with numbers: their types would accept true and false."""

    def types(annotation: Any) -> set[Any]:
        parts = get_args(annotation)
        return {annotation}.union(*(types(part) for part in parts)) if parts else {annotation}

    found = {name: types(about.annotation) for name, about in cls.model_fields.items()}
    return frozenset(name for name, kinds in found.items() if kinds & {int, float} and name not in LONG_FIELDS)


class Body(Part):
    """Base of all requests."""

    model: str | None = Field(None, description="Name of the model; see GET /v1/models. Default: the first.")


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool = Field(False, description="End with an event that has the token counts.")


class Sampled(Body, SamplingOptions):
    """Base of requests for text."""

    model_config = ConfigDict(json_schema_extra=_openai_types)

    stream: bool = Field(False, description="Send the text as it is written, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Options of a stream.")
    user: str | None = Field(None, description=UNUSED)
    safety_identifier: str | None = Field(None, description=UNUSED)
    metadata: dict[str, str] | None = Field(None, description=UNUSED)
    prediction: dict[str, Any] | None = Field(None, description=UNUSED)
    prompt_cache_key: str | None = Field(None, description=UNUSED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=UNUSED)
    prompt_cache_retention: str | None = Field(None, description=UNUSED)
    unknown: UnknownPolicy | None = Field(
        None, description="Policy for unknown symbols of the prompt. Default: the policy of the training."
    )
    return_token_ids: bool = Field(False, description="Return the token ids too.")

    @field_validator("top_p", mode="before")
    @classmethod
    def _smallest(cls, value: Any) -> Any:
        # OpenAI's 0 keeps only the most probable token.
        return sys.float_info.min if value == 0 and not isinstance(value, bool) else value

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, **changed: Any) -> SamplingOptions:
        """The sampling options; without a seed, a random one."""
        given = {name: getattr(self, name) for name in SamplingOptions.model_fields if name in self.model_fields_set}
        given.setdefault("seed", secrets.randbelow(2**31))
        return validate(SamplingOptions, {**given, **changed})


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Prompt = Field("", description="A text, a list of texts, a list of token ids, or a list of such lists.")
    echo: bool = Field(False, description="Start the text with the prompt; logprobs then include its tokens.")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Part):
    """A part of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=UNUSED)


class Message(Part):
    """One message of a chat. A message of an answer can be sent back."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="The author.")
    content: str | Annotated[tuple[TextPart, ...], Field(fail_fast=True)] = Field(
        "", description="The text. Only an assistant may leave it out."
    )
    name: str | None = Field(None, description=UNUSED)

    @field_validator("content", mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in UNSUPPORTED_PARTS:
                raise ValueError(f"a part of type {kind} is not supported: models read text only")
        return value

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"content is missing in a message of role {self.role}")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)] = Field(description="The chat so far.")
    max_completion_tokens: int | None = Field(None, ge=0, description="The same as max_tokens.")
    logprobs: bool = Field(False, description="Return the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_ALTERNATIVES, description="With logprobs: the number of alternatives for each token."
    )

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        given = self.max_tokens if "max_tokens" in self.model_fields_set else None
        if self.max_completion_tokens is not None and given not in (None, self.max_completion_tokens):
            raise ValueError("max_completion_tokens and max_tokens mean the same: give one")
        return self


class TokenizeRequest(Body):
    """POST /tokenize."""

    prompt: str = Field(description="A text.")
    add_special_tokens: bool = Field(False, description="Put the start token in front, as the server does for prompts.")
    return_token_strs: bool = Field(False, description="Return the text of each token too.")


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[tuple[Token, ...], Field(fail_fast=True), WrapValidator(_in_parts)] = Field(
        description="Token ids."
    )


class ScoreRequest(Body):
    """POST /v1/score."""

    text: str = Field(min_length=1, description="The text to score; the start token predicts its first token.")
    top: int = Field(0, ge=0, le=MAX_ALTERNATIVES, description="Number of alternatives for each token.")
