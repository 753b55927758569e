"""Training, evaluation and sampling on a pretended GPU (gpu.py says what that proves and what not)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from _pytest.mark.structures import ParameterSet

from lm.config import preset_names

pytestmark = pytest.mark.slow

LEVELS = {
    "fp32": "fp32", "tf32": "tf32",
    "bf16:O1": "bf16 O1", "bf16:O2": "bf16 O2", "bf16:O3": "bf16 O3",
    "fp16:O1": "fp16 O1", "fp16:O2": "fp16 O2", "fp16:O3": "fp16 O3",
}  # fmt: skip
TRAINED = [name for name in preset_names() if not name.startswith("ngram")]
DIFFERENT = [name for name in TRAINED if not name.endswith(("-small", "-medium", "-large"))]
"""Presets that differ in more than sizes, which are tiny here."""
MAX_OPERATORS = {
    "gru-char-gpu": 200, "gru-char-large": 200, "gru-char-small": 195, "gru-char": 200, "gru-subword-medium":
    170, "gru-subword-small": 170, "gru-subword": 105, "gru-word": 250, "hybrid-char": 240, "lstm-char": 95,
    "lstm-word-gpu": 540, "lstm-word": 250, "transformer-char-gpu": 1130, "transformer-char": 775,
    "transformer-char-plain": 670, "transformer-subword": 670, "transformer-word": 770,
    "transformer-word-plain": 670,
}  # fmt: skip
"""Launches of a step of a tiny model at any level; two layers of a Transformer."""
LEVELS_EACH = 1
"""Levels of a preset in `make test`; neighbours have other ones. `make soak` takes all."""
USUAL = {"gru-char", "hybrid-char", "lstm-word", "lstm-word-gpu", "transformer-char", "transformer-word-plain"}
"""Presets of the longer cases in `make test`."""
ALLOWED_WAITS: frozenset[str] = frozenset()
"""Waits that a step may make, as "kind file:line"."""


def cases(texts: list[str], usual: Callable[[int, str], bool]) -> list[ParameterSet]:
    """Cases, of which `make test` runs those that are usual by place and text, and `make soak` the others."""
    return [
        pytest.param(text, marks=() if usual(place, text) else pytest.mark.soak) for place, text in enumerate(texts)
    ]


def usual_level(place: int, _: str) -> bool:
    """`LEVELS_EACH` levels of each preset, shifted by as many from preset to preset."""
    preset, level = divmod(place, len(LEVELS))
    return (level - LEVELS_EACH * preset) % len(LEVELS) < LEVELS_EACH


def usual_preset(_: int, text: str) -> bool:
    return text.split(":")[1] in USUAL


@pytest.mark.parametrize("case", ["counting:"])
def test_waits_and_launches_are_counted(case, outcome):
    waits = {name: counts[0] for name, counts in outcome["found"].items()}
    free = {"add", "view", "foreach", "to a pinned tensor", "to the device, pinned", "float64"}
    assert waits == {name: int(name.rpartition(", ")[0] not in free) for name in waits}
    launches = {name: outcome["found"][f"{name}, enable_grad"][1] for name in ("add", "view", "foreach")}
    assert launches == {"add": 1, "view": 0, "foreach": 1}
    assert outcome["float64"]


@pytest.mark.parametrize("case", cases([f"steps:{name}:{level}" for name in TRAINED for level in LEVELS], usual_level))
def test_a_preset_makes_steps_at_every_level(case, outcome):
    _, name, level = case.split(":", 2)
    assert outcome["format"] == LEVELS[level]
    assert all(map(math.isfinite, outcome["losses"]))
    assert outcome["accuracy"] is None or 0 <= outcome["accuracy"] <= 1
    assert outcome["operators"] <= MAX_OPERATORS[name], outcome["operator_names"]
    assert outcome["float64"] == {}


@pytest.mark.parametrize("case", cases([f"equal:{name}:fp32" for name in DIFFERENT], usual_preset))
def test_losses_and_gradient_norms_in_fp32_are_those_of_the_cpu(case, outcome):
    assert outcome["cuda"] == pytest.approx(outcome["cpu"], rel=1e-4)
    assert outcome["cuda norms"] == pytest.approx(outcome["cpu norms"], rel=1e-3)


@pytest.mark.parametrize("case", cases([f"loop:{name}" for name in DIFFERENT], usual_preset))
def test_the_host_does_not_wait_in_steps_between_two_log_lines(case, outcome):
    assert len(outcome["steps"]) == 4
    assert set(outcome["wait_places"]) <= ALLOWED_WAITS


JOBS = (
    "job:gru-char:bf16:O1", "job:gru-subword:bf16:O2", "job:hybrid-char:fp16:O2", "job:lstm-char:tf32",
    "job:lstm-word:fp16:O1", "job:lstm-word-gpu:bf16:O3", "job:transformer-char:fp16:O3", "job:transformer-word:fp32",
)  # fmt: skip
"""Every level once."""


def usual_job(_: int, text: str) -> bool:
    return text.split(":", 1)[1] in {
        "gru-subword:bf16:O2",
        "lstm-word:fp16:O1",
        "transformer-char:fp16:O3",
        "ngram-char",
    }


@pytest.mark.parametrize("case", cases([*JOBS, "job:ngram-char"], usual_job))
def test_a_run_trains_resumes_evaluates_and_samples(case, outcome):
    # Counts are looked up on the host.
    assert outcome["devices"] == ["cpu" if "ngram" in case else "cuda"]
    assert outcome["differing"] == [], "a resumed run has other weights than one without a stop"
    assert 0 < outcome["loss"] < math.inf
    assert 0 < outcome["scored"] < math.inf
    assert outcome["sample"]


@pytest.mark.parametrize("case", cases([*JOBS, "job:ngram-char"], usual_job))
def test_a_run_makes_no_float64_on_the_device(case, outcome):
    assert outcome["float64"] == {}


@pytest.mark.parametrize("case", ["mixing:gru-char:::part=embedding", "mixing:gru-char:::part=output"])
def test_a_weight_on_the_other_device_is_an_error(case, outcomes):
    assert outcomes[case]["error"].startswith(
        ("MixedDevicesError", "RuntimeError: Expected all tensors to be on the same device")
    )


@pytest.mark.parametrize("case", ["explain:"])
def test_lm_train_explains_the_choice_for_a_gpu(case, outcome):
    assert outcome["exit_code"] == 0
    assert "32 to 2,048 rows a batch, 8.6 GB free" in outcome["printed"]
    assert "on cuda" in outcome["printed"]
