"""Trainers that are measured and thrown away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.corpora.batches import Batch, Batches
from lm.errors import ConfigError
from lm.models.base import LanguageModel, build_model
from lm.registry import MODELS
from lm.runs.run_folder import RunFolder
from lm.training.plan import Plan
from lm.training.trainer import Trainer

RATES = "learning_rate", "muon_learning_rate", "table_learning_rate"
ENDLESS = Plan(steps=10**9, evaluate_every=10**9)


def make_trial(
    config: RunConfig, corpus: PreparedCorpus, folder: RunFolder | None = None, *, learns: bool = False
) -> Trainer:
    """A trainer of a fresh model in the middle of a plan without end; nothing is written unless it is told to.

    Args:
        config: of the run.
        corpus: its prepared text.
        folder: of a run that it may write to.
        learns: update the weights as the options say; else by next to nothing, so that options with which training
            would diverge can be measured like others.

    Raises:
        ConfigError: the model is trained by counting, without steps.
    """
    refuse_counting(config)
    model = build_model(config.model, corpus.tokenizer.vocab_size, seed=config.training.seed)
    if model.trained_by == "both":
        model.fit(np.asarray(corpus.splits["train"].ids))
    training = config.training if learns else config.training.model_copy(update=dict.fromkeys(RATES, 1e-12))
    trainer = Trainer(folder or RunFolder(Path("unused")), training, model, corpus)
    trainer.plan = ENDLESS
    return trainer


def refuse_counting(config: RunConfig) -> None:
    """Nothing to measure in a model that is trained by counting.

    Raises:
        ConfigError: this is one.
    """
    if MODELS.resolve(config.model.type).trained_by == "counting":
        raise ConfigError(f"{config.model.type} models are trained by counting, in one pass without steps to measure.")


def weightless(config: RunConfig, vocab_size: int) -> LanguageModel:
    """The model without memory for its weights (on torch's meta device): to be counted, however large it is."""
    with torch.device("meta"), _NothingWritten():
        return build_model(config.model, vocab_size)


class _NothingWritten(TorchFunctionMode):
    """Operators that write in place do nothing: on the meta device they would load a second's worth of torch first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name.endswith("_") and not name.endswith("__"):
            return next(iter((*args, *(kwargs or {}).values())))
        return func(*args, **(kwargs or {}))


class _Part(Batches):
    """The first rows of the first batch, and of each row the first tokens, over and over."""

    def __init__(self, whole: Batches, rows: int, time: int) -> None:
        self.per_epoch = whole.per_epoch
        self.tokens_per_batch = rows * time
        self._whole, self._cut = whole, (slice(rows), slice(time))

    def batch(self, index: int) -> Batch:
        """See `Batches.batch`."""
        # The first is a full one; the last of an epoch need not be.
        whole = self._whole.batch(0)
        return Batch(whole.inputs[self._cut], whole.targets[self._cut], fresh=False)


@contextlib.contextmanager
def smaller_batches(trainer: Trainer, rows: int, time: int) -> Iterator[None]:
    """Inside, the trainer's batches have no more than so many rows, of no more than so many tokens."""
    whole, hidden = trainer.batches, trainer.hidden
    trainer.batches, trainer.hidden = _Part(whole, rows, time), None
    try:
        yield
    finally:
        trainer.batches, trainer.hidden = whole, hidden
