"""Training, evaluation and sampling on a pretended GPU (gpu.py says what that proves and what not)."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from lm.config import preset_names

pytestmark = pytest.mark.slow

LEVELS = {
    "fp32": "fp32", "tf32": "tf32",
    "bf16:O1": "bf16 O1", "bf16:O2": "bf16 O2", "bf16:O3": "bf16 O3",
    "fp16:O1": "fp16 O1", "fp16:O2": "fp16 O2", "fp16:O3": "fp16 O3",
}  # fmt: skip
TRAINED = [name for name in preset_names() if not name.startswith("ngram")]
MAX_OPERATORS = {
    "gru-char": 300, "gru-char-gpu": 300, "gru-char-large": 300, "gru-char-small": 295, "gru-subword": 80,
    "gru-subword-medium": 215, "gru-subword-small": 210, "gru-word": 195, "hybrid-char": 345, "lstm-char": 70,
    "lstm-word": 195, "lstm-word-gpu": 520, "transformer-char": 1090, "transformer-char-gpu": 1320,
    "transformer-subword": 860, "transformer-word": 960,
}  # fmt: skip
"""Launches of a step of a tiny model at any level; two layers of a Transformer."""
ALLOWED_WAITS: dict[str, set[str]] = {}
"""By preset, "kind file:line" of waits that a step may make."""


def later(reason: str, kind: type[Exception] = AssertionError) -> pytest.MarkDecorator:
    return pytest.mark.xfail(reason=reason, raises=kind, strict=True)


LATE_READING = later("a step reads loss and gradient norm at once")
STEPS = [f"steps:{name}:{level}" for name in TRAINED for level in LEVELS]


@pytest.mark.parametrize("case", STEPS)
def test_a_preset_makes_steps_at_every_level(case, outcome):
    _, name, level = case.split(":", 2)
    assert outcome["format"] == LEVELS[level]
    assert all(map(math.isfinite, outcome["losses"]))
    assert outcome["accuracy"] is None or 0 <= outcome["accuracy"] <= 1
    assert outcome["operators"] <= MAX_OPERATORS[name], outcome["operator_names"]
    assert outcome["float64"] == {}


@pytest.mark.parametrize("case", [f"equal:{name}:fp32" for name in TRAINED])
def test_losses_and_gradient_norms_in_fp32_are_those_of_the_cpu(case, outcome):
    assert outcome["cuda"] == pytest.approx(outcome["cpu"], rel=1e-4)
    assert outcome["cuda norms"] == pytest.approx(outcome["cpu norms"], rel=1e-3)


@pytest.mark.parametrize("case", [pytest.param(f"loop:{name}", marks=LATE_READING) for name in TRAINED])
def test_the_host_does_not_wait_in_steps_between_two_log_lines(case, outcome):
    found = set(outcome["wait_places"]) - ALLOWED_WAITS.get(case.partition(":")[2], set())
    assert outcome["steps"]
    assert not found


JOBS = [f"job:{name}:{level}" for name, level in zip(TRAINED, [*LEVELS, *LEVELS, *LEVELS], strict=False)]


@pytest.mark.parametrize("case", [*JOBS, "job:ngram-char"])
def test_a_run_trains_resumes_evaluates_and_samples(case, outcome):
    # Counts are looked up on the host.
    assert outcome["devices"] == ["cpu" if "ngram" in case else "cuda"]
    assert outcome["differing"] == [], "a resumed run has other weights than one without a stop"
    assert 0 < outcome["loss"] < math.inf
    assert 0 < outcome["scored"] < math.inf
    assert outcome["sample"]


@pytest.mark.parametrize("case", [*JOBS, "job:ngram-char"])
def test_a_run_makes_no_float64_on_the_device(case, outcome):
    assert outcome["float64"] == {}


@pytest.mark.parametrize("case", ["mixing:gru-char:::part=embedding", "mixing:gru-char:::part=output"])
def test_a_weight_on_the_other_device_is_an_error(case, outcomes):
    assert outcomes[case]["error"].startswith("MixedDevicesError")


@pytest.mark.parametrize("case", ["explain:"])
def test_lm_train_explains_the_choice_for_a_gpu(case, outcome):
    assert outcome["exit_code"] == 0
    assert "32 to 2,048 rows a batch, 8.6 GB free" in outcome["printed"]
    assert "on cuda" in outcome["printed"]


COMPILED = """
import torch
from lm.config import Section
from lm.models.base import build_model

section = Section(
    type="transformer", context_length=8, hidden_size=16, num_heads=2, num_layers=2, dropout=0.1, table_orders=[2, 3],
    table_buckets=30,
)
with torch.device("meta"):
    model = build_model(section, 40)
    ids = torch.zeros(2, 8, dtype=torch.int64)
step = torch.compile(lambda ids: model.training_loss(ids, ids).objective, fullgraph=True, backend="aot_eager")
step(ids).backward()
assert all(parameter.grad is not None for parameter in model.parameters())
"""


def test_the_step_of_a_transformer_is_one_graph_for_the_compiler():
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
