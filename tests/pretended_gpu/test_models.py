"""Models on a pretended GPU (gpu.py says what that proves and what not): scores, and steps with host inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretended_gpu import shim

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, object]] = {
    "gru": {"table_orders": [2, 4], "table_buckets": 60},
    "lstm": {"adaptive_cutoffs": [10, 25], "tie_weights": True},
    "hybrid": {"order": 3},
    "transformer": {"num_heads": 2, "context_length": 16, "table_orders": [2]},
}
PROGRAM = """
import json, sys
from tests.pretended_gpu import gpu
import numpy as np, torch
from lm.config import Section
from lm.evaluation.perplexity import score
from lm.models.base import build_model
from lm.training.optimizers import make_optimizers
from lm.config import TrainingConfig

text = np.random.default_rng(0).integers(40, size=(1500,))
rows = text[:129 * 4].reshape(4, 129)
for kind, options in json.loads(sys.argv[1]).items():
    found = {}
    model = build_model(Section(type=kind, hidden_size=16, **options), 40, seed=1)
    if model.trained_by == "both":
        model.fit(text)
    # Logits in steps, so that many are equal.
    for name, parameter in model.named_parameters():
        if "output" in name or "lm_head" in name:
            parameter.data.zero_()
        if name.endswith("output.bias"):
            parameter.data.copy_(torch.arange(40) // 4)
    with gpu.pretended() as watch:
        for device in ("cpu", "cuda"):
            model.to(device)
            watch.reset()
            scores = score(model, text, rows=4, warm_up=8, unknown_id=7)
            sums = [scores.tokens, scores.nats, scores.squared_nats, scores.top1, scores.top5, scores.unknown_nats]
            found[device] = {"sums": sums, **watch.report()}
        optimizers = make_optimizers(model, TrainingConfig(optimizer="muon"), fused=True)
        given = model.host_inputs(rows[:, :-1], rows[:, 1:])
        given = {name: tensor.pin_memory().to("cuda", non_blocking=True) for name, tensor in given.items()}
        ids, targets = (torch.from_numpy(part.copy()).to("cuda") for part in (rows[:, :-1], rows[:, 1:]))
        for _ in range(2):
            watch.reset()
            model.training_loss(ids, targets, host_inputs=given or None).objective.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found["step"] = watch.report()
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """Sums and counts by model, from one process."""
    if reason := shim.missing():
        pytest.skip(f"the pretended GPU {reason}")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(MODELS)], cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(zip(MODELS, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_the_cpu(model: str, outcomes: dict[str, dict[str, Any]]) -> None:
    cpu, cuda = (outcomes[model][device]["sums"] for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=1e-5)
    # Tokens, and the ranks of tokens with many equal logits.
    assert [cuda[index] for index in (0, 3, 4)] == [cpu[index] for index in (0, 3, 4)]


@pytest.mark.parametrize("model", MODELS)
def test_scoring_waits_for_the_device_once(model: str, outcomes: dict[str, dict[str, Any]]) -> None:
    # A hybrid's counts are on the host: it also waits for the tokens of its three pieces.
    expected = 4 if model == "hybrid" else 1
    assert outcomes[model]["cuda"]["waits"] == expected, outcomes[model]["cuda"]["wait_places"]


@pytest.mark.parametrize("model", MODELS)
def test_no_float64_is_on_the_device(model: str, outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes[model]["cuda"]["float64"] == outcomes[model]["step"]["float64"] == {}


@pytest.mark.parametrize("model", MODELS)
def test_a_step_with_host_inputs_does_not_wait(model: str, outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes[model]["step"]["waits"] == 0, outcomes[model]["step"]["wait_places"]
