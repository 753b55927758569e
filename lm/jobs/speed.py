"""How fast a training would be on this machine: measured on a trainer that writes nothing and is thrown away."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.device import enough_memory
from lm.models.base import LanguageModel, build_model
from lm.profiling.trial import make_trial
from lm.training.distillation import Teacher


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
    config: RunConfig,
    corpus: PreparedCorpus,
    seconds: float | None,
    model: LanguageModel | None = None,
    teacher: Teacher | None = None,
) -> Timings:
    """Sizes and times of a training, in all processes of the job.

    Args:
        config: all options.
        corpus: its tokens.
        seconds: how long to run steps; None: give the sizes only.
        model: the model to train, which is changed; None: one with fresh weights.
        teacher: see `TrainStep`.

    Raises:
        DeviceError: the memory is not enough.
    """
    with enough_memory():
        model = model or build_model(config.model, corpus.tokenizer.vocab_size, seed=config.training.seed)
        trial = make_trial(config, corpus, model=model, learns=True, teacher=teacher)
        times = (float("nan"),) * 2 if seconds is None else astuple(trial.measure(seconds))
        return Timings(trial.batches.tokens_per_step, trial.batches.steps_per_epoch, *times)
