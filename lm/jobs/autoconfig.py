"""The preset for a text that came without one.

How many different characters the text has, and how long it is, decide what it is cut into; how many tokens and readings
of the text the plan comes to on this machine decides the size of the model. A larger model learns more from a token and
longer from a text, and a smaller one sees more of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from lm.config import RunConfig
from lm.corpora import Corpus, PreparedCorpus, Progress, prepare
from lm.corpora.shards import shards_tokenizer
from lm.device import enough_memory
from lm.errors import ConfigError, CorpusError
from lm.models.base import build_model
from lm.runs.run_folder import RunFolder
from lm.training import distributed
from lm.training.plan import DEFAULT_MINUTES, RESERVE, fit_to_text
from lm.training.trainer import Trainer

PRESETS: dict[str, tuple[str, ...]] = {
    "char": ("gru-char-small", "gru-char", "gru-char-large"),
    "middle": ("gru-subword-small", "gru-char", "gru-char-large"),
    "long": ("gru-subword-small", "gru-subword-medium"),
    "subword": ("gru-subword",),
}
"""By the kind of text: presets in rising size."""
EVERY = tuple(chain(*PRESETS.values()))
"""All that may be chosen."""
LEAST_TOKENS = {"gru-char": 400_000, "gru-char-large": 25_000_000, "gru-subword-medium": 5_000_000}
"""Trained tokens from which a preset is worth its time; the first ones of each kind always are."""
LEAST_READINGS = {"gru-char": 8}
"""Readings of the text that it takes besides: by then a smaller one, or one by subwords, knows the text by heart."""
SHORT = 400_000
"""A training text of fewer tokens than this is read at most `MOST_EPOCHS` times in a plan by time: runs that read it
twice as often ended worse (docs/recipes.md)."""
MOST_EPOCHS = 30.0
MOST_CHARACTERS_FOR_CHAR = 1000
"""Texts with more different characters than this are better cut into subwords."""
MIDDLE_CHARACTERS = 1_500_000
"""From so many characters of training text on, few different ones are better cut into subwords too, as long as they are
read a few times only."""
LONG_CHARACTERS = 3_000_000
"""From so many on, subwords are better for longer than was measured."""
MEASURE_SECONDS = 1.5
"""For the speed of a size; a plan of minutes gives at most a fiftieth of its time."""


@dataclass(frozen=True)
class Choice:
    """What suits a text."""

    config: RunConfig
    tokens: int | None = None
    """Tokens that the plan comes to here; None where they were not measured with this preset."""


def first_that_fits(presets: Sequence[str], make: Callable[[str], RunConfig]) -> RunConfig:
    """The options over the first preset that takes them, before the text is known.

    Raises:
        ConfigError: none does; with what the first one refuses.
    """
    refusals = []
    for preset in presets:
        try:
            return make(preset)
        except ConfigError as error:
            refusals.append(error)
    raise refusals[0]


def suited_presets(corpus: Corpus) -> tuple[str, ...]:
    """The presets that suit a text, in rising size: by its characters and its length, never by its name."""
    if corpus.tokens is not None:
        return PRESETS["char" if shards_tokenizer(corpus.tokens).type in ("byte", "char") else "subword"]
    seen: set[str] = set()
    read = 0
    for chunk in corpus.splits["train"].chunks():
        seen.update(chunk)
        read += len(chunk)
        if read >= LONG_CHARACTERS:
            break
    if len(seen) > MOST_CHARACTERS_FOR_CHAR:
        return PRESETS["subword"]
    return PRESETS["long" if read >= LONG_CHARACTERS else "middle" if read >= MIDDLE_CHARACTERS else "char"]


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
    choice = Choice(make(smallest))
    for name in larger if "valid" in corpus.splits else ():
        try:
            config = make(name)
            prepared = prepare(corpus, config.tokenizer, progress=progress)
        except (ConfigError, CorpusError):
            # Options or text do not suit it; about the smallest one, training has its own word to say.
            break
        length = len(prepared.splits["train"].ids)
        tokens, most = _planned_tokens(config, prepared), _most_tokens(config, length)
        worth = min(tokens, most) >= _worth_from(name, length)
        if worth:
            choice = Choice(config, int(min(tokens, most)))
        if tokens > most:
            choice = replace(choice, config=_ending(choice.config))
        if not worth:
            break
    return choice


def _most_tokens(config: RunConfig, length: int) -> float:
    """What a plan reads at most of a training text of so many tokens, where nothing but time was given to bound it."""
    training = config.training
    bounded = training.max_steps is not None or training.epochs is not None
    return math.inf if bounded or length >= SHORT else MOST_EPOCHS * length


def _ending(config: RunConfig) -> RunConfig:
    """The same, in a plan by time that ends after `MOST_EPOCHS`."""
    ends = {"minutes": config.training.minutes or DEFAULT_MINUTES, "epochs": MOST_EPOCHS}
    return config.model_copy(update={"training": config.training.model_copy(update=ends)})


def _worth_from(preset: str, length: int) -> int:
    """The trained tokens from which a preset is the best of its kind, on a training text of so many tokens."""
    return max(LEAST_TOKENS[preset], LEAST_READINGS.get(preset, 0) * length)


def _planned_tokens(config: RunConfig, prepared: PreparedCorpus) -> int:
    """Tokens that the plan trains on here."""
    config = fit_to_text(config, prepared.splits["train"].counts.tokens)
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
