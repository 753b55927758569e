"""Sampling options, declared once for the command line, the library, the API and the page.

The options of the filters are declared in `lm.generation.filters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from lm.config import Options
from lm.generation.filters import FILTERS, Token

MAX_ALTERNATIVES = 20
"""Alternatives of one token in a request."""
CHAT_SAMPLING: dict[str, Any] = {"temperature": 0.7}
"""Options of a chat by a chat template, where neither the request nor the model's source gives any."""
NEUTRAL: dict[str, Any] = {"top_k": 1_000_000, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
"""Values without effect of options that a model's source may give."""
SOURCE_OPTIONS = ("temperature", *NEUTRAL)
"""Options that a model's source may give."""
JoinedDecoding = Literal["auto", "on", "off"]
"""Whether a torch decoder steps all slots in one call of the model; auto: on devices other than the CPU. Without it a
text has the same bits in any company."""

if TYPE_CHECKING:
    from lm.generation.filters import FilterOptions as _Filtered
else:
    # A filter that is added to FILTERS may add options.
    _Filtered = create_model("_Filtered", __base__=tuple(dict.fromkeys(each.fields for each in reversed(FILTERS))))

FILTER_FIELDS = tuple(_Filtered.model_fields)
"""The options of all filters."""


class SamplingOptions(_Filtered):
    """How text is drawn from a model."""

    # "Infinity" is not a temperature and not a bias.
    model_config = {**Options.model_config, "allow_inf_nan": False}

    # -- length -----------------------------------------------------------------------------------
    max_tokens: int = Field(300, ge=0, le=10_000_000, description="Maximum number of tokens to generate.")
    min_tokens: int = Field(
        0, ge=0, description="Stop texts, stop tokens and end tokens have no effect before this many tokens."
    )
    stop: tuple[str, ...] = Field((), description="End before this text; may be given several times.")
    stop_tokens: tuple[Token, ...] = Field((), description="End before this token, by id; may be given several times.")
    ignore_eos: bool = Field(
        False, description="Continue past a token that ends a text or turn, if the model's tokenizer has one."
    )

    # -- samples and scores -----------------------------------------------------------------------
    seed: int = Field(1, ge=0, le=2**63 - 1, description="The same seed and options give the same text.")
    n: int = Field(1, ge=1, le=1024, description="Samples of the same prompt, each with other random numbers.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Generate this many samples, return the n with the highest mean log-probability.",
    )
    num_beams: int | None = Field(
        None, ge=1, le=64, description="Search for the most likely text with this many beams, instead of drawing."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_ALTERNATIVES,
        description="Return the log-probability of each token before any filter, with this many alternatives.",
    )  # fmt: skip

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

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """The same options, with these values for those that were not given.

        Args:
            defaults: valid options by name, as `Run.sampling_defaults` gives them.
        """
        absent = {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        return self.model_copy(update=absent) if absent else self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of {self.best_of} must not be less than n {self.n}")
        if self.num_beams is not None and self.num_beams < self.n:
            raise ValueError(f"num_beams {self.num_beams} must not be less than n {self.n}")
        if self.num_beams is not None and self.best_of is not None:
            raise ValueError("num_beams and best_of are two ways to search: give one")
        return self


def source_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options that the source of a model gives, without those that have no effect or no sense here.

    Args:
        given: names and values of generation_config.json of transformers.

    Returns:
        Options by name; {} if the source says not to sample.
    """
    if given.get("do_sample") is False:
        return {}
    found = {}
    for name in SOURCE_OPTIONS:
        value = given.get(name)
        # transformers has 0 for "all tokens".
        off = value == NEUTRAL.get(name) or (name == "top_k" and not value)
        if off or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        try:
            found[name] = getattr(SamplingOptions.model_validate({name: value}), name)
        except ValidationError:
            continue
    return found
