"""Training speed in tokens per second, with peers, at equal architecture and batch size.

Ours is the trainer's own step in fp32: batch, forward, backward, clipping, update. The Transformer is compared with
nanoGPT's train.py (its own figures of each iteration, from a separate process) and a Llama of Hugging Face
transformers; GRU and LSTM with the loop over `nn.GRU` and `nn.LSTM` that one writes by hand; words with PyTorch's
example (its own figures too), with the 33,278 words of WikiText-2. Contenders take turns.

The matmul peak is the fastest fp32 product here, over sizes and libraries; a recurrent step's share of it counts the
products that it computes, forward and backward, and nothing else (`benchmarks.peak`).
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import loops, nanogpt, ours
from benchmarks.machine import take_turns, versions
from benchmarks.nanogpt import NanoGPT
from benchmarks.peak import peaks, recurrent_flops, rows_of_inputs
from benchmarks.suite import (
    CORPUS,
    NANOGPT,
    TRANSFORMERS,
    WLM,
    WORD,
    WORDS,
    Claim,
    Record,
    Settings,
    Table,
    say,
    spread_rows,
    spreads_text,
)
from benchmarks.wlm import WordLanguageModel, write_texts
from lm.config import CorpusConfig, RunConfig, Section, TrainingConfig
from lm.corpora import Corpus, PreparedCorpus, open_corpus, prepare
from lm.device import deterministic
from lm.machine import wait
from lm.models.base import build_model
from lm.profiling.trial import Trial
from lm.torch_private import keep_freed_memory
from lm.training.train_step import TrainStep

TURN_SECONDS = 4.0
"""Of training in a turn of a contender."""
NANOGPT_ITERATIONS = 150
"""In a turn of nanoGPT."""
TRANSFORMER = {
    # As many weights as nanoGPT's block of 4 × 128: 2/3 of its inner width for three matrices in place of two.
    "type": "transformer", "context_length": 64, "hidden_size": 128, "num_layers": 4, "num_heads": 4, "mlp_size": 344,
    "qk_norm": False, "tie_weights": True,
}  # fmt: skip
HIDDEN, BATCH, BPTT = 512, 32, 128


@dataclass(frozen=True)
class Shape:
    """A recurrent model, and what is promised of it."""

    kind: Any
    layers: int
    target: float

    @property
    def name(self) -> str:
        """For a table's title."""
        return f"{self.kind.upper()} {HIDDEN}, {self.layers} layer{'s' if self.layers > 1 else ''}"


SHAPES = (Shape("gru", 1, 1.8), Shape("gru", 2, 1.4), Shape("lstm", 1, 1.2), Shape("lstm", 2, 1.1))
PEAK_SHARE = 0.7


def run(settings: Settings) -> Record:
    """Transformer, recurrent models, words."""
    torch.set_num_threads(settings.threads)
    record = Record(
        options={**settings.options(), "corpus": CORPUS, "words": WORDS, "turn_seconds": TURN_SECONDS},
        versions=versions("numpy", "torch", "transformers"),
    )
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as name:
        folder = Path(name)
        corpus = open_corpus(CorpusConfig(source=CORPUS), data_dir=settings.data_dir)
        prepared = prepare(corpus, Section(type="char"), cache=folder / "cache")
        _transformer(settings, folder, corpus, prepared, record)
        for shape in SHAPES:
            _recurrent(shape, settings, prepared, record)
        _words(settings, folder, record)
    return record


# -- the Transformer ---------------------------------------------------------------------------------


def _transformer(settings: Settings, folder: Path, corpus: Corpus, prepared: PreparedCorpus, record: Record) -> None:
    training = TrainingConfig(batch_size=12, bptt=nanogpt.BLOCK, learning_rate=1e-3, device="cpu", precision="fp32")
    contenders = {"ours": trainer_turns(Section(**TRANSFORMER), training, prepared)}
    if settings.nanogpt is None:
        record.missing.append(NANOGPT)
    else:
        peer = NanoGPT(settings.nanogpt, folder, corpus, prepared, settings)
        contenders["nanoGPT"] = lambda: peer.train("turn", NANOGPT_ITERATIONS, save=False).tokens_per_second
    if importlib.util.find_spec("transformers") is None:
        record.missing.append(TRANSFORMERS)
    else:
        llama = loops.llama(
            prepared.tokenizer.vocab_size, hidden=128, layers=4, heads=4, inner=344, context=nanogpt.BLOCK
        )
        step = loops.llama_steps(llama, prepared.splits["train"].ids, batch_size=12, context=nanogpt.BLOCK)
        contenders["transformers Llama, plain loop"] = loop_turns(step, nanogpt.TOKENS_PER_STEP)
    title = "Transformer, 4 layers of 128, block 64, batch 12"
    medians = _table(title, contenders, settings, record)
    record.claims.append(ratio(title, medians, "nanoGPT", 2.0, "" if settings.nanogpt else "nanoGPT is not here"))


# -- recurrent models --------------------------------------------------------------------------------


def _recurrent(shape: Shape, settings: Settings, prepared: PreparedCorpus, record: Record) -> None:
    section = Section(type=shape.kind, embedding_size=HIDDEN, hidden_size=HIDDEN, num_layers=shape.layers)
    training = TrainingConfig(batch_size=BATCH, bptt=BPTT, device="cpu", precision="fp32")
    vocab_size = prepared.tokenizer.vocab_size
    module = loops.PlainRecurrent(shape.kind, vocab_size, HIDDEN, HIDDEN, shape.layers)
    step = loops.recurrent_steps(module, prepared.splits["train"].ids, batch_size=BATCH, bptt=BPTT)
    peer = f"plain nn.{shape.kind.upper()}"
    found_peaks: list[dict[str, float]] = []

    def measure_peaks() -> float:
        found_peaks.append(peaks())
        return found_peaks[-1]["fp32"]

    contenders = {
        "ours": trainer_turns(section, training, prepared),
        peer: loop_turns(step, BATCH * BPTT),
        "matmul peak": measure_peaks,
    }
    figures = take_turns(contenders, settings.rounds)
    title = f"{shape.name}, batch {BATCH}, bptt {BPTT}"
    del figures["matmul peak"]
    # What the machine can do is its best, not its usual: another program may have had the cores.
    best = {name: max(each[name] for each in found_peaks) for name in found_peaks[0]}
    sizes: dict[str, Any] = {"layers": shape.layers, "hidden": HIDDEN, "batch": BATCH, "bptt": BPTT}
    sizes["vocab_size"] = vocab_size
    work = {
        "ours": recurrent_flops(shape.kind, input_rows=rows_of_inputs(vocab_size, BATCH, BPTT), **sizes),
        peer: recurrent_flops(shape.kind, **sizes),
    }
    part = {name: work[name] / (BATCH * BPTT) * each["median"] / best["fp32"] for name, each in figures.items()}
    rows = [
        {**row, "share of the matmul peak": share}
        for row, share in zip(spread_rows(figures), part.values(), strict=True)
    ]
    note = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in best.items())
    record.tables.append(Table(title, rows, f"matmul peak: {note}; the share is of fp32's; tokens/s"))
    say(f"  {title}: {spreads_text(figures)} tokens/s")
    share = {"what": "share of the matmul peak", "value": part["ours"], "target": PEAK_SHARE}
    medians = {name: each["median"] for name, each in figures.items()}
    record.claims.append(ratio(title, medians, peer, shape.target, other=share))


# -- words -------------------------------------------------------------------------------------------


def _words(settings: Settings, folder: Path, record: Record) -> None:
    corpus = open_corpus(CorpusConfig(source=WORDS), data_dir=settings.data_dir)
    options: RunConfig = ours.config(WORD, WORDS)
    prepared = prepare(corpus, options.tokenizer, cache=folder / "cache")
    training = options.training.model_copy(update={"device": "cpu", "precision": "fp32"})
    contenders = {"ours": trainer_turns(options.model, training, prepared)}
    if settings.wlm is None:
        record.missing.append(WLM)
    else:
        texts = write_texts(corpus, folder / "words")
        peer = WordLanguageModel(settings.wlm, folder, settings)
        contenders["PyTorch example"] = lambda: peer.tokens_per_second(texts, 2 * TURN_SECONDS)
    title = f"Words of {WORDS}, LSTM of 2 layers of 200, tied, batch 20, bptt 35"
    medians = _table(title, contenders, settings, record, f"{prepared.tokenizer.vocab_size:,} words; `{WORD}`")
    why = "" if settings.wlm else "the example is not here"
    record.claims.append(ratio(title, medians, "PyTorch example", 4.0, why))


# -- turns -------------------------------------------------------------------------------------------


def trainer_turns(
    model: Section, training: TrainingConfig, prepared: PreparedCorpus, seconds: float = TURN_SECONDS
) -> Callable[[], float]:
    """Tokens per second of `TrainStep`, compiled if `training.compile` is on; the model learns from turn to turn."""
    trial = Trial(TrainStep(build_model(model, prepared.tokenizer.vocab_size, seed=1), training), prepared)
    if training.compile == "on":
        trial.step.compile(trial.batches)

    def turn() -> float:
        with deterministic(trial.step.device), keep_freed_memory():
            begun, steps = time.perf_counter(), 0
            while time.perf_counter() - begun < seconds:
                trial.run_ahead()
                steps += 1
            trial.catch_up()
            wait(trial.step.device)
            return steps * trial.batches.tokens_per_step / (time.perf_counter() - begun)

    return turn


def loop_turns(step: loops.TrainStep, tokens_per_step: int, seconds: float = TURN_SECONDS) -> Callable[[], float]:
    """The same of a loop."""

    def turn() -> float:
        steps, spent = loops.for_seconds(step, seconds, rate=1e-3)
        return steps * tokens_per_step / spent

    return turn


def _table(
    title: str, contenders: dict[str, Callable[[], float]], settings: Settings, record: Record, note: str = ""
) -> dict[str, float]:
    """Let them take turns; the medians."""
    figures = take_turns(contenders, settings.rounds)
    say(f"  {title}: {spreads_text(figures)} tokens/s")
    record.tables.append(Table(title, spread_rows(figures), f"tokens/s{'; ' if note else ''}{note}"))
    return {name: each["median"] for name, each in figures.items()}


def ratio(
    what: str, medians: dict[str, float], peer: str, target: float, why: str = "", other: dict[str, Any] | None = None
) -> Claim:
    """Ours over the peer."""
    value = medians["ours"] / medians[peer] if peer in medians else None
    return Claim(f"{what}: ours over {peer}", value, target, "at least", "×", why, other)
