"""Training in bf16 and in fp32, by model and preset: tokens per second, ratios, and losses.

    python -m benchmarks formats --nanogpt PATH --wlm PATH --losses FOLDER

Ours is the trainer's own step, as in the suite `training`. First the shapes that have a peer, which computes in fp32,
then presets. Both formats and the peer take turns. Losses after equal steps take longer: `python -m benchmarks.bf16
FOLDER` measures them, and --losses puts them into this record.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import bf16, loops, nanogpt, ours
from benchmarks.machine import Spread, take_turns, versions
from benchmarks.nanogpt import NanoGPT
from benchmarks.suite import CORPUS, NANOGPT, WLM, WORD, WORDS, Claim, Record, Settings, Table, say, spreads_text
from benchmarks.training import BATCH, BPTT, HIDDEN, TRANSFORMER, loop_turns, trainer_turns
from benchmarks.wlm import WordLanguageModel, write_texts
from lm.config import CorpusConfig, Section, TrainingConfig, compose
from lm.corpora import Corpus, PreparedCorpus, open_corpus, prepare
from lm.kernels.dispatch import bf16_instruction_set

FORMATS = bf16.FORMATS
TURN_SECONDS = 2.0
PRESETS = "gru-char", "gru-char-large", "lstm-char", "transformer-char", "gru-word", "lstm-word"
PEER_ITERATIONS = 150
"""In a turn of nanoGPT."""
AMX = "amx_bf16"


@dataclass(frozen=True)
class Model:
    """A model that is trained in both formats."""

    name: str
    model: Section
    training: TrainingConfig
    source: str = CORPUS
    tokenizer: Section = Section(type="char")
    peer: str | None = None
    over_peer: float | None = None
    """Target: ours in fp32 over the peer."""
    over_fp32: Mapping[str, float] | None = None
    """Targets: bf16 over fp32, for AMX and for other instruction sets."""


def models() -> Iterator[Model]:
    """Shapes with a peer or a target, then presets."""
    size = {"embedding_size": HIDDEN, "hidden_size": HIDDEN}
    rows = TrainingConfig(batch_size=BATCH, bptt=BPTT)
    yield Model(f"GRU {HIDDEN}", Section(type="gru", **size), rows, peer="plain nn.GRU", over_peer=5.0,
                over_fp32={AMX: 2.0, "other": 1.3})  # fmt: skip
    yield Model(f"LSTM {HIDDEN}", Section(type="lstm", **size), rows, peer="plain nn.LSTM", over_peer=2.0)
    windows = TrainingConfig(batch_size=12, bptt=nanogpt.BLOCK, learning_rate=1e-3)
    yield Model("Transformer 4 × 128", Section(**TRANSFORMER), windows, peer="nanoGPT", over_peer=2.0,
                over_fp32={AMX: 1.5, "other": 1.5})  # fmt: skip
    large = Section(type="transformer", context_length=256, hidden_size=384, num_layers=6, num_heads=6)
    yield Model("Transformer 6 × 384", large, TrainingConfig(batch_size=8, bptt=256), over_fp32={AMX: 3.0})
    words = ours.config(WORD, WORDS)
    yield Model("words, LSTM 2 × 200", words.model, words.training, WORDS, words.tokenizer, "PyTorch example", 4.0)
    for preset in PRESETS:
        source = WORDS if preset.endswith("-word") else CORPUS
        config = compose(source, preset=preset)
        targets = {AMX: 2.0, "other": 2.0} if preset.endswith("-word") else None
        yield Model(preset, config.model, config.training, source, config.tokenizer, over_fp32=targets)


def run(settings: Settings) -> Record:
    """All models in turn."""
    torch.set_num_threads(settings.threads)
    isa = bf16_instruction_set()
    note = f"Products in bf16 run on {isa}." if isa else "No kernels in bf16 here: bf16 is torch's autocast."
    record = Record(
        options={**settings.options(), "turn_seconds": TURN_SECONDS, "bf16": isa},
        versions=versions("numpy", "torch"),
        notes=[note],
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as name:
        folder = Path(name)
        corpora = {
            source: open_corpus(CorpusConfig(source=source), data_dir=settings.data_dir) for source in (CORPUS, WORDS)
        }
        for model in models():
            prepared = prepare(corpora[model.source], model.tokenizer, cache=folder / "cache")
            contenders = dict(_ours(model, prepared))
            if model.peer and (turn := _peer(model, settings, folder, corpora[model.source], prepared, record)):
                contenders[model.peer] = turn
            found = take_turns(contenders, settings.rounds)
            say(f"  {model.name}: {spreads_text(found)} tokens/s")
            rows.append(row(model, found))
            record.claims += claims(model, found, isa)
    record.tables.append(Table("Training by format", rows, "tokens/s, medians; the peer computes in fp32"))
    if settings.losses is not None:
        add_losses(record, bf16.read(settings.losses / "results.jsonl"))
    return record


def row(model: Model, found: Mapping[str, Spread]) -> dict[str, Any]:
    """A model's line: speeds and their ratios."""
    speed = {name: each["median"] for name, each in found.items()}
    peer = speed.get(model.peer or "")
    return {
        "model": model.name,
        **{name: speed[name] for name in FORMATS},
        "bf16 over fp32": speed["bf16"] / speed["fp32"],
        "peer": model.peer,
        "tokens/s of the peer": peer,
        **{f"{name} over the peer": peer and speed[name] / peer for name in FORMATS},
    }


def claims(model: Model, found: Mapping[str, Spread], isa: str | None) -> Iterator[Claim]:
    """The targets of a model on this CPU."""
    speed = {name: each["median"] for name, each in found.items()}
    if model.over_peer is not None:
        value = speed["fp32"] / speed[model.peer] if model.peer in speed else None
        why = "" if value else f"{model.peer} is not here"
        yield Claim(f"{model.name}: fp32 over {model.peer}", value, model.over_peer, "at least", "×", why)
    target = (model.over_fp32 or {}).get(AMX if isa == AMX else "other")
    if target is not None and isa is not None:
        yield Claim(f"{model.name}: {isa} over fp32", speed["bf16"] / speed["fp32"], target, "at least", "×")


def add_losses(record: Record, trainings: Sequence[Mapping[str, Any]]) -> None:
    """The table and the claims of `benchmarks.bf16`, from its finished trainings."""
    rows = []
    for preset, steps in dict.fromkeys((each["preset"], each["steps"]) for each in trainings):
        own = {
            (each["seed"], each["format"]): each["loss"]
            for each in trainings
            if (each["preset"], each["steps"]) == (preset, steps)
        }
        seeds = [seed for seed, name in own if name == FORMATS[0] and (seed, FORMATS[1]) in own]
        if not seeds:
            continue
        means = {name: statistics.mean(own[seed, name] for seed in seeds) for name in FORMATS}
        change = means["bf16"] - means["fp32"]
        rows.append({"preset": preset, "steps": steps, "seeds": len(seeds), **means, "bf16 - fp32": change})
        what = f"{preset}, {steps} steps, {len(seeds)} seeds: change of the mean loss in bf16"
        record.claims.append(Claim(what, abs(change), bf16.MAX_DIFFERENCE, "at most", "nats"))
    if rows:
        cpus = ", ".join(dict.fromkeys(str(each["cpu"]) for each in trainings))
        note = f"nats per token, in fp32 over the whole validation split; measured on {cpus}"
        record.tables.append(Table("Loss after equal steps", rows, note))


# -- contenders --------------------------------------------------------------------------------------


def _ours(model: Model, prepared: PreparedCorpus) -> Iterator[tuple[str, Callable[[], float]]]:
    for name in FORMATS:
        training = model.training.model_copy(update={"device": "cpu", "precision": name})
        yield name, trainer_turns(model.model, training, prepared, TURN_SECONDS)


def _peer(
    model: Model, settings: Settings, folder: Path, corpus: Corpus, prepared: PreparedCorpus, record: Record
) -> Callable[[], float] | None:
    """A turn of the model's peer; None: it is not here."""
    if model.peer == "nanoGPT":
        if settings.nanogpt is None:
            record.missing.append(NANOGPT)
            return None
        peer = NanoGPT(settings.nanogpt, folder, corpus, prepared, settings)
        return lambda: peer.train("turn", PEER_ITERATIONS, save=False).tokens_per_second
    if model.peer == "PyTorch example":
        if settings.wlm is None:
            record.missing.append(WLM)
            return None
        texts, example = write_texts(corpus, folder / "words"), WordLanguageModel(settings.wlm, folder, settings)
        return lambda: example.tokens_per_second(texts, 2 * TURN_SECONDS)
    kind: Any = model.model.model_dump()["type"]
    module = loops.PlainRecurrent(kind, prepared.tokenizer.vocab_size, HIDDEN, HIDDEN, 1)
    step = loops.recurrent_steps(module, prepared.splits["train"].ids, batch_size=BATCH, bptt=BPTT)
    return loop_turns(step, BATCH * BPTT, TURN_SECONDS)
