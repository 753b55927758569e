"""The same few training steps on every device and number format that are here: what `lm bench` runs.

Each row is a process of its own (several GPUs: one for each, as `lm train --devices` has them), so that its peak of
memory and its threads are its own; it is told its options in a file and answers with one line of JSON:

    python -m lm.profiling.bench row.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lm import host, machine
from lm.config import RunConfig, merge
from lm.corpora import PreparedCorpus, load_prepared
from lm.device import deterministic, enough_memory, pick_device
from lm.errors import CorpusError, LMError
from lm.profiling.trial import WARM_UP_STEPS, make_trial
from lm.torch_private import keep_freed_memory
from lm.training import distributed
from lm.training.precision import formats

STEPS = 10
"""Timed in each row, after the warm-up."""
ROW_SECONDS = 10.0
"""A row that takes longer ends after the step that it is in."""
LONGEST_SECONDS = 600.0
"""A row that says nothing for so long is given up."""


@dataclass(frozen=True)
class Setting:
    """Where and how a row trains."""

    device: str
    devices: int
    threads: int | None
    """Of a CPU."""
    precision: str
    level: str

    @property
    def overrides(self) -> dict[str, Any]:
        """What the options of training become."""
        return {"training.device": self.device, "training.precision": self.precision, "training.amp": self.level}


@dataclass(frozen=True)
class Row:
    """What a setting gave, or why it gave nothing."""

    setting: Setting
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    speed_up: float | None = None
    """Over the first row."""
    peak_bytes: int | None = None
    """Resident memory of the process on a CPU, the allocator's peak on a GPU; of several, the fullest one's."""
    steps: int = 0
    loss: float | None = None
    """Of the last step: the same number of steps in each row, unless time ran out."""
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, the setting's fields first."""
        content = asdict(self)
        return {**content.pop("setting"), **content}


def settings() -> Iterator[Setting]:
    """All that is here: a CPU with one thread and with all, one GPU, all GPUs, each in every format."""
    threads = sorted({1, host.usable_threads()})
    for count in threads:
        yield from _levels("cpu", count)
    gpus = machine.gpus()
    for count in sorted({1, len(gpus)}) if gpus else ():
        yield from _levels(gpus[0]["device"] if count == 1 else "cuda", None, count)


def _levels(device: str, threads: int | None, devices: int = 1) -> Iterator[Setting]:
    for each in formats(torch.device(device)):
        yield Setting(device, devices, threads, each.precision, each.level)


def run(config: RunConfig, corpus: PreparedCorpus, chosen: list[Setting]) -> Iterator[Row]:
    """The rows, as each is done.

    Args:
        config: of the model and its training; the rows change device and number format alone.
        corpus: its prepared text, which the rows read from the cache.
        chosen: where and how, the first one to compare with.
    """
    first: float | None = None
    for setting in chosen:
        found = _row(config, corpus, setting)
        first = first or found.get("tokens_per_second")
        speed = found.get("tokens_per_second")
        yield Row(setting, speed_up=speed / first if speed and first else None, **found)


def _row(config: RunConfig, corpus: PreparedCorpus, setting: Setting) -> dict[str, Any]:
    content = {
        "config": config.model_dump(mode="json"), "overrides": setting.overrides, "key": corpus.key,
        "threads": setting.threads, "devices": setting.devices,
    }  # fmt: skip
    environment = dict(os.environ)
    if setting.threads is not None:
        environment |= {"OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
    else:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.pop(name, None)
    try:
        with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
            order = Path(folder) / "row.json"
            order.write_text(json.dumps(content), "utf-8")
            ran = subprocess.run(
                _program(order), env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
            )
    except subprocess.TimeoutExpired:
        return {"problem": f"gave no answer in {LONGEST_SECONDS:.0f} seconds"}
    lines = ran.stdout.splitlines()
    if ran.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    said = ran.stderr.strip().splitlines()
    return {"problem": f"ended with code {ran.returncode}: {said[-1] if said else 'without a word'}"}


def _program(order: Path) -> list[str]:
    return [sys.executable, "-m", "lm.profiling.bench", str(order)]


def measure(config: RunConfig, corpus: PreparedCorpus) -> dict[str, Any]:
    """In a row's own process: its steps, timed."""
    device = pick_device(config.training.device)
    with enough_memory(), deterministic(device), keep_freed_memory():
        trial = make_trial(config, corpus, learns=True)
        for _ in range(WARM_UP_STEPS):
            loss = trial.run_step().loss
        taken: list[float] = []
        world = trial.step.world
        while world.broadcast_from_rank0(lambda: len(taken) < STEPS and sum(taken) < ROW_SECONDS):
            machine.wait(device)
            begun = time.perf_counter()
            loss = trial.run_step().loss
            machine.wait(device)
            taken.append(time.perf_counter() - begun)
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(trial.step.device) if on_gpu else host.peak_resident_bytes()
        peak = max((found for found in world.all_gather(peak) if found is not None), default=None)
    step_seconds = statistics.median(taken)
    return {
        "tokens_per_second": trial.batches.tokens_per_step / step_seconds,
        "step_seconds": step_seconds,
        "peak_bytes": peak,
        "steps": len(taken),
        "loss": loss,
    }


def main() -> None:
    """One row: from the file that is named to standard output."""
    order = Path(sys.argv[1])
    content = json.loads(order.read_text("utf-8"))
    if content["devices"] > 1 and not distributed.started():
        sys.exit(distributed.launch(content["devices"], _program(order)))
    if content["threads"] is not None:
        torch.set_num_threads(content["threads"])
    try:
        corpus = load_prepared(content["key"])
        if corpus is None:
            raise CorpusError("The prepared text is no longer in the cache: run lm bench again.")
        config = merge(RunConfig.model_validate(content["config"]), content["overrides"])
        with distributed.joined(config.training):
            found = measure(config, corpus)
    except LMError as error:
        found = {"problem": str(error)}
    if distributed.rank() == 0:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
