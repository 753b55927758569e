"""The options of one request, prepared: the filters in their order, for many samples at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lm._renamed import old_names
from lm.errors import ConfigError
from lm.generation.decoder import DrawPlan
from lm.generation.distribution import Logits, draw, row_max, softmax
from lm.generation.filters import (
    FILTERS,
    TEMPERATURE,
    Filter,
    SamplingContext,
    add_bias,
    apply_temperature,
    ban,
    ensure_finite_row,
)
from lm.generation.options import FILTER_FIELDS, SamplingOptions
from lm.tokenizers.base import Tokenizer

Step = Callable[[Logits, Sequence[SamplingContext]], Logits]


class Sampler:
    """Draws tokens with one set of options. Samples whose samplers have equal keys can be drawn together."""

    def __init__(self, options: SamplingOptions, tokenizer: Tokenizer, *, banned: Iterable[int] = ()) -> None:
        """Prepare what is the same for every token.

        Args:
            options: how to draw.
            tokenizer: of the model.
            banned: tokens that are not drawn, besides those of the options.

        Raises:
            ConfigError: a token is outside the vocabulary, or all tokens are banned.
        """
        size, unknown = tokenizer.vocab_size, tokenizer.unknown_id
        for name in ("banned_tokens", "stop_tokens", "logit_bias"):
            for token in getattr(options, name):
                if token >= size:
                    raise ConfigError(
                        f"sampling.{name}: token {token} is outside the vocabulary of {size} tokens. The ids were "
                        "probably made by another tokenizer."
                    )
        bans = {*options.banned_tokens, *banned}
        if unknown is not None and not options.allow_unknown:
            bans.add(unknown)
        bans.update(token for token, bias in options.logit_bias.items() if bias <= -100)
        fallback = next((token for token in range(size) if token not in bans), None)
        if fallback is None:
            raise ConfigError(
                f"The options ban all {size} tokens of the vocabulary: remove some from banned_tokens, logit_bias or "
                "stop_tokens."
            )
        self._fallback = fallback
        self._bans = np.array(sorted(bans), dtype=np.int64)
        self._bias_tokens = np.array(list(options.logit_bias), dtype=np.int64)
        self._biases = np.array(list(options.logit_bias.values()), dtype=np.float64)
        self._has_bias = bool(options.logit_bias)
        self._temperatures = options.temperatures
        self.greedy = set(options.temperatures) == {0.0}
        """Whether all temperatures are 0."""
        split = FILTERS.index(TEMPERATURE)
        self._before, self._after = (
            [_step(each, options) for each in part if each.function and each.is_on(options)]
            for part in (FILTERS[:split], FILTERS[split:])
        )
        self.plan = self._plan_of(options, FILTERS[split:])
        """For a decoder that draws; None: drawing needs more than the logits."""
        values = (getattr(options, name) for name in FILTER_FIELDS)
        self.key = (
            frozenset(bans),
            *(frozenset(value.items()) if isinstance(value, dict) else value for value in values),
        )

    def _plan_of(self, options: SamplingOptions, late: Sequence[Filter]) -> DrawPlan | None:
        active = [each for each in late if each.function and each.is_on(options)]
        if self._before or self._has_bias or len(self._temperatures) > 1 or any(each.counts for each in active):
            return None
        filters = tuple((each.function, tuple(getattr(options, name) for name in each.controls)) for each in active)
        return DrawPlan(self._bans, self._fallback, self._temperatures[0], filters)  # type: ignore[arg-type]

    def draw(
        self, logits: npt.NDArray[np.float32], contexts: Sequence[SamplingContext], numbers: Sequence[float]
    ) -> list[int]:
        """Draw the next token of each text.

        Args:
            logits: (B, V) of the next token.
            contexts: (B,) of the texts.
            numbers: (B,) random numbers in [0, 1); not read if `greedy`.
        """
        penalised, largest = self._penalised(logits, contexts)
        if self.greedy:
            return penalised.argmax(axis=-1).tolist()  # type: ignore[no-any-return]
        if len(self._temperatures) == 1:
            return draw(self._filtered(penalised, largest, self._temperatures[0], contexts), numbers)
        temperatures, filtered = self._scheduled(penalised, largest, contexts)
        tokens = draw(filtered, numbers)
        likeliest = penalised.argmax(axis=-1).tolist()
        return [tokens[row] if value > 0 else likeliest[row] for row, value in enumerate(temperatures)]

    def probabilities(self, logits: npt.NDArray[np.float32], contexts: Sequence[SamplingContext]) -> Logits:
        """The probabilities (B, V) that `draw` draws with."""
        penalised, largest = self._penalised(logits, contexts)
        temperatures, filtered = self._scheduled(penalised, largest, contexts)
        greedy = np.array(temperatures) == 0
        filtered[greedy] = -np.inf
        filtered[greedy, penalised.argmax(axis=-1)[greedy]] = 0.0
        return softmax(filtered)

    def biased(self, logits: npt.NDArray[np.float32]) -> Logits:
        """New logits (B, V) after bans and biases alone."""
        return self._penalised(logits, None)[0]

    def _scheduled(
        self, logits: Logits, largest: Logits | float, contexts: Sequence[SamplingContext]
    ) -> tuple[list[float], Logits]:
        """The temperature of each row, and the logits filtered with it; 1 replaces 0."""
        schedule = self._temperatures
        temperatures = [schedule[context.position % len(schedule)] for context in contexts]
        divisors = np.array([value or 1.0 for value in temperatures])[:, None]
        return temperatures, self._filtered(logits, largest, divisors, contexts)

    def _penalised(
        self, logits: npt.NDArray[np.float32], contexts: Sequence[SamplingContext] | None
    ) -> tuple[Logits, Logits | float]:
        """The logits before the temperature, and the maximum of each row; without contexts, without penalties."""
        penalised = ban(logits, self._bans)
        if self._has_bias:
            penalised = add_bias(penalised, self._bias_tokens, self._biases)
        if contexts is not None:
            for step in self._before:
                penalised = step(penalised, contexts)
        largest = row_max(penalised)
        if not (math.isfinite(largest) if isinstance(largest, float) else np.isfinite(largest).all()):
            penalised = ensure_finite_row(penalised, self._fallback)
            largest = row_max(penalised)
        return penalised, largest

    def _filtered(
        self,
        logits: Logits,
        largest: Logits | float,
        temperature: float | npt.NDArray[np.float64],
        contexts: Sequence[SamplingContext],
    ) -> Logits:
        """The logits after the temperature and the filters after it."""
        logits = apply_temperature(logits, temperature, largest)
        for step in self._after:
            logits = step(logits, contexts)
        return logits


def _step(each: Filter, options: SamplingOptions) -> Step:
    """A filter with the values of its options."""
    function, counts = each.function, each.counts
    assert function is not None
    values = [getattr(options, name) for name in each.controls]
    if counts is None:
        return lambda logits, contexts: function(logits, *values)

    def step(logits: Logits, contexts: Sequence[SamplingContext]) -> Logits:
        rows = [getattr(context, counts).counts for context in contexts]
        if len(rows) == 1:
            # One axis is faster than two.
            return function(logits[0], rows[0], *values)[None]
        return function(logits, np.stack(rows), *values)

    return step


if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
