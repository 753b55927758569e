"""Validation during training against the report: the same loss to 0.005 nats, so that the best weights are the best."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import CorpusConfig, compose
from lm.corpora import open_corpus, prepare
from lm.evaluation.perplexity import score
from lm.models.base import build_model
from lm.registry import MODELS
from lm.training.learning_rate import learning_rate_share
from lm.training.train_step import StepBatches, TrainStep
from lm.training.validation import validate

BOUND = 0.005
"""Nats per token."""
OPTIONS: dict[str, dict[str, Any]] = {"transformer": {"model.num_heads": 2, "model.context_length": 48}}
RECURRENT = {"model.embedding_size": 8}


def repeats(characters: int) -> str:
    """Four letters in words that come again and again, without white space: long memory helps."""
    source = random.Random(4)
    words = ["".join(source.choice("ACGT") for _ in range(source.randint(20, 40))) for _ in range(6)]
    return "".join(source.choice(words) for _ in range(characters // 20))[:characters]


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted({*MODELS.names()} - {"ngram", "ensemble"}))
def test_validation_while_training_is_the_report_s_loss_on_short_and_long_splits(model: str, tmp_path: Path) -> None:
    path = tmp_path / "repeats.txt"
    path.write_text(repeats(24_000), "utf-8")
    overrides = {
        "corpus.split_fractions": (0.5, 0.5), "model.type": model, "model.hidden_size": 32, "training.batch_size": 8,
        "training.bptt": 48, "training.learning_rate": 0.01, "training.warmup_steps": 0,
        **(OPTIONS.get(model, RECURRENT)),
    }  # fmt: skip
    config = compose(str(path), preset="lstm-char", overrides=overrides)
    corpus = prepare(open_corpus(CorpusConfig(source=str(path), split_fractions=(0.5, 0.5))), config.tokenizer)
    built = build_model(config.model, corpus.tokenizer.vocab_size, seed=1)
    if built.trained_by == "both":
        built.fit(np.asarray(corpus.splits["train"].ids))
    step = TrainStep(built, config.training)
    batches = StepBatches(corpus.splits["train"], step)
    for number in range(200):
        step.run(batches.of_step(number), learning_rate_share(number, 200, config.training))
    valid = corpus.splits["valid"].ids
    for tokens in (10, 150, 763, 2100, 12_000):
        exact = score(step.model, valid[: tokens + 1])
        assert validate(step, valid[: tokens + 1]).loss == pytest.approx(exact.loss, abs=BOUND), tokens
    # Long enough for several rows of a carried state, or there would be nothing to bound.
    assert model == "transformer" or "11 equal parts" in validate(step, valid).context
    # And the model did learn something that it could forget.
    assert exact.loss < 1.3
