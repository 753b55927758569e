"""How a model is trained. Its class declares it; all other code asks what it means for a job.

    class NGram(LanguageModel):
        trained_by = "counting"

    training_method(config).has_steps       # or model.training_method(), where there is a model

What a method means is said here alone. `lm.jobs.train` has a function for each method, with one signature.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from lm.registry import MODELS

if TYPE_CHECKING:
    from lm.config import RunConfig


class TrainingMethod(StrEnum):
    """The values of `LanguageModel.trained_by`."""

    GRADIENT = "gradient"
    """In optimizer steps."""
    COUNTING = "counting"
    """By `fit` alone."""
    BOTH = "both"
    """By `fit`, then in optimizer steps."""
    MEMBERS = "members"
    """Each of its members by itself."""

    @property
    def has_steps(self) -> bool:
        """Whether the model itself is trained in optimizer steps."""
        return self in (TrainingMethod.GRADIENT, TrainingMethod.BOTH)

    @property
    def counts(self) -> bool:
        """Whether the model counts its training text."""
        return self in (TrainingMethod.COUNTING, TrainingMethod.BOTH)

    @property
    def in_one_pass(self) -> bool:
        """Whether one pass over the text is the whole training: there is nothing to measure, plan or resume."""
        return self is TrainingMethod.COUNTING

    @property
    def of_members(self) -> bool:
        """Whether the model is made of others, which are trained one after another."""
        return self is TrainingMethod.MEMBERS

    @property
    def takes_adapters(self) -> bool:
        """Whether the model can be fine-tuned with its weights frozen."""
        return self is TrainingMethod.GRADIENT


def training_method(config: RunConfig) -> TrainingMethod:
    """How the model of a configuration is trained."""
    return MODELS.resolve(config.model.type).training_method()
