"""Check on this machine that an interrupted and resumed run gives bit-identical weights.

    measure ──► N steps in one process
            ──► N/2 steps in a second process, killed by SIGKILL; the rest in a third     ──► compare all numbers

A plan by time is first followed by the clock. The other processes repeat the plan that it recorded.

Each process is `python -m lm.jobs.verify_resume`, with its task as JSON on stdin.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import RunConfig, validate
from lm.device import pick_device
from lm.errors import ConfigError, TrainingError
from lm.files import Arrays
from lm.jobs.distill import teacher_name
from lm.jobs.ensemble_config import one_model
from lm.jobs.prepared_job import PreparedJob
from lm.jobs.resolve import TrainRequest, resolve_new_run
from lm.jobs.speed import measure_speed
from lm.jobs.train import resume, train_new_run
from lm.runs.run import load
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import Callback, Tick
from lm.training.plan import Plan

SECONDS = 12.0
"""Time for N steps; they are run twice, and three processes are started."""
LEAST_SECONDS = 3.0
"""Of a plan by time, so that it has several validations."""
MIN_STEPS, MAX_STEPS = 4, 200
"""Of a plan in steps."""
VALIDATION_TOKENS = 2000
GPU_TOLERANCE = 1e-2
"""On a GPU, where sums have no fixed order: the largest difference, relative to the tensor's largest number."""
STRAIGHT, KILLED = "straight", "killed"
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Verdict:
    """The result of the check."""

    same: bool
    sentence: str
    steps: int
    killed_at: int
    resumed_from: int
    numbers: int
    """Compared, in all tensors."""
    different: tuple[str, ...]
    """Tensors that differ, as FILE: NAME."""
    seconds: float


def verify_resume(job: PreparedJob, request: TrainRequest) -> Verdict:
    """Train a short plan twice, in one process and with a kill in the middle, and compare.

    Args:
        job: options and tokens; the length of its plan is replaced.
        request: where to train. Its folder of runs gets a temporary folder, which is deleted.

    Raises:
        ConfigError: the model is trained without steps.
        TrainingError: a process ended in another way than planned.
    """
    started_at = time.perf_counter()
    job = replace(job, config=one_model(job.config))
    if job.method.in_one_pass:
        raise ConfigError(f"--verify-resume: {job.config.model.type} models count in one pass: nothing can be resumed.")
    step_seconds = measure_speed(job.config, job.tokens, SECONDS / 8).step_seconds
    steps = max(MIN_STEPS, min(MAX_STEPS, int(SECONDS / step_seconds))) // 2 * 2
    by_time = job.config.training.minutes is not None
    length: dict[str, Any]
    if by_time:
        length = {"minutes": max(LEAST_SECONDS, steps * step_seconds) / 60}
    else:
        length = {"max_steps": steps, "evaluate_every": steps // 2}
    teacher = None if job.teacher is None else teacher_name(job.teacher, None)
    training = job.config.training.model_copy(
        update={
            "distill": teacher, "ensemble": None, "student": False,
            "max_steps": None, "minutes": None, "epochs": None, "evaluate_every": None, "log_every": 1,
            "validation_tokens": VALIDATION_TOKENS, "patience": None, "devices": None, "shard": False, **length,
        }
    )  # fmt: skip
    config = job.config.model_copy(update={"training": training})
    request.runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=request.runs_dir) as folder:
        data_dir, init = request.data_dir and str(request.data_dir), job.init
        task = {
            "config": config.model_dump(mode="json"), "runs_dir": folder, "data_dir": data_dir,
            "init": init and [init.name + "@" + init.checkpoint, str(init.folder.path.parent)],
        }  # fmt: skip
        killed, straight = (RunFolder(Path(folder) / name) for name in (KILLED, STRAIGHT))
        _process({**task, "name": STRAIGHT})
        steps, half = _length_and_middle(straight)
        plan = _recorded_plan(straight)
        _process({**task, "name": KILLED, "kill_at": half + 1, "plan": plan}, expected=-signal.SIGKILL)
        resumed_from = int(killed.read_state()["train_state"]["step"])
        _process({"resume": KILLED, "runs_dir": folder, "data_dir": data_dir})
        tolerance = 0.0 if pick_device(training.device).type == "cpu" else GPU_TOLERANCE
        numbers, different = compare(_all_tensors(straight), _all_tensors(killed), tolerance=tolerance)
    seconds = time.perf_counter() - started_at
    what = f"{steps} steps without interruption, and with a kill at step {half + 1} and a resume from {resumed_from},"
    how = f"to within {tolerance:g} of each tensor's largest number" if tolerance else "bit for bit"
    if different:
        names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        sentence = f"Different: {what} do not give the same {how}: {names}."
    else:
        sentence = (
            f"The same: {what} give the same weights, optimizer state, random generators and carried state, "
            f"{how} ({numbers:,} numbers; {seconds:.0f} s)."
        )
    return Verdict(not different, sentence, steps, half + 1, resumed_from, numbers, tuple(different), seconds)


def _length_and_middle(run: RunFolder) -> tuple[int, int]:
    """The steps of a finished run, and the step of the validation in its middle: a save follows it."""
    rows = run.read_metrics()
    steps: int = rows[-1]["step"]
    validated = [row["step"] for row in rows if row["valid_loss"] is not None and row["step"] < steps]
    if not validated:
        raise TrainingError("--verify-resume: the steps are too slow for a check of some seconds.")
    return steps, min(validated, key=lambda step: abs(step - steps / 2))


def _recorded_plan(run: RunFolder) -> dict[str, Any]:
    """The plan of a finished run, so that another run repeats it; in a plan by time, with the recorded segments."""
    plan, progress = Plan.from_json(run.read_record()["plan"]), run.read_state()["train_state"]
    if plan.seconds is None:
        return plan.to_json()
    return {**plan.to_json(), "segments": progress["segments"]}


def compare(one: Mapping[str, Arrays], two: Mapping[str, Arrays], *, tolerance: float = 0.0) -> tuple[int, list[str]]:
    """How many numbers were compared, and which tensors differ, as FILE: NAME.

    Args:
        one, two: tensors by file.
        tolerance: of a difference, by the largest number of the tensor; 0: every bit counts. Random generators have
            to be the same in any case.
    """
    numbers, different = 0, []
    for file in sorted(one.keys() | two.keys()):
        ours, theirs = one.get(file, {}), two.get(file, {})
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or not _same(ours[name], theirs[name], tolerance):
                different.append(f"{file}: {name}")
            numbers += ours[name].size if name in ours else 0
    return numbers, different


def _same(one: Any, two: Any, tolerance: float) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if one.tobytes() == two.tobytes():
        return True
    if not tolerance or one.dtype.kind != "f":
        return False
    return bool(np.abs(one - two).max() <= tolerance * np.abs(one).max())


def _all_tensors(run: RunFolder) -> dict[str, Arrays]:
    return {"best": run.read_weights("best")[0], **run.read_last()[1]}


# -- the processes --------------------------------------------------------------------------------------


def _process(task: dict[str, Any], *, expected: int = 0) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "lm.jobs.verify_resume"], input=json.dumps(task), text=True, encoding="utf-8",
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if ran.returncode != expected:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(
            f"--verify-resume: the process of {task.get('name') or task['resume']!r} ended with {ran.returncode} "
            f"instead of {expected}: {last}"
        )


class _Kill(Callback):
    """Kills this process at a step, at once, as the system does when memory is short."""

    def __init__(self, run: RunFolder, step: int) -> None:
        self._run, self._step = run, step

    def on_step(self, tick: Tick) -> None:
        if tick.step != self._step:
            return
        # The checkpoint of the step before is written in another thread.
        while self._run.read_state()["train_state"]["step"] < self._step - 1:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def _main() -> None:
    task = json.loads(sys.stdin.read())
    runs_dir, data_dir = Path(task["runs_dir"]), task["data_dir"] and Path(task["data_dir"])
    if "resume" in task:
        resume(task["resume"], runs_dir=runs_dir, data_dir=data_dir)
        return
    config = validate(RunConfig, task["config"]).resolved()
    init = load(task["init"][0], runs_dir=task["init"][1]) if task["init"] else None
    kill = [_Kill(RunFolder(runs_dir / KILLED), task["kill_at"])] if "kill_at" in task else []
    request = TrainRequest(
        corpus=config.corpus.source, config=config, name=task["name"], runs_dir=runs_dir, init=init, data_dir=data_dir,
        callbacks=kill, plan=Plan.from_json(task["plan"]) if "plan" in task else None,
    )  # fmt: skip
    train_new_run(resolve_new_run(request))


if __name__ == "__main__":
    _main()
