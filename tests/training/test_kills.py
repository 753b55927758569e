"""SIGKILL at any moment leaves a run that resumes, and ends with the bits of one that was left alone."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from lm.runs.run_folder import RunFolder
from tests.training.conftest import make_text
from tests.training.killing import AIMED, Killer

KILLS_IN_SOAK = 150
TRIES = 10
OPTIONS = {
    # All that is saved: dropout's random generator, a carried state, two optimizers, averaged and kept weights.
    "training.max_steps": 24, "training.evaluate_every": 4, "training.checkpoint_every": 6,
    "training.keep_checkpoints": 2, "training.log_every": 2, "training.average_share": 0.3,
    "training.batch_size": 8, "training.bptt": 32, "training.warmup_steps": 0, "model.dropout": 0.2,
    "model.hidden_size": 48, "model.embedding_size": 8, "model.table_orders": "[2,3]", "model.table_buckets": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Killer:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "words.txt").write_text(make_text(9000), "utf-8")
    return Killer(folder)


def training(name: str) -> tuple[str, ...]:
    options = itertools.chain(*(("--set", f"{path}={value}") for path, value in OPTIONS.items()))
    return ("words.txt", "--preset", "gru-char", "--name", name, "--overwrite", *options)


@pytest.fixture(scope="module")
def straight(killer: Killer) -> RunFolder:
    """The run that nobody kills."""
    assert not killer.kill(training("straight"), "straight")
    return RunFolder(killer.folder / "checkpoints" / "straight")


def assert_same(run: RunFolder, straight: RunFolder) -> None:
    for state in ("best", "last", *straight.kept_checkpoints()):
        (arrays, facts), (expected, known) = run.read_weights(state), straight.read_weights(state)
        assert facts == known
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=f"{run.name}, {state}: {name}")
    assert run.kept_checkpoints() == straight.kept_checkpoints()
    (state, tensors), (known, expected) = run.read_last(), straight.read_last()
    for file, arrays in expected.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(tensors[file][name], array, err_msg=f"{run.name}, {file}: {name}")
    assert without_time(state["train_state"]) == without_time(known["train_state"])
    assert [without_time(row) for row in run.read_metrics()] == [without_time(row) for row in straight.read_metrics()]
    assert not list(run.path.rglob("*.partial")), "what kills left of files is swept away"


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in row.items()
        if name not in ("seconds", "validation_seconds", "tokens_per_second", "memory_bytes")
    }


def survive(killer: Killer, straight: RunFolder, kills: Iterable[Callable[[str], bool]], prefix: str) -> int:
    """Kill a run again and again; one that came to its end is compared, and the next one begun. How many came."""
    names = (f"{prefix}-{number}" for number in itertools.count())
    name, finished = next(names), 0
    for kill in kills:
        # What is aimed at may lie behind a run that is near its end: the next one comes to it.
        for _ in range(TRIES):
            if kill(name):
                break
            assert_same(RunFolder(straight.path.parent / name), straight)
            name, finished = next(names), finished + 1
        else:
            raise AssertionError(f"{TRIES} runs ended before they were killed")
    if (straight.path.parent / name).exists():
        while killer.kill(training(name), name):
            pass
        assert_same(RunFolder(straight.path.parent / name), straight)
        finished += 1
    return finished


@pytest.mark.slow
def test_eight_kills_cost_no_bit(killer: Killer, straight: RunFolder) -> None:
    aims = [
        ("step", 7), ("evaluation", 2), ("line of metrics", 3), ("best: renamed", 1), ("kept: half a file", 1),
        ("last: half a file", 3), ("last: between the renames", 2), ("last: old removed", 1),
    ]  # fmt: skip
    kills = [lambda name, aim=aim: killer.kill(training(name), name, *aim) for aim in aims]
    before = killer.hits.copy()
    assert survive(killer, straight, kills, "eight") >= 1
    assert killer.hits - before == dict.fromkeys((phase for phase, _ in aims), 1)


@pytest.mark.soak
def test_a_run_survives_kills_in_every_phase_and_at_random_moments(
    killer: Killer, straight: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    source = random.Random(6)
    longest = straight.read_last()[0]["train_state"]["seconds"]

    def anywhere(name: str) -> bool:
        nonlocal longest
        killed = killer.kill(training(name), name, seconds=source.uniform(0, longest))
        # The machine may be quicker now than it was for the straight run.
        longest *= 1.05 if killed else 0.7
        return killed

    aimed = [(phase, number) for phase in AIMED for number in (1, source.randint(2, 4))]
    kills = [lambda name, aim=aim: killer.kill(training(name), name, *aim) for aim in aimed]
    kills += [anywhere] * (KILLS_IN_SOAK - len(aimed))
    source.shuffle(kills)
    before = killer.kills
    finished = survive(killer, straight, kills, "soak")
    assert killer.kills - before >= KILLS_IN_SOAK
    assert not [phase for phase in AIMED if not killer.hits[phase]]
    with capsys.disabled():
        sys.stdout.write(f"\n{killer.kills - before} kills, {finished} runs ended as one that was left alone\n")
        sys.stdout.writelines(f"{killer.hits[phase]:4}  {phase}\n" for phase in AIMED)
