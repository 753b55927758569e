"""Training on answers alone: the loss, the scores and an exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lm.config import CorpusConfig, compose
from lm.corpora import PreparedCorpus, open_corpus, prepare
from lm.corpora.answers import ANSWER
from lm.corpora.batches import conversation_bounds
from lm.evaluation.perplexity import score
from lm.models.base import LanguageModel, build_model
from lm.runs.record import run_record
from lm.runs.run_folder import RunFolder
from lm.training.plan import Plan
from lm.training.trainer import Trainer

from .conftest import MODELS, SMALL


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    path = tmp_path_factory.mktemp("chats") / "sums.jsonl"
    rows = [
        {"prompt": f"What is {a} + {b}?", "completion": "It is " + "very " * (a * b % 5) + f"{a + b}."}
        for a in range(9)
        for b in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return prepare(open_corpus(CorpusConfig(source=str(path))), compose(str(path), preset="gru-char").tokenizer)


def make(chats: PreparedCorpus, model: str, **overrides: Any) -> tuple[Any, LanguageModel]:
    config = compose(chats.source, preset="gru-char", overrides={**SMALL, **MODELS[model], **overrides})
    return config, build_model(config.model, chats.tokenizer.vocab_size, seed=1)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gru", {}), ("transformer", {}), ("gru", {"model.adaptive_cutoffs": [5, 12]}),
        ("gru", {"model.table_orders": [2], "model.table_dropout": 0}),
    ],
)  # fmt: skip
def test_the_loss_and_its_gradients_are_those_of_the_answers_alone(
    chats: PreparedCorpus, model: str, options: dict[str, Any]
) -> None:
    _, network = make(chats, model, **options)
    ids = torch.randint(0, chats.tokenizer.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))
    learned = torch.tensor([2, 3, 11, 29])
    found = network.training_loss(ids[:, :-1], ids[:, 1:], learned=learned)
    found.objective.backward()
    own = [None if each.grad is None else each.grad.to_dense().clone() for each in network.parameters()]
    network.zero_grad()
    targets = torch.full((30,), -100)
    targets[learned] = ids[:, 1:].flatten()[learned]
    expected = F.cross_entropy(network(ids[:, :-1])[0].flatten(0, 1), targets)
    expected.backward()
    assert float(found.nats) == pytest.approx(expected.item(), abs=1e-5)
    for mine, parameter in zip(own, network.parameters(), strict=True):
        theirs = torch.zeros(()) if parameter.grad is None else parameter.grad.to_dense()
        torch.testing.assert_close(torch.zeros(()) if mine is None else mine, theirs, atol=1e-5, rtol=1e-4)
    if found.logits is not None:
        assert found.logits().shape[:2] == (1, 4)


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_a_conversation_is_scored_from_its_own_start_and_answers_alone(chats: PreparedCorpus, model: str) -> None:
    # A window of 64 holds each conversation; one of 16 slides over it.
    _, network = make(chats, model, **({"model.context_length": 64} if model == "transformer" else {}))
    part = chats.splits["valid"]
    assert part.marks is not None
    nats: list[np.ndarray[Any, Any]] = []
    scores = score(network, part.ids, marks=part.marks, each=nats.append)
    expected: list[float] = []
    for begin, end in zip(*conversation_bounds(part.marks), strict=True):
        ids = torch.from_numpy(part.ids[begin:end].astype(np.int64))[None]
        with torch.no_grad():
            each = F.cross_entropy(network.eval()(ids[:, :-1])[0][0], ids[0, 1:], reduction="none").numpy()
        expected += each[part.marks[begin + 1 : end] == ANSWER].tolist()
    assert np.concatenate(nats) == pytest.approx(np.array(expected), abs=1e-5)
    assert scores.tokens == part.counts.tokens == len(expected)
    assert scores.context == f"each conversation by itself; answers only: {len(expected)} tokens of {len(part.ids) - 1}"
    halves = [score(network, part.ids, marks=part.marks, share=(number, 2)) for number in range(2)]
    assert sum(half.nats for half in halves) == pytest.approx(scores.nats, rel=1e-6)


def test_a_conversation_longer_than_the_context_slides_through_it(chats: PreparedCorpus) -> None:
    _, network = make(chats, "transformer")
    part = chats.splits["valid"]
    assert network.context_length == 16
    assert part.marks is not None
    nats: list[np.ndarray[Any, Any]] = []
    score(network, part.ids, marks=part.marks, each=nats.append)
    expected = []
    for begin, end in zip(*conversation_bounds(part.marks), strict=True):
        alone: list[np.ndarray[Any, Any]] = []
        score(network, part.ids[begin:end], each=alone.append)
        expected.append(np.concatenate(alone)[part.marks[begin + 1 : end] == ANSWER])
    assert np.concatenate(nats) == pytest.approx(np.concatenate(expected), abs=1e-5)


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_a_resumed_training_on_conversations_gives_the_same_weights(
    chats: PreparedCorpus, tmp_path: Path, model: str
) -> None:
    def trainer(name: str) -> Trainer:
        config, network = make(chats, model)
        folder = RunFolder(tmp_path / name)
        if not folder.path.exists():
            folder.create(run_record(config, chats, network, None), chats.tokenizer)
        return Trainer(folder, config.training, network, chats)

    whole, part = trainer("whole"), trainer("part")
    whole.train(Plan(12, 6))
    part.train(Plan(12, 6), stop_after=5)
    again = trainer("part")
    again.load()
    end = again.train(Plan(12, 6))
    assert end.step == 12
    assert end.best_loss == pytest.approx(whole.progress.best_loss, abs=0)
    for name, array in whole.model.arrays().items():
        assert np.array_equal(array, again.model.arrays()[name]), name
