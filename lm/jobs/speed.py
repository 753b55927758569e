"""How fast a training would be on this machine: measured on a trainer that writes nothing and is thrown away."""

from __future__ import annotations

import statistics
import time
from dataclasses import astuple, dataclass

import numpy as np

from lm.config import RunConfig, Section, TrainingConfig
from lm.corpora import PreparedCorpus
from lm.corpora.batches import Batch
from lm.device import deterministic, enough_memory, pick_device
from lm.models.base import LanguageModel, build_model
from lm.models.lora import trainable_model
from lm.profiling.trial import make_trial
from lm.torch_private import keep_freed_memory
from lm.training.distillation import Teacher
from lm.training.train_step import TrainStep

REFERENCE = Section.model_validate({"type": "gru", "embedding_size": 64, "hidden_size": 128})
REFERENCE_VOCABULARY = 64
REFERENCE_SECONDS = 0.6
REFERENCE_BATCH = 32, 64
"""Rows and tokens of a row."""
GPU_ROWS = 1024
"""Rows of the same on a GPU, which fewer do not fill."""
WARM_UP_STEPS = 2


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
        model = model or trainable_model(config, corpus.tokenizer.vocab_size)
        trial = make_trial(config, corpus, model=model, learns=True, teacher=teacher)
        times = (float("nan"),) * 2 if seconds is None else astuple(trial.measure(seconds))
        return Timings(trial.batches.tokens_per_step, trial.batches.steps_per_epoch, *times)


def reference_speed(config: TrainingConfig, seconds: float = REFERENCE_SECONDS) -> float:
    """Training tokens per second of a GRU of width 128 over 64 characters on this machine, in one process.

    Args:
        config: device, precision and optimizer.
        seconds: how long to measure.
    """
    rows, length = REFERENCE_BATCH
    rows = GPU_ROWS if pick_device(config.device).type == "cuda" else rows
    return network_speed(REFERENCE, REFERENCE_VOCABULARY, config, (rows, length), seconds)


def network_speed(
    section: Section, vocabulary: int, config: TrainingConfig, batch: tuple[int, int], seconds: float
) -> float:
    """Training tokens per second of a network on random tokens on this machine, in one process; without its counts.

    Args:
        section: the `model` section of a configuration.
        vocabulary: number of different tokens.
        config: device, precision and optimizer.
        batch: rows, and tokens of a row.
        seconds: how long to measure, at least a few steps.

    Raises:
        DeviceError: the memory is not enough.
    """
    with enough_memory():
        model = build_model(section, vocabulary, seed=1)
        own = {"gradient_accumulation": 1, "shard": False, "distill": None}
        step = TrainStep(model, config.model_copy(update=own))
        ids = np.random.default_rng(1).integers(0, vocabulary, size=(2, *batch))
        tokens, times = Batch(ids[0], ids[1], fresh=True), list[float]()
        with deterministic(step.device), keep_freed_memory():
            begun = time.perf_counter()
            while len(times) < WARM_UP_STEPS + 2 or time.perf_counter() - begun < seconds:
                before = time.perf_counter()
                step.run([tokens], 1e-3)
                times.append(time.perf_counter() - before)
    # The median, because another program may use the processor for a moment.
    return float(ids[0].size / statistics.median(times[WARM_UP_STEPS:]))
