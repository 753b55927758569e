"""Whether a run that is killed and resumed ends with the weights of one that was not: proved on the machine at hand.

    measure ──► N steps in one process
            ──► N/2 steps in a second one, which is killed (SIGKILL); the rest in a third     ──► compare every number

Each process is `python -m lm.jobs.verify_resume`, with its order as JSON on stdin.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import RunConfig, validate
from lm.corpora import Corpus, Progress, prepare
from lm.device import enough_memory, pick_device
from lm.errors import ConfigError, CorpusError, TrainingError
from lm.files import Arrays
from lm.jobs.train import counts_alone, resume, train
from lm.models.base import build_model
from lm.runs.run import Run, load
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import Callback, Tick
from lm.training.plan import fit_to_text
from lm.training.trainer import Trainer

SECONDS = 12.0
"""How long N steps may take; they are made twice, and three processes are started."""
LEAST_STEPS, MOST_STEPS = 4, 200
VALIDATION_TOKENS = 2000
GPU_TOLERANCE = 1e-2
"""On a GPU, where sums have no fixed order: the largest difference of a number, by the largest number of its tensor."""
STRAIGHT, KILLED = "straight", "killed"
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Verdict:
    """What was found."""

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


def verify_resume(
    corpus: Corpus,
    config: RunConfig,
    *,
    runs_dir: Path,
    init: Run | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Train a short plan twice, straight and with a kill in the middle, and compare.

    Args:
        corpus: the text.
        config: all options; the length of its plan is replaced.
        runs_dir: on whose disk to try; nothing is left there.
        init: as for `train`.
        data_dir: where named corpora lie.
        progress: called while the corpus is read.

    Raises:
        LMError: the options or the text do not do.
        TrainingError: a process ended otherwise than it was to.
    """
    begun = time.perf_counter()
    if counts_alone(config):
        raise ConfigError(f"--verify-resume: {config.model.type} models count in one go: there is nothing to resume.")
    if "valid" not in corpus.splits:
        raise CorpusError(f"{corpus.source} has no validation split, so nothing could tell the best weights: add one.")
    steps = _steps_that_fit(corpus, config, init, progress)
    half = steps // 2
    training = config.training.model_copy(
        update={
            "max_steps": steps, "minutes": None, "epochs": None, "evaluate_every": half, "log_every": 1,
            "validation_tokens": VALIDATION_TOKENS, "patience": None, "devices": None, "shard": False,
        }
    )  # fmt: skip
    where = config.corpus.model_copy(update={"source": corpus.source})
    config = config.model_copy(update={"training": training, "corpus": where})
    runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=runs_dir) as folder:
        order = {
            "config": config.model_dump(mode="json"), "runs_dir": folder, "data_dir": data_dir and str(data_dir),
            "init": init and [init.name + "@" + init.state, str(init.folder.path.parent)],
        }  # fmt: skip
        _process({**order, "name": STRAIGHT})
        _process({**order, "name": KILLED, "kill_at": half + 1}, expected=-signal.SIGKILL)
        killed, straight = (RunFolder(Path(folder) / name) for name in (KILLED, STRAIGHT))
        resumed_from = int(killed.read_state()["train_state"]["step"])
        _process({"resume": KILLED, "runs_dir": folder, "data_dir": order["data_dir"]})
        device = pick_device(training.device).type
        tolerance = 0.0 if device == "cpu" else GPU_TOLERANCE
        numbers, different = compare(_everything(straight), _everything(killed), tolerance=tolerance)
    seconds = time.perf_counter() - begun
    what = f"{steps} steps in one go, and with the process killed at step {half + 1} and resumed from {resumed_from},"
    how = f"to within {tolerance:g} of each tensor's largest number" if tolerance else "bit for bit"
    if different:
        names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        sentence = f"Different: {what} do not leave the same {how}: {names}."
    else:
        sentence = (
            f"The same: {what} leave the same weights, optimizer state, random generators and carried state, "
            f"{how} ({numbers:,} numbers; {seconds:.0f} s)."
        )
    return Verdict(not different, sentence, steps, half + 1, resumed_from, numbers, tuple(different), seconds)


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


def _everything(run: RunFolder) -> dict[str, Arrays]:
    return {"best": run.read_weights("best")[0], **run.read_last()[1]}


def _steps_that_fit(corpus: Corpus, config: RunConfig, init: Run | None, progress: Progress | None) -> int:
    """An even number of steps that take about `SECONDS`, measured on a trainer that is thrown away."""
    prepared = prepare(corpus, init.tokenizer if init else config.tokenizer, progress=progress)
    config = fit_to_text(config, prepared.splits["train"].counts.tokens)
    with enough_memory():
        model = build_model(config.model, prepared.tokenizer.vocab_size, seed=config.training.seed)
        step_seconds, _ = Trainer(RunFolder(Path("unused")), config.training, model, prepared).measure(SECONDS / 8)
    return max(LEAST_STEPS, min(MOST_STEPS, int(SECONDS / step_seconds))) // 2 * 2


# -- the processes --------------------------------------------------------------------------------------


def _process(order: dict[str, Any], *, expected: int = 0) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "lm.jobs.verify_resume"], input=json.dumps(order), text=True, encoding="utf-8",
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if ran.returncode != expected:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TrainingError(
            f"--verify-resume: the process of {order.get('name') or order['resume']!r} ended with {ran.returncode} "
            f"instead of {expected}: {last}"
        )


class _Kill(Callback):
    """Ends this process, at a step, the way the system does when it is out of memory: at once, whatever it is at."""

    def __init__(self, run: RunFolder, step: int) -> None:
        self._run, self._step = run, step

    def on_step(self, tick: Tick) -> None:
        if tick.step != self._step:
            return
        # Half the way was to be saved; saving is beside training.
        while self._run.read_state()["train_state"]["step"] < self._step - 1:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def _main() -> None:
    order = json.loads(sys.stdin.read())
    runs_dir, data_dir = Path(order["runs_dir"]), order["data_dir"] and Path(order["data_dir"])
    if "resume" in order:
        resume(order["resume"], runs_dir=runs_dir, data_dir=data_dir)
        return
    config = validate(RunConfig, order["config"]).resolved()
    init = load(order["init"][0], runs_dir=order["init"][1]) if order["init"] else None
    kill = [_Kill(RunFolder(runs_dir / KILLED), order["kill_at"])] if "kill_at" in order else []
    train(
        config.corpus.source, config, name=order["name"], runs_dir=runs_dir, init=init, data_dir=data_dir,
        callbacks=kill,
    )  # fmt: skip


if __name__ == "__main__":
    _main()
