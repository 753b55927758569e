"""The same few training steps on every device and in every number format of this machine: `lm bench`.

Each row runs in its own process (several GPUs: one process each, as with `lm train --devices`), so that it has its own
threads and its own memory peak. The process reads its options from a file and prints one line of JSON:

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
from lm.device import Precision, deterministic, enough_memory, pick_device
from lm.errors import CorpusError, LMError
from lm.profiling.trial import WARM_UP_STEPS, make_trial
from lm.torch_private import keep_freed_memory
from lm.training import distributed
from lm.training.precision import Format, Level, choose_format, formats

STEPS = 10
"""Timed in each row, after the warm-up."""
ROW_SECONDS = 10.0
"""A row that takes longer ends after the current step."""
TIMEOUT_SECONDS = 600.0
"""Longest time for a row."""


@dataclass(frozen=True)
class Setting:
    """Device and number format of a row."""

    device: str
    devices: int
    threads: int | None
    """Of a CPU."""
    precision: Precision
    level: Level

    @property
    def format(self) -> Format:
        """The number format and its level."""
        return Format(self.precision, self.level)

    @property
    def overrides(self) -> dict[str, Any]:
        """The training options to change."""
        return {"training.device": self.device, "training.precision": self.precision, "training.amp": self.level}


@dataclass(frozen=True)
class Row:
    """The measurements of a setting, or why there are none."""

    setting: Setting
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    speed_up: float | None = None
    """Over the first row."""
    peak_bytes: int | None = None
    """Resident memory of the process on a CPU, the allocator's peak on a GPU; the largest of several."""
    steps: int = 0
    loss: float | None = None
    """Of the last step: the same step in each row, unless time ran out."""
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, those of the setting first."""
        content = asdict(self)
        return {**content.pop("setting"), **content}


def settings() -> Iterator[Setting]:
    """All settings of this machine: a CPU with one thread and with all, one GPU, all GPUs, each in every format."""
    gpus = machine.gpus()
    places: list[tuple[str, int, int | None]] = [("cpu", 1, n) for n in sorted({1, host.usable_threads()})]
    places += [(gpus[0]["device"] if n == 1 else "cuda", n, None) for n in sorted({1, len(gpus)}) if gpus]
    for device, devices, threads in places:
        for each in formats(torch.device(device)):
            yield Setting(device, devices, threads, each.precision, each.level)


def auto_format(config: RunConfig, device: str) -> Format:
    """The format that `precision = "auto"` takes for a model on a device."""
    training = config.training.model_copy(update={"precision": "auto", "amp": None})
    bf16_on_cpu: bool = config.model.resolve("model").bf16_on_cpu
    return choose_format(training, torch.device(device), bf16_on_cpu=bf16_on_cpu)


def run(config: RunConfig, corpus: PreparedCorpus, chosen: list[Setting]) -> Iterator[Row]:
    """The rows, one after the other.

    Args:
        config: of the model and its training; only device and number format change.
        corpus: its prepared text, which the rows read from the cache.
        chosen: the settings; the first one is the reference of `speed_up`.
    """
    first: float | None = None
    for setting in chosen:
        found = _run_row(config, corpus, setting)
        speed = found.get("tokens_per_second")
        first = first or speed
        yield Row(setting, speed_up=speed / first if speed and first else None, **found)


def _run_row(config: RunConfig, corpus: PreparedCorpus, setting: Setting) -> dict[str, Any]:
    content = {
        "config": config.model_dump(mode="json"), "overrides": setting.overrides, "key": corpus.key,
        "threads": setting.threads, "devices": setting.devices,
    }  # fmt: skip
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS"
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if setting.threads is not None:
        environment |= dict.fromkeys(names, str(setting.threads))
    try:
        with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
            file = Path(folder) / "row.json"
            file.write_text(json.dumps(content), "utf-8")
            ran = subprocess.run(
                _program(file), env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer in {TIMEOUT_SECONDS:.0f} seconds"}
    lines = ran.stdout.splitlines()
    if ran.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    errors = ran.stderr.strip().splitlines()
    return {"problem": f"ended with code {ran.returncode}: {errors[-1] if errors else 'no error message'}"}


def _program(file: Path) -> list[str]:
    return [sys.executable, "-m", "lm.profiling.bench", str(file)]


def measure(config: RunConfig, corpus: PreparedCorpus) -> dict[str, Any]:
    """Time the steps of a row, in its own process."""
    device = pick_device(config.training.device)
    with enough_memory(), deterministic(device), keep_freed_memory():
        trial = make_trial(config, corpus, learns=True)
        for _ in range(WARM_UP_STEPS):
            loss = trial.run_step().loss
        times: list[float] = []
        world = trial.step.world
        while world.broadcast_from_rank0(lambda: len(times) < STEPS and sum(times) < ROW_SECONDS):
            machine.wait(device)
            begun = time.perf_counter()
            loss = trial.run_step().loss
            machine.wait(device)
            times.append(time.perf_counter() - begun)
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(trial.step.device) if on_gpu else host.peak_resident_bytes()
        peak = max((found for found in world.all_gather(peak) if found is not None), default=None)
    step_seconds = statistics.median(times)
    return {
        "tokens_per_second": trial.batches.tokens_per_step / step_seconds, "step_seconds": step_seconds,
        "peak_bytes": peak, "steps": len(times), "loss": loss,
    }  # fmt: skip


def main() -> None:
    """Run one row: from the file in the first argument to standard output."""
    file = Path(sys.argv[1])
    content = json.loads(file.read_text("utf-8"))
    if content["devices"] > 1 and not distributed.started():
        sys.exit(distributed.launch(content["devices"], _program(file)))
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
