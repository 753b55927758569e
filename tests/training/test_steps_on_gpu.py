"""A run on the pretended GPU: nothing waits between two log lines, and the losses are those of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.corpora import PreparedCorpus
from lm.corpora.batches import make_batches
from lm.training.prefetch import Prefetch

pytestmark = pytest.mark.slow

LOG_EVERY = 4
TABLES = {"model.table_orders": [2, 3], "model.table_dropout": 0, "training.precision": "fp32"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("gru", {**TABLES, "training.average_share": 0.5}),
    "overflow": (
        "transformer",
        {
            "training.precision": "fp16", "training.amp": "O2", "training.optimizer": "muon",
            "training.loss_scale_init": 2.0**26,
        },
    ),
    "sgd": ("lstm", {"training.precision": "fp32", "training.optimizer": "sgd", "training.gradient_accumulation": 2}),
    "counts": ("gru", {"model.type": "hybrid", "model.order": 3, "training.precision": "fp32"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the cases, made by one process."""
    folder = tmp_path_factory.mktemp("gpu")
    cases = [str(LOG_EVERY)] + [text for model, options in CASES.values() for text in (model, json.dumps(options))]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.training.steps_on_gpu", str(folder), *cases],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(zip(CASES, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_step_between_two_log_lines_waits_for_the_device(found: dict[str, Any], case: str) -> None:
    waits = found[case]["waits"]
    # The first step follows the first save and sets the device up.
    between = {step: places for step, places in waits.items() if int(step) > 1 and int(step) % LOG_EVERY}
    assert len(between) == 8 and not any(between.values()), between


@pytest.mark.parametrize("case", CASES)
def test_the_pretended_gpu_learns_as_the_cpu_does(found: dict[str, Any], case: str) -> None:
    for one, two in zip(found[case]["cpu"], found[case]["gpu"], strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
        assert two["train_accuracy"] == pytest.approx(one["train_accuracy"], abs=0.05)
        for name in ("step", "skipped_steps", "loss_scale", "clip_rate"):
            assert one.get(name) == two.get(name)
    assert (found[case]["gpu"][-1]["skipped_steps"] > 0) == (case == "overflow")


# -- batches that are made beside the step ---------------------------------------------------------------


class Recorder:
    """A model that notes what it is asked for, with 5 earlier tokens."""

    host_context = 5

    def __init__(self) -> None:
        self.earlier: list[Any] = []

    def host_inputs(self, ids: Any, targets: Any, earlier: Any) -> dict[str, Any]:
        self.earlier.append(None if earlier is None else earlier.copy())
        return {}


@pytest.mark.parametrize("kind", ["streams", "rotated", "random", "shuffled"])
def test_batches_made_ahead_are_those_of_their_number_from_any_number_on(
    prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    split = prepared.splits["train"]
    plain = make_batches(kind, split, 4, 16, seed=3)
    ahead = Prefetch(make_batches(kind, split, 4, 16, seed=3), Recorder())  # type: ignore[arg-type]
    epoch = plain.per_epoch
    for index in (0, 1, 2, epoch - 1, epoch, epoch + 1, 7, 8, 3 * epoch):
        one, two = plain.batch(index), ahead.batch(index)
        assert two.pinned is not None
        assert np.array_equal(one.inputs, two.pinned["inputs"]) and np.array_equal(one.targets, two.pinned["targets"])
        assert (one.fresh, one.place, one.weight) == (two.fresh, two.place, two.weight)


def test_the_earlier_tokens_go_back_over_short_batches_to_the_start_of_the_text(
    prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    model = Recorder()
    batches = make_batches("streams", prepared.splits["train"], 3, 2, seed=1)
    ahead = Prefetch(batches, model)  # type: ignore[arg-type]
    # A resume begins anywhere: here at batch 4.
    ahead.batch(4)
    while len(model.earlier) < 3:
        ahead.batch(4 + len(model.earlier))
    text = np.concatenate([batches.batch(index).inputs for index in range(6)], axis=1)
    assert [earlier.tolist() for earlier in model.earlier[:2]] == [text[:, 3:8].tolist(), text[:, 5:10].tolist()]
    fresh, second = Recorder(), Recorder()
    Prefetch(batches, fresh)._make(0)  # type: ignore[arg-type]
    Prefetch(batches, second)._make(1)  # type: ignore[arg-type]
    assert fresh.earlier == [None] and second.earlier[0].tolist() == text[:, :2].tolist()
