"""The preset for a text that came without one.

How many different characters the text has, and how long it is, decide what it is cut into; how many tokens the plan
comes to on this machine decides the size of the model. A larger model learns more from a token, and a smaller one sees
more of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lm.checkpoint import RunFolder
from lm.config import RunConfig
from lm.corpora import Corpus, PreparedCorpus, Progress, prepare
from lm.corpora.shards import shards_tokenizer
from lm.device import enough_memory
from lm.errors import CorpusError
from lm.models.base import build_model
from lm.training import distributed
from lm.training.plan import DEFAULT_MINUTES, RESERVE
from lm.training.trainer import Trainer

PRESETS: dict[str, dict[str, int]] = {
    "char": {"gru-char-small": 0, "gru-char": 8_000_000, "gru-char-large": 25_000_000},
    "long": {"gru-subword-small": 0},
    "subword": {"gru-subword": 0},
}
"""By the kind of text: presets in rising size, and the trained tokens from which each is the best one.

Measured on a million characters of training text, see docs/recipes.md.
"""
READINGS = {"gru-char": 8}
"""By preset: of a short training text, so many readings are enough, since the smaller one knows it by heart by then."""
LEAST_LENGTH = 50_000
"""Of a shorter training text than this, in tokens, it takes as many tokens as of this."""
SHORT = 400_000
"""A training text of fewer tokens than this is read at most `MOST_EPOCHS` times in a plan by time: runs that read it
twice as often ended worse (docs/recipes.md)."""
MOST_EPOCHS = 30.0
MOST_CHARACTERS_FOR_CHAR = 1000
"""Texts with more different characters than this are better cut into subwords."""
LONG_CHARACTERS = 4_000_000
"""From so many characters of training text on, few different ones are better cut into subwords too."""
MEASURE_SECONDS = 1.5
"""For the speed of a size; a plan of minutes gives at most a fiftieth of its time."""


@dataclass(frozen=True)
class Choice:
    """What suits a text."""

    config: RunConfig
    tokens: int | None = None
    """Tokens that the plan comes to here; None where they were not measured with this preset."""


def suited_presets(corpus: Corpus) -> tuple[str, ...]:
    """The presets that suit a text, in rising size: by its characters and its length, never by its name."""
    if corpus.tokens is not None:
        return tuple(PRESETS["char" if shards_tokenizer(corpus.tokens).type in ("byte", "char") else "subword"])
    seen: set[str] = set()
    read = 0
    for chunk in corpus.splits["train"].chunks():
        seen.update(chunk)
        read += len(chunk)
        if read >= LONG_CHARACTERS:
            break
    if len(seen) > MOST_CHARACTERS_FOR_CHAR:
        return tuple(PRESETS["subword"])
    return tuple(PRESETS["long" if read >= LONG_CHARACTERS else "char"])


def choose_config(corpus: Corpus, make: Callable[[str], RunConfig], *, progress: Progress | None = None) -> Choice:
    """The options that suit a text and the length of the plan, measured in the plan's own steps.

    Args:
        corpus: an opened corpus. This process alone reads and measures; others are taken to be as fast.
        make: the whole configuration over a preset.
        progress: called while the corpus is read.

    Raises:
        ConfigError: `make` refuses the options.
    """
    smallest, *larger = suited_presets(corpus)
    if "valid" not in corpus.splits:
        return Choice(make(smallest))
    most = ends = math.inf
    for name in reversed(larger):
        config = make(name)
        try:
            prepared = prepare(corpus, config.tokenizer, progress=progress)
            length = len(prepared.splits["train"].ids)
            most = _most_tokens(config, length)
            ends = _planned_tokens(config, prepared)
        except CorpusError:
            # Too short for batches of this size; the smallest one has its own word to say about that.
            continue
        tokens = min(ends, most)
        if tokens >= worth_from(name, length):
            return Choice(_ending(config) if ends > most else config, int(tokens))
    config = make(smallest)
    return Choice(_ending(config) if ends > most else config)


def _most_tokens(config: RunConfig, length: int) -> float:
    """What a plan reads at most of a training text of so many tokens, where nothing but time was given to bound it."""
    training = config.training
    bounded = training.max_steps is not None or training.epochs is not None
    return math.inf if bounded or length >= SHORT else MOST_EPOCHS * length


def _ending(config: RunConfig) -> RunConfig:
    """The same, in a plan by time that ends after `MOST_EPOCHS`."""
    ends = {"minutes": config.training.minutes or DEFAULT_MINUTES, "epochs": MOST_EPOCHS}
    return config.model_copy(update={"training": config.training.model_copy(update=ends)})


def worth_from(preset: str, length: int) -> float:
    """The trained tokens from which a preset is the best of its kind, on a training text of so many tokens."""
    tokens = next(rungs[preset] for rungs in PRESETS.values() if preset in rungs)
    return min(tokens, READINGS.get(preset, math.inf) * max(length, LEAST_LENGTH))


def _planned_tokens(config: RunConfig, prepared: PreparedCorpus) -> int:
    training = config.training
    processes = distributed.current().size
    with distributed.alone(), enough_memory():
        model = build_model(config.model, prepared.tokenizer.vocab_size, seed=training.seed)
        # Thrown away before anything is written: the folder is never made.
        trainer = Trainer(RunFolder(Path("unused")), training, model, prepared)
        lengths = []
        if training.max_steps is not None:
            lengths.append(training.max_steps * trainer.tokens_per_step)
        if training.epochs is not None:
            lengths.append(int(training.epochs * trainer.steps_per_epoch * trainer.tokens_per_step))
        if training.minutes is not None or not lengths:
            seconds = (training.minutes or DEFAULT_MINUTES) * 60 * RESERVE
            step_seconds, _ = trainer.measure(min(MEASURE_SECONDS, seconds / 50))
            lengths.append(int(seconds / step_seconds * trainer.tokens_per_step * processes))
    return min(lengths)
