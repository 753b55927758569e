"""Loss and speed of training in fp32 and in bf16, after equal steps.

    python -m benchmarks.bf16 FOLDER                                  # three presets, three seeds, two formats
    python -m benchmarks.bf16 FOLDER --presets gru-char-large --steps 1000 --seeds 1,2

Each training is a separate process, and both formats of a preset and a seed run one after the other. A finished one
is a line of FOLDER/results.jsonl and is not run again, so that an interrupted measurement continues. The
losses are exact and in fp32, in nats per token of the whole validation split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.suite import CORPUS, WORDS, Settings, say
from lm.host import cpu

PRESETS = "gru-char", "lstm-char", "transformer-char"
FORMATS = "fp32", "bf16"
STEPS = 400
MAX_DIFFERENCE = 0.002
"""Nats between the mean losses of the formats."""


def main() -> None:
    """Measure what is missing, then print the table."""
    assert __doc__ is not None
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bf16", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for runs, cache and results.jsonl")
    parser.add_argument("--presets", default=",".join(PRESETS), help="with commas (default: %(default)s)")
    parser.add_argument("--seeds", default="1,2,3", help="with commas (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each training (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="PATH", help="where the corpora lie (default: INKLING_DATA)")
    given = parser.parse_args()
    presets, seeds = given.presets.split(","), [int(seed) for seed in given.seeds.split(",")]
    settings = Settings(threads=given.threads, data_dir=given.data_dir)
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / "results.jsonl"
    for preset, seed, precision in product(presets, seeds, FORMATS):
        key = {"preset": preset, "seed": seed, "format": precision, "steps": given.steps, "threads": given.threads}
        if any(key.items() <= row.items() for row in read(file)):
            continue
        say(f"{preset}, seed {seed}, {precision}: {given.steps} steps")
        row = {**key, **train(preset, seed, precision, given.steps, given.folder, settings), "cpu": cpu()["model"]}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    wanted = {"steps": given.steps, "threads": given.threads}
    rows = [row for row in read(file) if wanted.items() <= row.items() and row["preset"] in presets]
    print("\n".join(table([row for row in rows if row["seed"] in seeds])))


def read(file: Path) -> list[dict[str, Any]]:
    """The finished trainings."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def train(preset: str, seed: int, precision: str, steps: int, folder: Path, settings: Settings) -> dict[str, Any]:
    """Loss and tokens per second of one `lm train`; ends the program if it fails."""
    name = f"{preset}-{seed}-{precision}-{steps}"
    command = [sys.executable, "-m", "cli.main", "train", WORDS if preset.endswith("-word") else CORPUS]
    command += ["--preset", preset, "--seed", str(seed), "--precision", precision, "--max-steps", str(steps)]
    command += ["--name", name, "--runs-dir", str(folder / "runs"), "--device", "cpu", "--overwrite", "--json"]
    if settings.data_dir is not None:
        command += ["--data-dir", str(settings.data_dir)]
    environment = settings.environment(INKLING_CACHE=str(folder / "cache"))
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
    metrics = (folder / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()
    speeds = [row["tokens_per_second"] for row in map(json.loads, metrics) if row.get("tokens_per_second")]
    return {"loss": json.loads(ran.stdout)["report"]["loss"], "tokens_per_second": statistics.median(speeds)}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines with each training, and for each preset the means of its seeds."""
    heads = f"{'fp32 loss':>9} {'bf16 loss':>9} {'change':>8}  {'fp32 tok/s':>10} {'bf16':>7} {'ratio':>5}"
    yield f"{'preset':<18} {'seed':>4}  {heads}"
    for preset in dict.fromkeys(row["preset"] for row in rows):
        own = {(row["seed"], row["format"]): row for row in rows if row["preset"] == preset}
        pairs = [
            (seed, own[seed, FORMATS[0]], own[seed, FORMATS[1]])
            for seed in dict.fromkeys(seed for seed, _ in own)
            if all((seed, precision) in own for precision in FORMATS)
        ]
        for seed, *pair in pairs:
            yield _line(
                preset, str(seed), *(each["loss"] for each in pair), *(each["tokens_per_second"] for each in pair)
            )
        if pairs:
            means = [
                statistics.mean(pair[place][name] for pair in pairs)
                for name in ("loss", "tokens_per_second")
                for place in (1, 2)
            ]
            verdict = "within" if abs(means[1] - means[0]) <= MAX_DIFFERENCE else "not within"
            yield _line(preset, "mean", *means) + f"  {verdict} {MAX_DIFFERENCE} nats"


def _line(preset: str, seed: str, loss: float, low_loss: float, speed: float, low_speed: float) -> str:
    losses = f"{loss:9.4f} {low_loss:9.4f} {low_loss - loss:+8.4f}"
    return f"{preset:<18} {seed:>4}  {losses}  {speed:10,.0f} {low_speed:7,.0f} {low_speed / speed:5.2f}"


if __name__ == "__main__":
    main()
