"""How fast a training would be on this machine: measured on a trainer that writes nothing and is thrown away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.device import enough_memory
from lm.models.base import LanguageModel, build_model
from lm.runs.run_folder import RunFolder
from lm.training.trainer import Trainer


@dataclass(frozen=True)
class Timings:
    """Sizes and times of a training on this machine."""

    tokens_per_step: int
    steps_per_epoch: float
    step_seconds: float
    """Median time of an optimizer step; NaN where nothing was timed."""
    token_seconds: float
    """Time to validate one token; NaN where nothing was timed."""


def measure_speed(
    config: RunConfig, corpus: PreparedCorpus, seconds: float | None, model: LanguageModel | None = None
) -> Timings:
    """Sizes and times of a training, in all processes of the job.

    Args:
        config: all options.
        corpus: its tokens.
        seconds: how long to run steps; None: give the sizes only.
        model: the model to train, which is changed; None: one with fresh weights.

    Raises:
        DeviceError: the memory is not enough.
    """
    with enough_memory():
        model = model or build_model(config.model, corpus.tokenizer.vocab_size, seed=config.training.seed)
        # The folder is never created.
        trainer = Trainer(RunFolder(Path("unused")), config.training, model, corpus)
        times = (float("nan"),) * 2 if seconds is None else trainer.measure(seconds)
        return Timings(trainer.tokens_per_step, trainer.steps_per_epoch, *times)
