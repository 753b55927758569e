"""The preset for a text, where none is given.

The number of different characters and the length of the text decide how the text is tokenized. The tokens and epochs
that the plan trains on this machine decide the size of the model: a larger model learns more from each token and
overfits later; a smaller one trains on more tokens in the same time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lm.config import RunConfig, Section
from lm.corpora import Corpus, PreparedCorpus, Progress, prepare
from lm.corpora.shards import shards_tokenizer
from lm.errors import ConfigError, CorpusError
from lm.jobs.speed import measure_speed
from lm.training import distributed
from lm.training.plan import DEFAULT_MINUTES, LANDING, fit_to_text

PRESETS: dict[str, tuple[str, ...]] = {
    "char": ("gru-char-small", "gru-char", "gru-char-large"),
    "middle": ("gru-subword-small", "gru-char", "gru-char-large"),
    "long": ("gru-subword-small", "gru-subword-medium"),
    "subword": ("gru-subword",),
}
"""By the kind of text: presets in rising size."""
CANDIDATES = tuple(dict.fromkeys(chain(*PRESETS.values())))
"""All presets that can be chosen."""
MIN_TOKENS = {"gru-char": 400_000, "gru-char-large": 25_000_000, "gru-subword-medium": 5_000_000}
"""Trained tokens from which a preset is better than the smaller one; the first preset of each kind has no minimum."""
MIN_EPOCHS = {"gru-char": 8}
"""Epochs that a preset needs in addition: with fewer, a smaller one or one of subwords is better."""
SHORT_TOKENS = 400_000
"""A shorter training text is read for at most `MAX_EPOCHS` in a plan by time: recorded runs with twice as many epochs
ended with a worse loss (benchmarks/TRIALS.md)."""
MAX_EPOCHS = 30.0
MAX_CHARACTERS_FOR_CHAR = 1000
"""Texts with more different characters than this are tokenized into subwords."""
MIDDLE_CHARACTERS = 1_500_000
"""Training texts of this length and longer are tokenized into subwords, unless they are read for many epochs."""
LONG_CHARACTERS = 3_000_000
"""From this length, subwords are better for all plans that were recorded."""
MEASURE_SECONDS = 1.5
"""Time to measure the speed of one preset, or a fiftieth of the minutes of the plan if that is less."""


@dataclass(frozen=True)
class Choice:
    """The options that suit a text."""

    config: RunConfig
    tokens: int | None = None
    """Tokens that the plan trains on; None: not measured for this preset."""


def first_accepted(presets: Sequence[str], make: Callable[[str], RunConfig]) -> RunConfig:
    """The configuration over the first preset that accepts the overrides; needs no text.

    Raises:
        ConfigError: no preset accepts them; the error is that of the first preset.
    """
    refusals = []
    for preset in presets:
        try:
            return make(preset)
        except ConfigError as error:
            refusals.append(error)
    raise refusals[0]


def suited_presets(corpus: Corpus) -> tuple[str, ...]:
    """The presets that suit a text, smallest first: by its characters and its length, not by its name."""
    if corpus.tokens is not None:
        return PRESETS["char" if shards_tokenizer(corpus.tokens).type in ("byte", "char") else "subword"]
    seen: set[str] = set()
    read = 0
    for chunk in corpus.splits["train"].chunks():
        seen.update(chunk)
        read += len(chunk)
        if read >= LONG_CHARACTERS:
            break
    if len(seen) > MAX_CHARACTERS_FOR_CHAR:
        return PRESETS["subword"]
    return PRESETS["long" if read >= LONG_CHARACTERS else "middle" if read >= MIDDLE_CHARACTERS else "char"]


def choose_config(
    corpus: Corpus,
    make: Callable[[str], RunConfig],
    *,
    encode: Callable[[Section], PreparedCorpus] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """The options that suit a text and the length of the plan, measured with steps of the plan.

    Args:
        corpus: an opened corpus. Only this process measures; other processes of the job count as equally fast.
        make: the configuration over a preset.
        encode: the tokens of the corpus; None: `lm.corpora.prepare`.
        progress: called while the corpus is read.

    Raises:
        ConfigError: `make` refuses the options.
    """
    encode = encode or functools.partial(prepare, corpus, progress=progress)
    smallest, *larger = suited_presets(corpus)
    choice = Choice(make(smallest))
    for name in larger if "valid" in corpus.splits else ():
        try:
            config = make(name)
            prepared = encode(config.tokenizer)
        except (ConfigError, CorpusError):
            # This preset does not suit the options or the text.
            break
        length = len(prepared.splits["train"].ids)
        tokens, most = _planned_tokens(config, prepared), _max_tokens(config, length)
        is_better = min(tokens, most) >= max(MIN_TOKENS[name], MIN_EPOCHS.get(name, 0) * length)
        if is_better:
            choice = Choice(config, int(min(tokens, most)))
        if tokens > most:
            choice = replace(choice, config=_with_max_epochs(choice.config))
        if not is_better:
            break
    return choice


def _max_tokens(config: RunConfig, length: int) -> float:
    """Tokens that a plan trains on at most, where only time limits it and the training text has `length` tokens."""
    training = config.training
    limited = training.max_steps is not None or training.epochs is not None
    return math.inf if limited or length >= SHORT_TOKENS else MAX_EPOCHS * length


def _with_max_epochs(config: RunConfig) -> RunConfig:
    """The same options in a plan by time that ends after `MAX_EPOCHS`."""
    length = {"minutes": config.training.minutes or DEFAULT_MINUTES, "epochs": MAX_EPOCHS}
    return config.model_copy(update={"training": config.training.model_copy(update=length)})


def _planned_tokens(config: RunConfig, prepared: PreparedCorpus) -> int:
    """Tokens that the plan trains on with this machine's speed."""
    config = fit_to_text(config, prepared.splits["train"].counts.tokens)
    training = config.training
    by_time = training.minutes is not None or (training.max_steps is None and training.epochs is None)
    seconds = (training.minutes or DEFAULT_MINUTES) * 60 * LANDING
    processes = distributed.current().size
    with distributed.single_process():
        timings = measure_speed(config, prepared, min(MEASURE_SECONDS, seconds / 50) if by_time else None)
    lengths = []
    if training.max_steps is not None:
        lengths.append(training.max_steps * timings.tokens_per_step)
    if training.epochs is not None:
        lengths.append(int(training.epochs * timings.steps_per_epoch * timings.tokens_per_step))
    if by_time:
        lengths.append(int(seconds / timings.step_seconds * timings.tokens_per_step * processes))
    return min(lengths)
