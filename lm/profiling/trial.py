"""Throw-away training steps: to measure speed and memory without a run."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.corpora.answers import beginning
from lm.corpora.batches import Batch
from lm.device import deterministic
from lm.errors import ConfigError
from lm.models.base import LanguageModel
from lm.models.lora import trainable_model
from lm.models.training_method import training_method
from lm.torch_private import keep_freed_memory
from lm.training.distillation import Teacher
from lm.training.learning_rate import learning_rate_share
from lm.training.train_step import StepBatches, StepResult, TrainStep
from lm.training.validation import VALIDATION_ROWS, validate

RATES = "learning_rate", "muon_learning_rate", "table_learning_rate"
ENDLESS_STEPS = 10**9
"""Length of the plan that a trial is the beginning of."""
WARM_UP_STEPS = 2
"""First steps, which are slower and not timed."""
LONGEST = 4.0
"""A measurement ends after this many times its seconds, with the steps that it has: at least two."""


@dataclass(frozen=True)
class Speed:
    """Measured times."""

    step_seconds: float
    """The median of the steps."""
    token_seconds: float
    """Time to validate on one token."""


class Trial:
    """A `TrainStep` and the batches of a plan without end."""

    def __init__(self, step: TrainStep, corpus: PreparedCorpus) -> None:
        self.step, self.corpus = step, corpus
        self.batches = StepBatches(corpus.splits["train"], step)
        self.steps_done = 0
        self._unread: list[Callable[[], StepResult]] = []
        self._size: tuple[int, int] | None = None

    def run_step(self, *, with_metrics: bool = False) -> StepResult:
        """The next step, to its end.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite, and `training.on_nonfinite` is stop.
        """
        return self.start_step(with_metrics=with_metrics)()

    def start_step(self, *, with_metrics: bool = False) -> Callable[[], StepResult]:
        """Start the next step; the function waits for its end, and raises as `run_step`."""
        share = learning_rate_share(self.step.updates, ENDLESS_STEPS, self.step.config)
        finish = self.step.start(self._step_batches(), share, with_metrics=with_metrics)
        self.steps_done += 1
        number = self.steps_done

        def finish_checked() -> StepResult:
            result = finish()
            if result.problem is not None and self.step.config.on_nonfinite == "stop":
                self.steps_done = number - 1
                result.raise_problem(number, "Lower training.learning_rate, or use training.precision=fp32.")
            return result

        return finish_checked

    def run_ahead(self, *, with_metrics: bool = False) -> None:
        """The next step as in a run: on a GPU the result of the step before is read after it was started."""
        self._unread.append(self.start_step(with_metrics=with_metrics))
        if len(self._unread) > self.step.reads_late:
            self._unread.pop(0)()

    def catch_up(self) -> None:
        """Wait for the steps of `run_ahead`."""
        while self._unread:
            self._unread.pop(0)()

    def _step_batches(self) -> Iterable[Batch]:
        if self._size is None:
            return self.batches.of_step(self.steps_done)
        # The first batch is a full one; the last of an epoch may not be.
        whole, (rows, length) = self.batches.batch(0), self._size
        part = Batch(whole.inputs[:rows, :length], whole.targets[:rows, :length], fresh=False)
        return [part] * self.step.config.gradient_accumulation

    @contextlib.contextmanager
    def smaller_batches(self, rows: int, length: int) -> Iterator[None]:
        """Inside, each batch is the first `length` tokens of the first `rows` rows of the first batch."""
        state, self.step.carried_state, self._size = self.step.carried_state, None, (rows, length)
        try:
            yield
        finally:
            self.step.carried_state, self._size = state, None

    def measure(self, seconds: float) -> Speed:
        """Time steps and a validation, for about `seconds`; the same result in all processes."""
        step, times = self.step, list[float]()
        with deterministic(step.device), keep_freed_memory():
            begun = time.perf_counter()
            while (spent := self._since(begun)) < seconds * 0.75 or (
                len(times) < WARM_UP_STEPS + 2 and (len(times) < 2 or spent < seconds * LONGEST)
            ):
                before = time.perf_counter()
                self.run_ahead(with_metrics=len(times) % step.config.log_every == step.config.log_every - 1)
                times.append(time.perf_counter() - before)
            self.catch_up()
            # The median, because another program may use the processor for a moment.
            step_seconds, _ = step.world.sync_clock(statistics.median(times[WARM_UP_STEPS:] or times[-1:]))
            # A validation token takes about a third of the time of a training token.
            tokens = int(seconds * 0.25 / step_seconds * self.batches.tokens_per_step * 3)
            begun = time.perf_counter()
            ids, marks = beginning(self.corpus.splits["valid"], max(VALIDATION_ROWS, tokens))
            validate(step, ids, marks=marks)
            token_seconds = self._since(begun) / (len(ids) - 1)
            # A longer text slides through the window, by half of it: each token is read twice.
            context = step.model.context_length
            return Speed(step_seconds, token_seconds * (2 if context and len(ids) - 1 <= context else 1))

    def _since(self, begun: float) -> float:
        return self.step.world.sync_clock(time.perf_counter() - begun)[0]


def make_trial(
    config: RunConfig,
    corpus: PreparedCorpus,
    *,
    model: LanguageModel | None = None,
    learns: bool = False,
    teacher: Teacher | None = None,
) -> Trial:
    """A trial of these options on a prepared corpus.

    Args:
        config: of the run.
        corpus: its prepared text.
        model: with initial weights; None: a fresh one, with counts of the training text if it needs them.
        learns: use the learning rates of the options; else tiny ones, so that no options can make training diverge.
        teacher: of `training.distill`; None: the steps learn from the text alone.

    Raises:
        ConfigError: the model is trained by counting, without steps.
    """
    refuse_counting(config)
    if model is None:
        model = trainable_model(config, corpus.tokenizer.vocab_size)
        model.fit(np.asarray(corpus.splits["train"].ids))
    training = config.training if learns else config.training.model_copy(update=dict.fromkeys(RATES, 1e-12))
    return Trial(TrainStep(model, training, teacher), corpus)


def refuse_counting(config: RunConfig) -> None:
    """Raise ConfigError for a model that is trained by counting."""
    if training_method(config).in_one_pass:
        raise ConfigError(f"{config.model.type} models are trained by counting, in one pass without steps to measure.")
