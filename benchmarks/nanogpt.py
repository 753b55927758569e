"""The nanoGPT recipe, run from a copy of a clone: its own train.py, its own preparation, our text.

    peer = NanoGPT(clone, folder, corpus, settings)      # copies the clone, prepares the data without a network
    trained = peer.train("whole", RECIPE_ITERATIONS)     # a separate process
    peer.score(trained.points[-1].path)                  # by the project's evaluator

The clone is left as it was. Checkpoints that the copy wrote are read with `weights_only`, so that nothing in them runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.adapters import Adapted, ids_of, windowed
from benchmarks.suite import Settings, say
from lm.corpora import Corpus, PreparedCorpus
from lm.errors import LMError
from lm.evaluation.perplexity import Scores, score

RECIPE = (
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
)  # fmt: skip
"""The README's recipe for a CPU, but for its length: `max_iters` and `lr_decay_iters`, which are one number."""
RECIPE_ITERATIONS = 2000
RECIPE_LOSS = 1.90
"""What the recipe reaches on the whole validation split, as the project's target has it."""
TOKENS_PER_STEP = 12 * 64
BLOCK = 64
CONFIG = "config/train_shakespeare_char.py"
DATA = "data/shakespeare_char"
SETTLED = 10
"""Iterations that do not count for the speed: the first ones pay for caches and threads."""
_ITERATION = re.compile(r"iter (\d+): loss \S+ time ([\d.]+)ms")


class PeerError(LMError):
    """A peer's clone or its program did not do what it should."""


@dataclass(frozen=True)
class Point:
    """A checkpoint on the way."""

    step: int
    seconds: float
    """Of training, without the peer's own evaluations."""
    path: Path


@dataclass(frozen=True)
class Trained:
    """One run of train.py."""

    step_seconds: list[float]
    """Of each iteration; one with an evaluation is given the median."""
    points: list[Point]
    whole_seconds: float
    """From starting the program to its end, or to its stop."""

    @property
    def seconds(self) -> float:
        """Of training, without the peer's own evaluations."""
        return sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Once it is warm."""
        return TOKENS_PER_STEP / statistics.median(self.step_seconds[SETTLED:])


def iteration_seconds(lines: Sequence[str], every: int) -> list[float]:
    """Seconds of each iteration in what train.py printed.

    Args:
        lines: its output.
        every: its `eval_interval`; these iterations' times hold an evaluation, and are replaced by the median.
    """
    times = {int(found[1]): float(found[2]) / 1000 for line in lines if (found := _ITERATION.match(_plain(line)))}
    usual = statistics.median([seconds for step, seconds in times.items() if step % every] or [0.0])
    return [usual if step % every == 0 else seconds for step, seconds in sorted(times.items())]


def _plain(line: str) -> str:
    return line.replace(",", "")


class NanoGPT:
    """A copy of a clone with our text prepared in it."""

    def __init__(self, clone: Path, folder: Path, corpus: Corpus, prepared: PreparedCorpus, settings: Settings) -> None:
        """Copy and prepare.

        Args:
            clone: of the repository, as a user has it.
            folder: empty; the copy goes there.
            corpus: its text, train and valid, is cut where nanoGPT cuts it: at nine tenths.
            prepared: the same text as our tokens.
            settings: for threads.

        Raises:
            PeerError: the path is no clone, or its split is another than ours.
        """
        for name in ("train.py", "model.py", CONFIG, f"{DATA}/prepare.py"):
            if not (clone / name).is_file():
                raise PeerError(f"--nanogpt {clone}: there is no {name}; give the path of a clone of nanoGPT.")
        self.folder = folder / "nanogpt"
        self._environment = settings.environment()
        self._valid = prepared.splits["valid"].ids
        shutil.copytree(clone, self.folder, ignore=shutil.ignore_patterns(".git", "out*", "*.bin", "*.pkl", "*.pt"))
        text = "".join(chunk for name in ("train", "valid") for chunk in corpus.splits[name].chunks())
        data = self.folder / DATA
        # With the text in place its preparation asks no network.
        (data / "input.txt").write_bytes(text.encode("utf-8"))
        self._run([str(data / "prepare.py")])
        self._table = ids_of(prepared.tokenizer, sorted(set(text)))
        theirs = np.fromfile(data / "val.bin", dtype=np.uint16).astype(np.int64)
        if not np.array_equal(theirs, self._table.numpy()[np.asarray(self._valid[1:], dtype=np.int64)]):
            raise PeerError("nanoGPT's validation split is not ours: the corpus has to be cut at nine tenths.")

    def train(
        self,
        name: str,
        iterations: int,
        *,
        points: int = 0,
        planned: int | None = None,
        save: bool = True,
        recipe: Sequence[str] = RECIPE,
    ) -> Trained:
        """Run train.py for so many iterations.

        Args:
            name: of the folder for checkpoints.
            iterations: to run; the learning rate falls over as many unless `planned` says otherwise.
            points: keep so many checkpoints at equal distances; 0: the last one alone.
            planned: iterations that the schedule is made for, where only their beginning is run.
            save: whether there is a checkpoint at the end.
            recipe: options of train.py.
        """
        every = max(1, iterations // max(points, 1)) if save else 10**9
        # So that the last iteration has a checkpoint.
        iterations -= iterations % every if save else 0
        out = self.folder / f"out-{name}"
        command = [
            "train.py", CONFIG, *recipe, f"--max_iters={iterations}", f"--lr_decay_iters={planned or iterations}",
            f"--eval_interval={every}", "--always_save_checkpoint=True", f"--out_dir={out}",
        ]  # fmt: skip
        say(f"  nanoGPT: {iterations:,} iterations")
        lines: list[str] = []
        kept: dict[int, Path] = {}
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *command], cwd=self.folder, env=self._environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                found = _ITERATION.match(_plain(line))
                # The checkpoint of an evaluation is whole once its iteration is reported.
                if found and int(found[1]) and int(found[1]) % every == 0:
                    step = int(found[1])
                    kept[step] = Path(shutil.copy(out / "ckpt.pt", out / f"ckpt-{step}.pt"))
        if process.returncode:
            raise PeerError("nanoGPT's train.py failed:\n" + "".join(lines[-15:]))
        whole = time.perf_counter() - begun
        seconds = iteration_seconds(lines, every)
        if len(seconds) <= SETTLED:
            raise PeerError("nanoGPT's train.py did not report its iterations:\n" + "".join(lines[-15:]))
        places = [Point(step, sum(seconds[:step]), path) for step, path in kept.items()]
        return Trained(seconds[:iterations], places, whole)

    def score(self, checkpoint: Path) -> Scores:
        """Every token of the validation split, by the project's evaluator, windows of 64 sliding by 32."""
        return score(self.load(checkpoint), self._valid)

    def load(self, checkpoint: Path) -> Adapted:
        """The model of a checkpoint, behind our contract."""
        spec = importlib.util.spec_from_file_location("nanogpt_model", self.folder / "model.py")
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        with contextlib.redirect_stdout(io.StringIO()):
            model = module.GPT(module.GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        # Without targets it would give the last position alone.
        return windowed(model, lambda ids: model(ids, ids)[0], int(saved["model_args"]["block_size"]), self._table)

    def sample(self, name: str, characters: int) -> None:
        """Run its sample.py on the checkpoint of `name`."""
        out = self.folder / f"out-{name}"
        self._run(
            ["sample.py", f"--out_dir={out}", "--device=cpu", "--compile=False", "--num_samples=1",
             f"--max_new_tokens={characters}"]
        )  # fmt: skip

    def _run(self, command: list[str]) -> None:
        ran = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=self._environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if ran.returncode:
            raise PeerError(f"nanoGPT's {command[0]} failed:\n{(ran.stdout + ran.stderr)[-2000:]}")
