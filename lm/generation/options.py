"""Sampling options, declared once for the command line, the library, the API and the page.

The order in which they act is that of `lm.generation.filters`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from lm.config import Options

MOST_ALTERNATIVES = 20
"""Alternatives a token that can be asked for."""

Token = Annotated[int, Field(ge=0)]
Temperature = Annotated[float, Field(ge=0, le=100)]


class SamplingOptions(Options):
    """How text is drawn from a model."""

    # "Infinity" is no temperature and no bias.
    model_config = {**Options.model_config, "allow_inf_nan": False}

    # -- the distribution -------------------------------------------------------------------------
    temperature: Temperature | Annotated[tuple[Temperature, ...], Field(min_length=1, max_length=1000)] = Field(
        0.8,
        description="Divides the logits: below 1 safer, above 1 wilder, 0 always the likeliest token. Several values "
        "take turns, one a token.",
    )
    top_k: int | None = Field(None, ge=1, description="Draw from the k likeliest tokens only.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw from the fewest tokens that hold this share of the probability."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Draw from tokens with at least this share of the likeliest one's probability."
    )
    typical_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Draw from the tokens whose surprise is nearest to the expected one and that hold this share of "
        "the probability.",
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=100, description="Above 1: makes tokens of the prompt and the text so far less likely."
    )
    presence_penalty: float = Field(
        0.0, ge=-100, le=100, description="Taken from the logit of each token that was drawn before."
    )
    frequency_penalty: float = Field(
        0.0, ge=-100, le=100, description="Taken from the logit of a token for each time it was drawn before."
    )
    penalty_window: int | None = Field(
        None, ge=1, description="The penalties look at so many of the last tokens; default: all."
    )
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, description="Added to the logits of some tokens, by id; -100 or less bans the token."
    )
    banned_tokens: tuple[Token, ...] = Field((), description="Tokens, by id, that are never drawn.")
    allow_unknown: bool = Field(False, description="Let the unknown token be drawn.")

    # -- how long ---------------------------------------------------------------------------------
    max_tokens: int = Field(300, ge=0, le=10_000_000, description="Tokens to draw at most.")
    min_tokens: int = Field(0, ge=0, description="No stop text or stop token counts before so many tokens.")
    stop: tuple[str, ...] = Field((), description="End before this text appears; may be given several times.")
    stop_tokens: tuple[Token, ...] = Field((), description="End before this token, by id; may be given several times.")

    # -- how many, and what is told ---------------------------------------------------------------
    seed: int = Field(1, ge=0, le=2**63 - 1, description="The same seed and options give the same text.")
    n: int = Field(1, ge=1, le=1024, description="Samples of the same prompt, each with randomness of its own.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Draw so many samples and keep the n with the best mean log-likelihood a token.",
    )
    num_beams: int | None = Field(
        None, ge=1, le=64, description="Search the likeliest text with so many beams, instead of drawing."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MOST_ALTERNATIVES,
        description="Tell each token's log-probability under the model (before any filter), and so many alternatives.",
    )

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The schedule, one value a token, cycled."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    @field_validator("temperature", mode="wrap")
    @classmethod
    def _one_or_turns(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        try:
            return handler(parts[0] if isinstance(parts, list) and len(parts) == 1 else parts)
        except ValidationError:
            # One finding, where pydantic has one for a number and one for a list.
            raise ValueError("give a number from 0 to 100, or several with commas between them") from None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError('write JSON such as {"13": -100}') from None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop text must not be empty")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of {self.best_of} must not be less than n {self.n}")
        if self.num_beams is not None and self.num_beams < self.n:
            raise ValueError(f"num_beams {self.num_beams} must not be less than n {self.n}")
        if self.num_beams is not None and self.best_of is not None:
            raise ValueError("num_beams and best_of are two ways to search: give one")
        return self
