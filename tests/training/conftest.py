"""Tiny corpora and trainers."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.config import CorpusConfig, RunConfig, compose
from lm.corpora import PreparedCorpus, open_corpus, prepare
from lm.models.base import build_model
from lm.profiling import trial
from lm.profiling.trial import Trial
from lm.runs.record import run_record
from lm.runs.run_folder import RunFolder
from lm.training.trainer import Trainer

MODELS: dict[str, dict[str, Any]] = {
    "gru": {"model.type": "gru", "model.embedding_size": 8, "model.hidden_size": 12},
    "lstm": {"model.type": "lstm", "model.embedding_size": 8, "model.hidden_size": 12, "model.num_layers": 2},
    "transformer": {
        "model.type": "transformer",
        "model.context_length": 16,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.num_layers": 1,
    },
}
SMALL = {
    "model.dropout": 0,
    "model.table_orders": [],
    "training.batch_size": 4,
    "training.bptt": 16,
    "training.warmup_steps": 0,
    "training.log_every": 1,
}


def make_text(characters: int = 6000, seed: int = 3) -> str:
    """Words in random order: a text with something to learn, different everywhere."""
    words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "den", "in fog")
    source = random.Random(seed)
    lines: list[str] = []
    while sum(len(line) for line in lines) < characters:
        lines.append(" ".join(source.choice(words) for _ in range(9)) + ".\n")
    return "".join(lines)[:characters]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(), "utf-8")
    config = compose(str(path), preset="gru-char")
    return prepare(open_corpus(CorpusConfig(source=str(path))), config.tokenizer)


@pytest.fixture
def options(prepared: PreparedCorpus) -> Callable[..., RunConfig]:
    def make(model: str = "gru", **training: Any) -> RunConfig:
        own = {path: training.pop(path) for path in list(training) if path.startswith("model.")}
        if "amp" not in training:
            # The losses must not depend on the CPU.
            training.setdefault("precision", "fp32")
        overrides = {**SMALL, **MODELS[model], **own, **{f"training.{name}": value for name, value in training.items()}}
        return compose(prepared.source, preset="gru-char", overrides=overrides)

    return make


@pytest.fixture
def make_trial(prepared: PreparedCorpus, options: Callable[..., RunConfig]) -> Callable[..., Trial]:
    """make_trial("gru", dropout=…, learning_rate=…): training steps without a run."""
    return lambda model="gru", **training: trial.make_trial(options(model, **training), prepared, learns=True)


@pytest.fixture
def make_trainer(tmp_path: Path, prepared: PreparedCorpus, options: Callable[..., RunConfig]) -> Callable[..., Trainer]:
    """make_trainer("gru", dropout=…, learning_rate=…): a trainer of a new run, or of `run` as a new process has it."""
    numbers = itertools.count()

    def make(
        model: str = "gru", *, run: RunFolder | None = None, clock: Callable[[], float] = time.perf_counter,
        **training: Any,
    ) -> Trainer:  # fmt: skip
        config = options(model, **training)
        built = build_model(config.model, prepared.tokenizer.vocab_size, seed=config.training.seed)
        if run is None:
            run = RunFolder(tmp_path / f"run-{next(numbers)}")
            run.create(run_record(config, prepared, built, None), prepared.tokenizer)
        return Trainer(run, config.training, built, prepared, clock=clock)

    return make
