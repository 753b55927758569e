"""The loss after equal time, on tiny-shakespeare by characters.

Every contender gets the same seconds, and its learning rate falls over just those. nanoGPT gets as many iterations as
fit, its own evaluations not counted; the loops one writes by hand get the seconds of training; ours gets them as
`--minutes`, its validations included. With --full the seconds are what nanoGPT's recipe takes for its 2,000 iterations,
three seeds each. Every loss is of the whole validation split by the project's evaluator: Transformers by windows that
slide by half their length, the others with the state carried.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import loops, nanogpt, ours
from benchmarks.adapters import plain_recurrent, windowed
from benchmarks.machine import spread, versions
from benchmarks.nanogpt import RECIPE_ITERATIONS, NanoGPT
from benchmarks.suite import (
    CORPUS,
    NANOGPT,
    TRANSFORMERS,
    Claim,
    Plot,
    Record,
    Settings,
    Table,
    say,
)
from lm.config import CorpusConfig, Section
from lm.corpora import Corpus, PreparedCorpus, open_corpus, prepare
from lm.evaluation.perplexity import score
from lm.models.base import build_model

SECONDS = 60.0
"""Of each contender without --full, and with it where nanoGPT is not here to say."""
SEEDS = 3
"""With --full; one without."""
POINTS = 5
"""Of each curve."""
TEN_SECONDS = "--minutes 0.1666"
EQUAL_TIME, TEN_MINUTES, HYBRID_LOSS, FLOOR_SECONDS = 1.53, 1.47, 1.55, 1.0


@dataclass
class Found:
    """What one contender reached."""

    loss: float
    seconds: float
    context: str
    curve: list[tuple[float, float]] = field(default_factory=list)


Contender = Callable[[int], Found]
"""Trains with this seed."""


def run(settings: Settings) -> Record:
    """Every contender for as long, then what else is said of ours."""
    torch.set_num_threads(settings.threads)
    record = Record(
        options={**settings.options(), "corpus": CORPUS, "seeds": SEEDS if settings.full else 1},
        versions=versions("numpy", "torch", "transformers"),
    )
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as name:
        folder = Path(name)
        corpus = open_corpus(CorpusConfig(source=CORPUS), data_dir=settings.data_dir)
        prepared = prepare(corpus, Section(type="char"), cache=folder / "cache")
        _characters(settings, folder, corpus, prepared, record)
    return record


def _characters(settings: Settings, folder: Path, corpus: Corpus, prepared: PreparedCorpus, record: Record) -> None:
    seconds, contenders = SECONDS, {}
    if settings.nanogpt is None:
        record.missing.append(NANOGPT)
    else:
        peer = NanoGPT(settings.nanogpt, folder, corpus, prepared, settings)
        slice_ = peer.train("pace", 100, planned=RECIPE_ITERATIONS, save=False)
        pace = nanogpt.TOKENS_PER_STEP / slice_.tokens_per_second
        seconds = pace * RECIPE_ITERATIONS if settings.full else SECONDS
        contenders["nanoGPT"] = _nanogpt(peer, round(seconds / pace))
    record.options["seconds"] = seconds
    labels = {"ours": settings.best, "ours, hybrid": settings.hybrid}
    mine: dict[str, Contender] = {
        name: _ours(f"{arguments} --minutes {seconds / 60:.4f}", name, settings, folder)
        for name, arguments in labels.items()
        if _here(arguments, record)
    }
    contenders = {**mine, **contenders, "plain nn.GRU loop": _gru(prepared, seconds)}
    if importlib.util.find_spec("transformers") is None:
        record.missing.append(TRANSFORMERS)
    else:
        contenders["transformers Llama, plain loop"] = _llama(prepared, seconds)
    found: dict[str, list[Found]] = {name: [] for name in contenders}
    for seed in range(1, (SEEDS if settings.full else 1) + 1):
        for name, contender in contenders.items():
            say(f"  {name}, {seconds:.0f} s, seed {seed}")
            found[name].append(contender(seed))
    rows = [
        {"contender": name, **{f"{key} loss": value for key, value in spread([each.loss for each in runs]).items()},
         "training, s": max(each.seconds for each in runs), "context": runs[0].context}
        for name, runs in found.items()
    ]  # fmt: skip
    title = f"{CORPUS}, characters: loss after {seconds:.0f} seconds"
    record.tables.append(Table(title, rows, "nats per character, whole validation split"))
    lines = {name: runs[0].curve for name, runs in found.items()}
    level = None
    if (floor := _floor(settings, folder, record)) is not None:
        level = "n-gram, by counting", floor
    record.plots.append(
        Plot("quality", "tiny-shakespeare: loss against time", "seconds of training",
             "nats per character, whole validation split", lines, level)
    )  # fmt: skip
    why = "" if settings.full and settings.nanogpt else f"over {seconds:.0f} s; nanoGPT's time is taken with --full"
    worst = max(each.loss for each in found["ours"]) if "ours" in found else None
    record.claims.append(Claim("loss at equal time with nanoGPT's recipe", worst, EQUAL_TIME, "at most", "nats", why))
    _more_of_ours(settings, folder, record)


def _more_of_ours(settings: Settings, folder: Path, record: Record) -> None:
    """What the targets say of ours alone: ten minutes of the defaults, ten seconds of the hybrid."""
    what = f"lm train {CORPUS} --minutes 10: loss"
    if settings.full and ours.lacks(settings.best) is None:
        ten = ours.train(f"{settings.best} --minutes 10", CORPUS, "ten-minutes", folder, settings)
        record.claims.append(Claim(what, ten.loss, TEN_MINUTES, "at most", "nats"))
    else:
        record.claims.append(Claim(what, None, TEN_MINUTES, "at most", "nats", "with --full only"))
    what = "hybrid after 10 seconds: loss"
    if (lacking := ours.lacks(settings.hybrid)) is None:
        quick = ours.train(f"{settings.hybrid} {TEN_SECONDS}", CORPUS, "hybrid-10", folder, settings)
        record.claims.append(Claim(what, quick.loss, HYBRID_LOSS, "at most", "nats"))
    else:
        record.claims.append(Claim(what, None, HYBRID_LOSS, "at most", "nats", f"there is no preset {lacking}"))


def _floor(settings: Settings, folder: Path, record: Record) -> float | None:
    """The n-gram model's loss: the floor that a network must beat."""
    if (lacking := ours.lacks(settings.floor)) is not None:
        record.notes.append(f"No floor is shown: there is no preset {lacking}.")
        return None
    trained = ours.train(settings.floor, CORPUS, "floor", folder, settings)
    row = {"loss": trained.loss, "whole process, s": trained.whole_seconds, "context": trained.context}
    record.tables.append(Table("The floor: counts alone", [row], f"`lm train {CORPUS} {settings.floor}`"))
    model = build_model(ours.config(settings.floor, CORPUS).model, trained.run.tokenizer.vocab_size)
    ids = np.asarray(trained.ids("train"))
    begun = time.perf_counter()
    model.fit(ids)
    seconds = time.perf_counter() - begun
    record.claims.append(Claim(f"n-gram: fitting {len(ids) - 1:,} tokens", seconds, FLOOR_SECONDS, "at most", "s"))
    return trained.loss


def _here(arguments: str, record: Record) -> bool:
    if (lacking := ours.lacks(arguments)) is not None:
        record.notes.append(f"There is no preset {lacking}: left out.")
    return lacking is None


def _ours(arguments: str, name: str, settings: Settings, folder: Path) -> Contender:
    def contend(seed: int) -> Found:
        keep = ("--set", "training.checkpoint_every=50", "--set", "training.log_every=50") if seed == 1 else ()
        label = f"{name.replace(', ', '-')}-{seed}"
        trained = ours.train(arguments, CORPUS, label, folder, settings, seed=seed, extra=keep)
        curve = trained.curve(POINTS) if seed == 1 else []
        return Found(trained.loss, trained.seconds, trained.context, sorted(curve))

    return contend


def _nanogpt(peer: NanoGPT, iterations: int) -> Contender:
    def contend(seed: int) -> Found:
        # Its train.py has one seed.
        trained = peer.train(f"equal-{seed}", iterations, points=POINTS if seed == 1 else 1)
        scores = [(point.seconds, peer.score(point.path)) for point in trained.points]
        return Found(
            scores[-1][1].loss, trained.seconds, scores[-1][1].context, [(at, each.loss) for at, each in scores]
        )

    return contend


def _gru(prepared: PreparedCorpus, seconds: float) -> Contender:
    """`nn.GRU` of 256 with an embedding of 128, batch 64, bptt 64, learning rate 6e-3: the numbers of our preset."""

    def contend(seed: int) -> Found:
        torch.manual_seed(seed)
        train, valid = prepared.splits["train"].ids, prepared.splits["valid"].ids
        module = loops.PlainRecurrent("gru", prepared.tokenizer.vocab_size, 128, 256, 1)
        step = loops.recurrent_steps(module, train, batch_size=64, bptt=64)
        model = plain_recurrent(module, prepared.tokenizer.vocab_size)
        return _timed(step, lambda rows: score(model, valid, rows=rows), seconds, rate=6e-3)

    return contend


def _llama(prepared: PreparedCorpus, seconds: float) -> Contender:
    """nanoGPT's shape, batch, block and learning rate."""

    def contend(seed: int) -> Found:
        torch.manual_seed(seed)
        size = prepared.tokenizer.vocab_size
        train, valid = prepared.splits["train"].ids, prepared.splits["valid"].ids
        module = loops.llama(size, hidden=128, layers=4, heads=4, inner=344, context=nanogpt.BLOCK)
        step = loops.llama_steps(module, train, batch_size=12, context=nanogpt.BLOCK, seed=seed)
        model = windowed(module, lambda ids: module(input_ids=ids).logits, nanogpt.BLOCK, torch.arange(size))
        return _timed(step, lambda rows: score(model, valid), seconds, rate=1e-3)

    return contend


def _timed(step: loops.TrainStep, scored: Callable[[int], Any], seconds: float, *, rate: float) -> Found:
    """Train by a loop for so many seconds, with a validation now and then that does not count."""
    curve: list[tuple[float, float]] = []
    spent = 0.0
    for part in range(1, POINTS + 1):
        begun = time.perf_counter()
        loops.for_seconds(step, seconds * part / POINTS - spent, rate=rate, begin=spent, whole=seconds)
        spent += time.perf_counter() - begun
        last = part == POINTS
        found = scored(1 if last else ours.CURVE_ROWS)
        curve.append((spent, found.loss))
    return Found(found.loss, spent, found.context, curve)
