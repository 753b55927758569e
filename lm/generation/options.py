"""Sampling options, declared once for the command line, the library and (later) the API."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from lm.config import Options


class SamplingOptions(Options):
    """How text is drawn from a model."""

    temperature: float = Field(
        0.8,
        ge=0,
        le=100,
        description="Divides the logits: below 1 safer, above 1 wilder, 0 always the likeliest token.",
    )
    top_k: int | None = Field(None, ge=1, description="Draw from the k likeliest tokens only.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw from the fewest tokens that hold this share of the probability."
    )
    max_tokens: int = Field(300, ge=1, le=10_000_000, description="Tokens to draw at most.")
    stop: tuple[str, ...] = Field((), description="End before this text appears; may be given several times.")
    seed: int = Field(1, ge=0, le=2**63 - 1, description="The same seed and options give the same text.")
    allow_unknown: bool = Field(False, description="Let the unknown token be drawn.")

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
