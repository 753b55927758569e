"""How long until the loss that nanoGPT's CPU recipe reaches, on tiny-shakespeare.

nanoGPT's recipe (4 layers, 128 wide, block 64, batch 12, 2,000 iterations) is trained by its own train.py, and its last
checkpoint scored on the whole validation split: that loss is L, and the time of its training T. Ours is `lm train` as a
whole process, five seeds; weights are kept on the way, and the first from which on the loss on the whole validation
split stays within L say the time. Evaluation is no part of the training time and, where a program evaluates on its own,
a part of the whole-process time. Without --full only the first iterations of nanoGPT are run: T is then extrapolated,
and L is the figure of the project's target.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import nanogpt, ours
from benchmarks.machine import versions
from benchmarks.nanogpt import RECIPE_ITERATIONS, RECIPE_LOSS, NanoGPT
from benchmarks.suite import CORPUS, NANOGPT, Claim, Plot, Record, Settings, Table
from lm.config import CorpusConfig, Section
from lm.corpora import open_corpus, prepare

SEEDS = (1, 2, 3, 4, 5)
SLICE = 300
"""Iterations of nanoGPT that are run without --full."""
KEEP_EVERY = 10
"""Steps between weights of ours that are kept."""
TRAINING_TARGET, WHOLE_TARGET = 20.0, 10.0


def run(settings: Settings) -> Record:
    """Measure nanoGPT, then ours."""
    record = Record(
        options={
            **settings.options(), "corpus": CORPUS, "ours": f"lm train {CORPUS} {settings.quick}", "seeds": SEEDS,
            "nanogpt_iterations": RECIPE_ITERATIONS if settings.full else SLICE,
        },
        versions=versions("numpy", "torch"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as name:
        folder = Path(name)
        peer = _nanogpt(settings, folder, record)
        _ours(settings, folder, record, peer)
    return record


def _nanogpt(settings: Settings, folder: Path, record: Record) -> dict[str, Any]:
    """Its loss, seconds of training and of the whole process; only the loss of the target where it is not here."""
    if settings.nanogpt is None:
        record.missing.append(NANOGPT)
        return {"loss": RECIPE_LOSS}
    corpus = open_corpus(CorpusConfig(source=CORPUS), data_dir=settings.data_dir)
    prepared = prepare(corpus, Section(type="char"), cache=folder / "cache")
    peer = NanoGPT(settings.nanogpt, folder, corpus, prepared, settings)
    if settings.full:
        trained = peer.train("whole", RECIPE_ITERATIONS, points=8)
        scores = [(point, peer.score(point.path)) for point in trained.points]
        last = scores[-1][1]
        curve = [(point.seconds, each.loss) for point, each in scores]
        found: dict[str, Any] = {
            "loss": last.loss, "seconds": trained.seconds, "whole": trained.whole_seconds, "curve": curve
        }  # fmt: skip
        how = f"whole recipe; {last.context}"
    else:
        trained = peer.train("slice", SLICE, planned=RECIPE_ITERATIONS, save=False)
        seconds = nanogpt.TOKENS_PER_STEP / trained.tokens_per_second * RECIPE_ITERATIONS
        found = {"loss": RECIPE_LOSS, "seconds": seconds, "whole": trained.whole_seconds - trained.seconds + seconds}
        how = f"extrapolated from a slice of {SLICE:,} of {RECIPE_ITERATIONS:,} iterations; loss as the target has it"
    row = {
        "contender": "nanoGPT, CPU recipe", "loss": found["loss"], "training, s": found["seconds"],
        "whole process, s": found["whole"], "tokens/s": trained.tokens_per_second,
    }  # fmt: skip
    record.tables.append(Table("The target recipe", [row], how))
    return found


def _ours(settings: Settings, folder: Path, record: Record, peer: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    reached: list[float | None] = []
    keep = {"evaluate_every": 1_000_000, "checkpoint_every": KEEP_EVERY, "log_every": KEEP_EVERY}
    extra = [word for key, value in keep.items() for word in ("--set", f"training.{key}={value}")]
    for seed in SEEDS:
        trained = ours.train(settings.quick, CORPUS, f"seed-{seed}", folder, settings, seed=seed, extra=extra)
        reached.append(reach(trained, peer["loss"]))
        rows.append(
            {"seed": seed, "to the loss, s": reached[-1], "training, s": trained.seconds,
             "whole process, s": trained.whole_seconds, "final loss": trained.loss}
        )  # fmt: skip
        lines[f"ours, seed {seed}"] = sorted(trained.curve(4))
    rule = f"`lm train {CORPUS} {settings.quick}`; {trained.context}"
    record.tables.append(Table(f"Ours, to {peer['loss']:.4f} nats", rows, rule))
    if "curve" in peer:
        lines = {"nanoGPT": peer["curve"], **lines}
    record.plots.append(
        Plot("time-to-loss", "tiny-shakespeare: loss over the time of training", "seconds of training",
             "nats per character, whole validation split", lines, ("to be reached", peer["loss"]))
    )  # fmt: skip
    record.claims += claims(reached, [row["whole process, s"] for row in rows], peer, full=settings.full)


def reach(trained: ours.Trained, loss: float) -> float | None:
    """Seconds of training to the weights from which on the loss on the whole split stays within `loss`; None: never."""
    reached = trained.seconds if trained.loss <= loss else None
    # From the end, since that is near: scoring takes longer than training.
    for step, seconds in reversed(trained.kept()):
        # Side by side first: reading the split as one takes longer still, and only has to confirm.
        if trained.loss_at(step, rows=ours.CURVE_ROWS) > loss + 0.002 or trained.loss_at(step) > loss:
            break
        reached = seconds
    return reached


def claims(reached: list[float | None], whole: list[float], peer: dict[str, Any], *, full: bool) -> list[Claim]:
    """The target's two ratios, each of the slowest seed; a seed that never gets there misses both."""
    times = [each for each in reached if each is not None]
    training = process = None
    why = "nanoGPT is not here"
    if "seconds" in peer and len(times) < len(reached):
        training = process = 0.0
        why = f"{len(reached) - len(times)} of {len(reached)} seeds did not reach {peer['loss']:.4f}"
    elif "seconds" in peer:
        training, process = peer["seconds"] / max(times), peer["whole"] / max(whole)
        why = "" if full else "nanoGPT's time is extrapolated from a slice"
    what = f"time to nanoGPT's loss, slowest of {len(reached)} seeds"
    return [
        Claim(f"{what}: training", training, TRAINING_TARGET, "at least", "×", why),
        Claim(f"{what}: whole process", process, WHOLE_TARGET, "at least", "×", why),
    ]
