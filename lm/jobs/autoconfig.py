"""The default model: one rule gives all options that nobody gave, from the text, the time and the machine.

    text (characters, different characters)     ─┐
    plan (minutes, epochs or steps)              ├─► work ─► width ─► epochs ─► dropout, decay, batch, learning rate
    machine (device, speed, memory of a GPU)     ┘

Work is the number of tokens that a reference network, a GRU of width 128 over characters, would train on in the time of
the plan. The network that the formulas choose is timed as well, and its true price replaces the one that they expected
(`with_measured_price`): machines and number formats differ in what a wide network costs. All formulas are smooth in
work and in the length of the text: twice the time or the text changes a width or a rate by some percent, and no
threshold exchanges one model for another. Characters give way to subwords where both are equally good.

The constants come from trials on texts that no report uses (benchmarks/TRIALS.md). What differs on a GPU is `GPU`: its
speed is measured in large batches, which fill it, so more tokens fit into the same time, and width and batch follow.
These constants are estimates from the arithmetic of a step; no GPU has measured them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lm.config import RunConfig, TrainingConfig, row_length
from lm.corpora import Corpus
from lm.corpora.shards import read_shards, shards_tokenizer
from lm.errors import ConfigError
from lm.training.plan import DEFAULT_MINUTES

Sections = Mapping[str, Mapping[str, Any]]
"""Options by section, as in a preset's file."""
Family = Literal["gru", "lstm", "transformer"]
TokenKind = Literal["char", "word", "subword"]

MAX_CHARACTERS = 50_000_000
"""Characters of the training text that are read for the rule; a longer text gets the same options."""
REFERENCE_WIDTH = 128
REFERENCE_WORK = 5.5e6
"""Work that suits a network of the reference width."""
WIDTH_EXPONENT = 0.39
"""Width grows with this power of the work."""
MIN_WIDTH = 64
WIDTH_STEP = 32
SUBWORD_BYTES = 2_500_000
"""Training text from which n-gram counts over subwords predict better than over characters."""
CHARACTERS_PER_SUBWORD = 2.2
CHARACTERS_PER_WORD = 5.5
MAX_TABLE_VOCABULARY = 1000, 4000
"""Of a hybrid and of a network alone: context tables of larger vocabularies take a fifth of a step, and gain less than
the steps in that time."""
TABLE_NUMBERS = 3_000_000, 12_000_000
"""Of a hybrid and of a network alone, in all context tables together: counts remember what tables forget."""
STEPS = 1000
"""Optimizer steps of a plan, if the bounds of a batch allow it."""
STEPS_SHARE = 0.88
"""Of the time of a plan; the rest is for counts, validation and saving."""
PRICE_FACTORS = 0.2, 5.0
"""Least and most of a measured price, in the expected one: a measurement of half a second may be wrong."""
AVERAGE_SHARE = 0.2, 0.4
"""Of the steps, whose weights a recurrent model of words averages: for each doubling of the epochs, and at most."""
FORGET_EPOCHS = 3.0
"""Epochs after which weight decay has left 1 / e of an update."""
MEMORY_SHARE = 0.6
"""Of a GPU's free memory for a batch."""


@dataclass(frozen=True)
class Scale:
    """What the kind of device changes in the rule.

    A price is the time of a token with counts, validation and saving, in that of the reference network.
    """

    rows: tuple[int, int]
    """Fewest and most rows of a batch."""
    usual_rows: int
    """Of a batch, where a plan gives steps alone."""
    max_width: int
    recurrent_price: tuple[float, float, float]
    """Of widths 0, 1 and 2 in powers of width / 128."""
    transformer_price: tuple[float, float, float]
    vocabulary_price: tuple[float, float]
    """Of a thousand tokens of the vocabulary: alone, and for each 128 of width."""

    def recurrent(self, width: float, vocabulary: int) -> float:
        """The price of a recurrent network."""
        return self._price(self.recurrent_price, width, vocabulary)

    def transformer(self, width: float, vocabulary: int) -> float:
        """The price of a Transformer that suits as much work as a recurrent network of this width."""
        return self._price(self.transformer_price, width, vocabulary)

    def _price(self, powers: tuple[float, float, float], width: float, vocabulary: int) -> float:
        h = width / REFERENCE_WIDTH
        alone, by_width = self.vocabulary_price
        return powers[0] + powers[1] * h + powers[2] * h * h + vocabulary / 1000 * (alone + by_width * h)


CPU = Scale(
    rows=(8, 64), usual_rows=32, max_width=768, recurrent_price=(0.7, 0.8, 0.7), transformer_price=(2.0, 0.0, 6.0),
    vocabulary_price=(3.0, 0.6),
)  # fmt: skip
GPU = Scale(
    # A step of a narrow network costs what its launches do; products grow with the square of the width.
    rows=(32, 2048), usual_rows=256, max_width=2048, recurrent_price=(0.7, 0.3, 0.1),
    transformer_price=(1.5, 0.0, 1.6), vocabulary_price=(0.5, 0.25),
)  # fmt: skip


@dataclass(frozen=True)
class Wishes:
    """What the caller wants of the default model; None: the rule decides."""

    family: Family | None = None
    tokens: TokenKind | None = None
    neural: bool = False
    """No counts in the model."""

    def __post_init__(self) -> None:
        for name, kinds in (("family", Family), ("tokens", TokenKind)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kinds):
                raise ConfigError(f"{name}={value!r}: choose one of {', '.join(get_args(kinds))}.")


@dataclass(frozen=True)
class Facts:
    """What the rule reads."""

    characters: int
    """Of the training text."""
    size_bytes: int
    """Of the training text in UTF-8."""
    distinct: int
    """Different characters of the training text."""
    encoded: int | None = None
    """Tokens of a training text that was tokenized before."""
    encoded_as: TokenKind | None = None
    """How it was tokenized."""
    seconds: float | None = None
    """Training time of the plan; None: steps or epochs alone limit it."""
    speed: float | None = None
    """Tokens per second of the reference network on this machine; None where `seconds` is None."""
    price_factor: float = 1.0
    """Price of a network on this machine, in that of `Scale`."""
    epochs: float | None = None
    steps: int | None = None
    scale: Scale = CPU
    """Of the device that trains."""
    memory_bytes: int | None = None
    """Free on a GPU; None on a CPU, whose batches are small."""


@dataclass(frozen=True)
class Choice:
    """The options that suit a text, and how they came about."""

    sections: dict[str, dict[str, Any]]
    facts: Facts
    work: float
    """Reference tokens."""
    tokens: int
    """Tokens that the plan trains on, as estimated."""
    epochs: float
    vocabulary: int
    """Tokens of the vocabulary, as estimated."""
    price: float
    """Time of a token, in that of the reference network."""
    limited: bool = False
    """Whether the plan ends before its minutes, because of `max_epochs`."""

    @property
    def batch(self) -> tuple[int, int]:
        """Rows of a batch, and tokens of a row."""
        model, training = self.sections["model"], self.sections["training"]
        return training["batch_size"], row_length(training.get("bptt"), model.get("context_length"))

    def explain(self) -> list[tuple[str, str, str]]:
        """The rule's inputs and outputs as rows: what, value, reason."""
        facts, model, training = self.facts, self.sections["model"], self.sections["training"]
        rows = [
            ("text", f"{facts.characters:,} characters", f"{facts.distinct:,} different, {facts.size_bytes:,} bytes")
        ]
        if facts.seconds is not None:
            rows.append(("time", f"{facts.seconds:,.0f} s", f"{facts.speed:,.0f} reference tokens/s on this machine"))
        if facts.price_factor != 1:
            rows.append(("price", f"{facts.price_factor:.2f}", "measured over expected time of a token"))
        if facts.scale is GPU:
            memory = "" if facts.memory_bytes is None else f", {facts.memory_bytes / 1e9:,.1f} GB free"
            rows.append(("device", "GPU", f"{GPU.rows[0]} to {GPU.rows[1]:,} rows a batch{memory}"))
        rows.append(("work", f"{self.work:,.0f}", f"tokens of a GRU of width {REFERENCE_WIDTH} in that time"))
        rows.append(("plan", f"{self.tokens:,} tokens", f"{self.epochs:.3g} epochs" + (", the most" * self.limited)))
        tokenizer = self.sections["tokenizer"]
        kind = tokenizer["type"] + (f", {tokenizer['size']:,}" if "size" in tokenizer else "")
        rows.append(("tokens", kind, f"subwords from {SUBWORD_BYTES / 1e6:g} MB"))
        rows.append(("model", model["type"], f"width {model['hidden_size']:,}, by the work"))
        reasons = {
            "order": "length of counted n-grams", "dropout": "by epochs and width", "table_dropout": "by epochs",
            "table_buckets": "rows of a context table, by vocabulary", "batch_size": f"about {STEPS:,} steps",
            "average_share": "of the steps, by epochs", "learning_rate": "by width",
            "weight_decay": f"an update is forgotten in {FORGET_EPOCHS:g} epochs",
        }  # fmt: skip
        values = {**model, **training}
        rows += [(name, f"{values[name]:g}", reason) for name, reason in reasons.items() if name in values]
        return rows


def token_kind(tokenizer: str) -> TokenKind:
    """The kind of tokens of a type of tokenizer: bytes count as characters."""
    kinds: dict[str, TokenKind] = {kind: kind for kind in get_args(TokenKind)}
    return kinds.get(tokenizer, "char")


def read_facts(corpus: Corpus) -> Facts:
    """Length and characters of the training text, of at most `MAX_CHARACTERS` of them."""
    if corpus.tokens is not None:
        tokenizer = shards_tokenizer(corpus.tokens)
        kind = token_kind(tokenizer.type)
        split = read_shards(corpus.tokens, tokenizer).splits["train"]
        counts = split.counts
        return Facts(counts.characters, counts.bytes, tokenizer.vocab_size, counts.tokens, kind)
    seen: set[str] = set()
    characters = size = 0
    for chunk in corpus.splits["train"].chunks():
        seen.update(chunk)
        characters += len(chunk)
        size += len(chunk.encode("utf-8", "surrogatepass"))
        if characters >= MAX_CHARACTERS:
            break
    return Facts(characters, size, max(1, len(seen)))


def with_length(facts: Facts, training: TrainingConfig, measure: Callable[[], float]) -> Facts:
    """The facts, with the length of the plan.

    Args:
        facts: of the text.
        training: with the length of the plan.
        measure: returns the speed of the reference network; called for a plan by time.
    """
    by_time = training.minutes is not None or (training.max_steps is None and training.epochs is None)
    return replace(
        facts,
        seconds=(training.minutes or DEFAULT_MINUTES) * 60 if by_time else None,
        speed=measure() if by_time else None,
        epochs=training.epochs,
        steps=training.max_steps,
    )


def with_measured_price(choice: Choice, speed: float) -> Facts:
    """The facts of a choice, with the price of its network as measured.

    Args:
        choice: the first one, for a plan by time.
        speed: training tokens per second of its network.
    """
    facts = choice.facts
    assert facts.speed is not None
    factor = facts.speed / (STEPS_SHARE * speed) / choice.price
    least, most = PRICE_FACTORS
    return replace(facts, price_factor=facts.price_factor * min(most, max(least, factor)))


def on_gpu(facts: Facts, memory_bytes: int | None) -> Facts:
    """The facts for a training on a GPU with this much free memory."""
    return replace(facts, scale=GPU, memory_bytes=memory_bytes)


def choose(facts: Facts, wishes: Wishes = Wishes()) -> Choice:
    """The options for a text, a plan and a machine."""
    kind = facts.encoded_as or wishes.tokens or ("subword" if facts.size_bytes >= SUBWORD_BYTES else "char")
    pieces = _pieces(facts)
    vocabulary = (
        facts.distinct if facts.encoded_as else {"char": facts.distinct, "subword": pieces, "word": 20_000}[kind]
    )
    per_token = {"char": 1.0, "subword": CHARACTERS_PER_SUBWORD, "word": CHARACTERS_PER_WORD}[kind]
    length = max(1.0, facts.encoded or facts.characters / per_token)
    family = wishes.family or "gru"
    expected = facts.scale.transformer if family == "transformer" else facts.scale.recurrent

    def price(width: float, vocabulary: int) -> float:
        return facts.price_factor * expected(width, vocabulary)

    width, work, tokens = _width(facts, length, vocabulary, price)
    epochs = tokens / length
    most = round(max_epochs(length), 1)
    limited = facts.seconds is not None and facts.epochs is None and facts.steps is None and epochs > most
    if limited:
        epochs, tokens = most, most * length
    tokenizer: dict[str, Any] = {"type": kind}
    if kind == "subword":
        tokenizer["size"] = pieces
    # Counts of words would need a row of the whole vocabulary for each position.
    hybrid = not wishes.neural and kind != "word" and family != "transformer"
    make = _transformer if family == "transformer" else _recurrent
    model, training = make(kind, vocabulary, width, _Regularisation.of(kind, width, length, epochs), hybrid)
    bptt = row_length(training.get("bptt"), model.get("context_length"))
    training["batch_size"] = _rows(facts, tokens, bptt, vocabulary, model)
    steps_per_epoch = length / (training["batch_size"] * bptt)
    training["weight_decay"] = _weight_decay(family, kind, training["learning_rate"], steps_per_epoch)
    own = {"type": "hybrid", "cell": family, "order": _order(kind)} if hybrid else {"type": family}
    model = {**own, **model}
    if limited:
        training["epochs"] = most
    sections = {"tokenizer": tokenizer, "model": model, "training": training}
    return Choice(sections, facts, work, int(tokens), epochs, vocabulary, price(width, vocabulary), limited)


# -- formulas -------------------------------------------------------------------------------------------


def max_epochs(length: float) -> float:
    """Epochs after which a strongly regularised model of a text of `length` tokens gets worse.

    A plan by time that has more of them gets a wider network first, and ends early with the widest one.
    """
    return min(60.0, max(15.0, 25.0 * math.pow(length / 50_000, 0.15)))


def max_width(length: float, scale: Scale = CPU) -> float:
    """The widest network that a text of `length` tokens can train without overfitting in `max_epochs`."""
    return min(float(scale.max_width), max(float(MIN_WIDTH), 128.0 * math.pow(length / 10_000, 0.3)))


def _width(
    facts: Facts, length: float, vocabulary: int, price: Callable[[float, int], float]
) -> tuple[int, float, float]:
    """Width, work and tokens of the plan.

    A wider network takes the time that a narrow one would spend on too many epochs.
    """

    def by_work(work: float) -> float:
        return REFERENCE_WIDTH * math.pow(work / REFERENCE_WORK, WIDTH_EXPONENT)

    widest = max_width(length, facts.scale)

    def rounded(width: float) -> int:
        return int(min(facts.scale.max_width, max(MIN_WIDTH, WIDTH_STEP * round(width / WIDTH_STEP))))

    limits = [] if facts.epochs is None else [facts.epochs * length]
    if facts.steps is not None:
        # The rows of a batch are chosen later; this many are in the middle.
        limits.append(facts.steps * facts.scale.usual_rows * 64.0)
    limit = min(limits, default=math.inf)
    if facts.seconds is not None:
        assert facts.speed is not None
        work = facts.seconds * facts.speed
        limit = max_epochs(length) * length if not limits else limit
        wide = min(by_work(work), widest)
        while wide < widest and work / price(wide, vocabulary) > limit:
            wide += 1.0
        width = rounded(wide)
        tokens = work / price(width, vocabulary)
        return width, work, min(tokens, min(limits, default=math.inf))
    wide = float(REFERENCE_WIDTH)
    for _ in range(30):
        wide = 0.5 * wide + 0.5 * by_work(limit * price(wide, vocabulary))
        wide = min(widest, max(float(MIN_WIDTH), wide))
    width = rounded(wide)
    return width, limit * price(width, vocabulary), limit


def _pieces(facts: Facts) -> int:
    """Size of a subword vocabulary: its characters, and pieces that grow with the text."""
    pieces = 500 * (facts.size_bytes / 1.5e6) ** 0.7
    return int(round(min(16_000, max(200, pieces)) + min(facts.distinct, 4000), -2))


def _order(kind: TokenKind) -> int:
    return 8 if kind == "char" else 5


def _rows(facts: Facts, tokens: float, length: int, vocabulary: int, model: Mapping[str, Any]) -> int:
    """Rows of a batch: a power of two. The update of a large embedding takes time, so its steps are larger."""
    least, most = facts.scale.rows
    least = least if vocabulary <= 256 else 2 * least
    rows = min(float(most), max(float(least), tokens / (STEPS * length)))
    doublings = round(math.log2(rows))
    if facts.memory_bytes is not None:
        fits = MEMORY_SHARE * facts.memory_bytes / (length * _token_bytes(model, vocabulary))
        doublings = min(doublings, math.floor(math.log2(max(1.0, fits))))
    return int(2**doublings)


def _token_bytes(model: Mapping[str, Any], vocabulary: int) -> float:
    """Bytes that a token of a batch needs at the peak of a step: activations for backward, and logits, in fp32."""
    activations = (28 if "context_length" in model else 10) * model["hidden_size"] * model.get("num_layers", 1)
    logits = 3 * (min(model["adaptive_cutoffs"]) if "adaptive_cutoffs" in model else vocabulary)
    return 4.0 * float(activations + logits)


def _weight_decay(family: Family, kind: TokenKind, learning_rate: float, steps_per_epoch: float) -> float:
    """The weight decay that forgets an update in `FORGET_EPOCHS`, whatever rate and batch a text has; within bounds.

    A step takes learning_rate · weight_decay of a weight away (Wang and Aitchison, "How to set AdamW's weight decay as
    you scale model and dataset size", 2024).
    """
    least, most = (0.05, 0.3) if family == "transformer" else (0.01, 0.1 if kind == "word" else 2.0)
    return round(min(most, max(least, 1 / (FORGET_EPOCHS * learning_rate * steps_per_epoch))), 3)


@dataclass(frozen=True)
class _Regularisation:
    """More for more epochs, and for more weights per token."""

    dropout: float
    table_dropout: float
    average_share: float

    @classmethod
    def of(cls, kind: TokenKind, width: int, length: float, epochs: float) -> _Regularisation:
        doublings = math.log2(max(1.0, epochs))
        excess = math.log2(4.0 * width * width / length)
        # The large embedding of words memorises from the first epoch on.
        by_epochs = 0.1 * doublings if kind == "word" else 0.09 * (doublings - 2)
        dropout = min(0.5, max(0.0, by_epochs + 0.03 * excess)) if epochs > 1 else 0.0
        by_doubling, most = AVERAGE_SHARE
        share = min(most, by_doubling * doublings)
        return cls(round(dropout, 2), round(min(0.9, 0.2 + 0.14 * doublings), 2), round(share, 2))


def _tables(kind: TokenKind, vocabulary: int, dropout: float, hybrid: bool) -> dict[str, Any]:
    if vocabulary > MAX_TABLE_VOCABULARY[not hybrid]:
        return {}
    orders = [2, 3, 4, 5, 6] if kind == "char" else [2, 3, 4]
    rows = TABLE_NUMBERS[not hybrid] / (len(orders) * vocabulary)
    return {
        "table_orders": orders, "table_buckets": int(2 ** round(math.log2(max(512.0, rows)))), "table_dropout": dropout,
    }  # fmt: skip


def _recurrent(
    kind: TokenKind, vocabulary: int, width: int, regularisation: _Regularisation, hybrid: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    small, dropout = vocabulary <= 256, regularisation.dropout
    model: dict[str, Any] = {
        "embedding_size": 64 if small else 128, "hidden_size": width, "dropout": dropout,
        **_tables(kind, vocabulary, regularisation.table_dropout, hybrid),
    }  # fmt: skip
    training: dict[str, Any] = {
        "bptt": 64 if kind == "char" else 48, "learning_rate": round(8e-3 * (128 / width) ** 0.45, 5),
    }  # fmt: skip
    if not small:
        model["tie_weights"] = True
    if kind == "word":
        model |= {
            "embedding_size": 256, "adaptive_cutoffs": [2000, 10_000], "locked_dropout": True,
            "embedding_dropout": round(dropout / 4, 3), "weight_dropout": round(dropout / 2, 3),
        }  # fmt: skip
        training |= {"learning_rate": 3e-3, "betas": [0.9, 0.999], "batching": "rotated"}
        if regularisation.average_share > 0:
            training["average_share"] = regularisation.average_share
    if "table_orders" in model:
        training["table_learning_rate"] = 1.0 if kind == "char" else 2.0
    return model, training


def _transformer(
    kind: TokenKind, vocabulary: int, width: int, regularisation: _Regularisation, hybrid: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    # A layer costs what four rows of a recurrent one do; depth grows with width.
    width = int(min(512, max(96, 32 * round(width * 0.6 / 32))))
    model: dict[str, Any] = {
        "context_length": 64 if kind == "word" else 128, "hidden_size": width,
        "num_layers": max(2, min(8, round(width / 40))), "num_heads": width // 32,
        "dropout": regularisation.dropout,
        **_tables(kind, vocabulary, round(max(0.2, regularisation.table_dropout - 0.1), 2), hybrid),
    }  # fmt: skip
    training: dict[str, Any] = {
        "batching": "shuffled", "optimizer": "muon", "muon_learning_rate": 0.01 if kind == "char" else 0.02,
        "learning_rate": 3e-3,
    }  # fmt: skip
    if "table_orders" in model:
        training["table_learning_rate"] = 1.0
    if vocabulary > 256:
        model["tie_weights"] = True
    if kind == "word":
        model["adaptive_cutoffs"] = [2000, 10_000]
    return model, training


def composed(make: Callable[[Sections], RunConfig], wishes: Wishes) -> RunConfig:
    """The configuration for a text that was not read yet: to check all options before it is."""
    return make(choose(Facts(1_000_000, 1_000_000, 100, epochs=1.0), wishes).sections)
