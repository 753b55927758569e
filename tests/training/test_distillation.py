"""Distillation: soft targets from a teacher, on the batches of the training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lm.config import Section, TrainingConfig
from lm.corpora.batches import Batch
from lm.models.base import LanguageModel, State, build_model
from lm.training.distillation import Teacher
from lm.training.train_step import TrainStep

VOCAB = 5
GRU = {"type": "gru", "hidden_size": 8, "embedding_size": 4}
TEXT = np.random.default_rng(0).integers(VOCAB, size=61)


def model(seed: int = 1, **options: Any) -> LanguageModel:
    built = build_model(Section(**{**GRU, **options}), VOCAB, seed=seed)
    if built.trained_by in ("counting", "both"):
        built.fit(TEXT)
    return built.eval()


def batch(start: int, end: int, *, fresh: bool, place: int | None = None) -> Batch:
    ids = np.stack([TEXT[start : end + 1], TEXT[start + 10 : end + 11]])
    return Batch(ids[:, :-1], ids[:, 1:], fresh, place=place)


def soft(teacher: Teacher, of: Batch, *, carries_state: bool = True) -> Tensor:
    return teacher.soft_targets(
        of, torch.from_numpy(of.inputs), torch.from_numpy(of.targets), carries_state=carries_state
    )


class Fixed(LanguageModel):
    """Always the same probabilities."""

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return torch.tensor([0.5, 0.25, 0.25]).log().expand(*ids.shape, 3), State({})


def test_soft_targets_are_a_share_of_the_teacher_and_the_rest_on_the_text() -> None:
    teacher = Teacher(Fixed(None, 3), 0.4, knows_text=False)
    given = Batch(np.array([[0, 1]]), np.array([[1, 0]]), fresh=True)
    torch.testing.assert_close(soft(teacher, given), torch.tensor([[[0.2, 0.7, 0.1], [0.8, 0.1, 0.1]]]))


def test_the_objective_is_that_of_the_text_and_the_divergence_from_the_teacher() -> None:
    student, teacher_model, given = model(seed=2), model(), batch(0, 20, fresh=True)
    ids, targets = torch.from_numpy(given.inputs), torch.from_numpy(given.targets)
    loss = student.training_loss(ids, targets, soft_targets=soft(Teacher(teacher_model, 0.3, knows_text=True), given))
    with torch.no_grad():
        own, taught = (each(ids)[0].log_softmax(-1).flatten(0, 1) for each in (student, teacher_model))
    hard = F.nll_loss(own, targets.flatten())
    divergence = F.kl_div(own, taught, log_target=True, reduction="batchmean")
    entropy = -(taught.exp() * taught).sum(-1).mean()
    assert loss.objective.item() == pytest.approx(float(0.7 * hard + 0.3 * (divergence + entropy)), abs=1e-3)
    assert loss.nats.item() == pytest.approx(float(hard), abs=1e-6)


def test_a_model_that_learns_from_its_teacher_alone_gets_its_probabilities() -> None:
    student = build_model(Section(**GRU), 3, seed=1)
    config = TrainingConfig(distill="fixed", distill_weight=1.0, learning_rate=0.05)
    step = TrainStep(student, config, Teacher(Fixed(None, 3), 1.0, knows_text=False))
    zeros = Batch(np.zeros((2, 8), np.int64), np.zeros((2, 8), np.int64), fresh=True)
    for _ in range(80):
        assert step.run([zeros], 1.0).is_updated
    with torch.no_grad():
        probabilities = student.eval()(torch.zeros(1, 8, dtype=torch.int64))[0].softmax(-1)
    torch.testing.assert_close(probabilities[0, -1], torch.tensor([0.5, 0.25, 0.25]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"type": "lstm", "adaptive_cutoffs": (2, 3)},
        {"type": "transformer", "hidden_size": 8, "num_heads": 2, "context_length": 32},
        {"type": "hybrid", "order": 3},
    ],
    ids=lambda options: options.get("type", "gru"),
)
def test_soft_targets_that_are_certain_give_the_objective_of_the_text(options: dict[str, Any]) -> None:
    known = {"type": "transformer"}.items() <= options.items()
    student = build_model(Section(**options), VOCAB, seed=1) if known else model(**options)
    given = batch(0, 20, fresh=True)
    ids, targets = torch.from_numpy(given.inputs), torch.from_numpy(given.targets)
    certain = F.one_hot(targets, VOCAB).float()
    plain = student.eval().training_loss(ids, targets, label_smoothing=0.1)
    softened = student.training_loss(ids, targets, label_smoothing=0.1, soft_targets=certain)
    torch.testing.assert_close(softened.objective, plain.objective)
    torch.testing.assert_close(softened.nats, plain.nats)


def test_the_teacher_carries_its_state_from_batch_to_batch_until_a_fresh_one() -> None:
    whole, cut = (Teacher(model(), 1.0, knows_text=True) for _ in range(2))
    expected = soft(whole, batch(0, 20, fresh=True))
    parts = [soft(cut, batch(0, 8, fresh=True)), soft(cut, batch(8, 20, fresh=False))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    torch.testing.assert_close(soft(cut, batch(0, 20, fresh=True)), expected)


def test_a_teacher_with_a_limited_context_reads_each_batch_by_itself() -> None:
    options = {"type": "transformer", "hidden_size": 8, "num_heads": 2, "context_length": 16}
    teacher = Teacher(build_model(Section(**options), VOCAB, seed=1), 1.0, knows_text=True)
    soft(teacher, batch(0, 8, fresh=True))
    assert teacher.state is None


def test_probabilities_of_an_epoch_are_computed_once_where_all_epochs_have_the_same_batches() -> None:
    calls = []

    def count(module: Any, arguments: Any) -> None:
        calls.append(module)

    taught = model()
    taught.register_forward_pre_hook(count)
    teacher = Teacher(taught, 0.5, knows_text=False)
    epochs = [
        [soft(teacher, batch(0, 8, fresh=True, place=0)), soft(teacher, batch(8, 16, fresh=False, place=1))]
        for _ in range(2)
    ]
    assert len(calls) == 2
    assert all(torch.equal(*pair) for pair in zip(*epochs, strict=True))
    # A batch that is not kept continues from the state after one that is.
    following = soft(teacher, batch(16, 20, fresh=False))
    other = Teacher(model(), 0.5, knows_text=False)
    for begin, end in ((0, 8), (8, 16)):
        soft(other, batch(begin, end, fresh=begin == 0))
    assert torch.equal(soft(other, batch(16, 20, fresh=False)), following)


@pytest.mark.parametrize("kind", ["ngram", "hybrid", "ensemble"])
def test_counts_of_the_same_text_leave_out_the_target_that_they_teach(kind: str) -> None:
    counting: dict[str, Any] = {"type": "hybrid", "order": 3, "hidden_size": 8, "embedding_size": 4}
    if kind == "ngram":
        taught = build_model(Section(type="ngram", order=3), VOCAB)
        taught.fit(TEXT)
    elif kind == "hybrid":
        taught = model(**counting)
    else:
        taught = build_model(Section(type="ensemble", member=counting), VOCAB, seed=1).eval()
        for member in taught.members:  # type: ignore[union-attr]
            member.fit(TEXT)  # type: ignore[operator]
    given = batch(0, 40, fresh=True)
    unseen, seen = (soft(Teacher(taught, 1.0, knows_text=knows), given) for knows in (True, False))
    index = torch.from_numpy(given.targets)[..., None]
    assert float(unseen.gather(-1, index).mean()) < float(seen.gather(-1, index).mean())
    torch.testing.assert_close(unseen.sum(-1), torch.ones(2, 40), atol=2e-3, rtol=0)
