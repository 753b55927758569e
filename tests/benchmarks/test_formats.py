"""The table of formats: ratios, targets of the CPU's instructions, and losses after equal steps."""

from __future__ import annotations

import pytest

from benchmarks import formats
from benchmarks.formats import Model, add_losses, claims, models, row
from benchmarks.machine import spread
from benchmarks.suite import Record
from lm.config import Section, TrainingConfig

TARGETS = {"amx_bf16": 2.0, "other": 1.3}
GRU = Model("a GRU", Section(type="gru"), TrainingConfig(), peer="its peer", over_peer=5.0, over_fp32=TARGETS)
FOUND = {"fp32": spread([10.0, 12.0, 11.0]), "bf16": spread([22.0]), "its peer": spread([2.0])}


def test_ratios_are_of_medians() -> None:
    found = row(GRU, FOUND)
    assert (found["bf16 over fp32"], found["fp32 over the peer"], found["bf16 over the peer"]) == (2.0, 5.5, 11.0)
    alone = row(GRU, {name: FOUND[name] for name in formats.FORMATS})
    assert alone["tokens/s of the peer"] is None and alone["fp32 over the peer"] is None


@pytest.mark.parametrize(("isa", "target"), [("amx_bf16", 2.0), ("avx512_bf16", 1.3)])
def test_the_target_of_bf16_is_that_of_the_instructions(isa: str, target: float) -> None:
    over_peer, over_fp32 = claims(GRU, FOUND, isa)
    assert (over_peer.value, over_peer.target) == (5.5, 5.0)
    assert (over_fp32.value, over_fp32.target) == (2.0, target)


def test_a_cpu_without_bf16_has_no_target_of_it() -> None:
    assert [claim.target for claim in claims(GRU, FOUND, None)] == [5.0]


def test_losses_are_means_over_the_seeds_that_have_both_formats() -> None:
    record = Record()
    losses = [(1, "fp32", 1.5), (1, "bf16", 1.501), (2, "fp32", 1.7), (2, "bf16", 1.705), (3, "fp32", 9.0)]
    trainings = [
        {"preset": "gru-char", "steps": 400, "seed": seed, "format": name, "loss": loss, "cpu": "a CPU"}
        for seed, name, loss in losses
    ]
    add_losses(record, trainings)
    (found,) = record.tables[0].rows
    assert found["seeds"] == 2 and found["bf16 - fp32"] == pytest.approx(0.003)
    assert record.claims[0].value == pytest.approx(0.003) and record.claims[0].target == 0.002


def test_every_model_of_the_table_has_options_that_exist() -> None:
    assert [each.name for each in models()][-len(formats.PRESETS) :] == list(formats.PRESETS)
