"""The outcomes of cases on the pretended GPU, from one process for each module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretended_gpu import shim

ROOT = Path(__file__).parents[2]
Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """By case, what the program printed; the cases are the parameters `case` of the module's tests."""
    if reason := shim.missing():
        pytest.skip(f"the pretended GPU {reason}")
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = dict.fromkeys(item.callspec.params["case"] for item in items if "case" in item.callspec.params)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.pretended_gpu.program"], cwd=ROOT, input="\n".join(cases), text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    found = {outcome["case"]: outcome for outcome in map(json.loads, ran.stdout.splitlines())}
    assert list(found) == list(cases), f"the program ended early: {ran.stderr[-3000:]}"
    return found


@pytest.fixture
def outcome(outcomes: dict[str, Outcome], case: str) -> Outcome:
    """The values of the test's case, which must not have raised an error."""
    found = outcomes[case]
    if "error" in found:
        # Not an AssertionError, which a test that is expected to fail would hide.
        raise RuntimeError(f"{case}: {found['error']}\n{found['traceback']}")
    return found
