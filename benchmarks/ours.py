"""`lm train` as a whole process, and figures from its run folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.nanogpt import PeerError
from benchmarks.suite import Settings, say, split
from lm.config import RunConfig, compose, parse_assignments, preset_names
from lm.corpora import load_prepared
from lm.evaluation.perplexity import score
from lm.runs.run import Run, load
from lm.tokenizers.base import Ids

CURVE_ROWS = 16
"""Points of a curve read the validation split in so many parts side by side, which is quicker and within 0.001 nats;
final figures, and the one that says that a target is reached, read it as one."""


@dataclass(frozen=True)
class Trained:
    """One `lm train`."""

    run: Run
    runs_dir: Path
    cache: Path
    whole_seconds: float
    """From starting the program to its end, which includes the exact report and a sample."""
    loss: float
    """Of the saved best weights on the whole validation split."""
    context: str
    """The context rule of that loss."""
    steps: int
    seconds_at: dict[int, float]
    """Step → seconds of training, validations before it included, its own left out."""

    @property
    def seconds(self) -> float:
        """Of training: to the last step."""
        return self.seconds_at[max(self.seconds_at)]

    def kept(self) -> list[tuple[int, float]]:
        """Steps whose weights were kept, and their seconds, in order."""
        steps = sorted(int(path.name.removeprefix("step-")) for path in (self.run.folder.path / "steps").glob("step-*"))
        return [(step, self.seconds_at[step]) for step in steps if step in self.seconds_at]

    def loss_at(self, step: int, *, rows: int = 1) -> float:
        """Of the weights kept at a step, on the whole validation split."""
        run = load(f"{self.run.name}@step-{step}", runs_dir=self.runs_dir)
        return score(run.model, self.ids("valid"), rows=rows).loss

    def ids(self, split_name: str) -> Ids:
        """(N + 1,) the start token and the tokens of a split."""
        prepared = load_prepared(self.run.record["corpus"]["key"], cache=self.cache)
        assert prepared is not None, "the training left its tokens there"
        return prepared.splits[split_name].ids

    def curve(self, most: int = 8) -> list[tuple[float, float]]:
        """Seconds of training and loss, of at most so many of the kept weights; the last point is the final loss."""
        kept = self.kept()[:-1] or self.kept()
        chosen = kept[:: -(-len(kept) // most)] if kept else []
        points = [(seconds, self.loss_at(step, rows=CURVE_ROWS)) for step, seconds in chosen]
        return [*points, (self.seconds, self.loss)]


def train(
    arguments: str,
    corpus: str,
    name: str,
    folder: Path,
    settings: Settings,
    *,
    seed: int = 1,
    extra: Sequence[str] = (),
) -> Trained:
    """Run `lm train CORPUS ARGUMENTS` in a separate process, with an empty cache.

    Raises:
        PeerError: it failed.
    """
    command = [sys.executable, "-m", "cli.main", "train", corpus, *split(arguments), "--seed", str(seed)]
    command += ["--name", name, "--runs-dir", str(folder / "runs"), "--device", "cpu", "--json", *extra]
    if settings.data_dir is not None:
        command += ["--data-dir", str(settings.data_dir)]
    say(f"  lm train {corpus} {arguments} (seed {seed})")
    cache = folder / f"cache-{name}"
    begun = time.perf_counter()
    ran = subprocess.run(
        command, env=settings.environment(INKLING_CACHE=str(cache)), capture_output=True, text=True, check=False
    )
    whole = time.perf_counter() - begun
    if ran.returncode:
        raise PeerError(f"lm train {arguments} failed:\n{ran.stderr[-2000:]}")
    report = json.loads(ran.stdout)["report"]
    run = load(name, runs_dir=folder / "runs")
    lines = (run.folder.path / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return Trained(
        run, folder / "runs", cache, whole, report["loss"], report["context"], rows[-1]["step"], seconds_at(rows)
    )


def seconds_at(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Step → seconds of training from the lines of metrics.jsonl.

    A line's seconds include its own validation, if it has one: there the time since the line before is taken from
    the speed of the steps between them.
    """
    found: dict[int, float] = {}
    before = {"step": 0, "seconds": 0.0}
    pace: list[float] = []
    for row in rows:
        steps = row["step"] - before["step"]
        if row.get("valid_loss") is None or not pace:
            seconds = row.get("seconds", 0.0)
            pace.append((seconds - before["seconds"]) / max(1, steps))
        else:
            seconds = min(row["seconds"], before["seconds"] + steps * sorted(pace)[len(pace) // 2])
        found[row["step"]] = seconds
        before = {"step": row["step"], "seconds": row.get("seconds", 0.0)}
    return found


def config(arguments: str, source: str) -> RunConfig:
    """The options that `lm train SOURCE ARGUMENTS` has; of the arguments, --preset and --set."""
    words = split(arguments)
    given: dict[str, list[str]] = {"--preset": [], "--set": []}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        given[flag].append(value)
    preset = given["--preset"][0] if given["--preset"] else "gru-char"
    return compose(source, preset=preset, overrides=parse_assignments(given["--set"]))


def lacks(arguments: str) -> str | None:
    """The preset that the arguments name and this version does not have."""
    words = split(arguments)
    preset = words[words.index("--preset") + 1] if "--preset" in words else None
    return preset if preset is not None and preset not in preset_names() else None
