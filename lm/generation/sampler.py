"""One request's options, made ready to draw: the filters in their documented order, for many samples at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lm.errors import ConfigError
from lm.generation import filters
from lm.generation.options import SamplingOptions
from lm.tokenizers.base import Tokenizer


class Counts:
    """How often each token stands among the last `window` of a text."""

    def __init__(self, vocab_size: int, window: int | None, tokens: Sequence[int] = ()) -> None:
        recent = tokens if window is None else tokens[-window:]
        self.counts: npt.NDArray[np.int64] = np.bincount(np.array(recent, dtype=np.int64), minlength=vocab_size)
        self._window = window
        self._recent = deque(() if window is None else recent)

    def add(self, token: int) -> None:
        """Count one more token, and forget the one that leaves the window."""
        self.counts[token] += 1
        if self._window is not None:
            self._recent.append(token)
            if len(self._recent) > self._window:
                self.counts[self._recent.popleft()] -= 1


@dataclass(frozen=True)
class SamplingContext:
    """A place in a text at which nothing is drawn: to look at what would be."""

    drawn: int
    met: Counts | None
    written: Counts | None

    @classmethod
    def after(
        cls, prompt: Sequence[int], text: Sequence[int], options: SamplingOptions, vocab_size: int
    ) -> SamplingContext:
        """The place after some drawn tokens."""
        by_prompt, by_text = counts_needed(options)
        return cls(
            len(text),
            Counts(vocab_size, options.penalty_window, (*prompt, *text)) if by_prompt else None,
            Counts(vocab_size, options.penalty_window, text) if by_text else None,
        )


class HasCounts(Protocol):
    """What the probabilities of a place depend on."""

    @property
    def drawn(self) -> int:
        """Tokens drawn so far: the position of the next one."""

    @property
    def met(self) -> Counts | None:
        """Tokens of prompt and text, where a penalty looks at them."""

    @property
    def written(self) -> Counts | None:
        """Tokens drawn, where a penalty looks at them."""


class HasRandom(HasCounts, Protocol):
    """A sample that a token is drawn for."""

    def number(self) -> float:
        """The random number of this position, in [0, 1)."""


class Sampler:
    """Draws tokens as one set of options says; samples whose samplers have equal keys can be drawn together."""

    def __init__(self, options: SamplingOptions, tokenizer: Tokenizer, *, banned: Iterable[int] = ()) -> None:
        """Work out what is the same for every token.

        Args:
            options: how to draw.
            tokenizer: of the model.
            banned: tokens that are not drawn, beside those of the options.

        Raises:
            ConfigError: a token is outside the vocabulary, or none is left to draw.
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
        allowed = next((token for token in range(size) if token not in bans), None)
        if allowed is None:
            raise ConfigError(
                f"The options ban all {size} tokens of the vocabulary, so that none is left to draw: take some out of "
                "banned_tokens, logit_bias or stop_tokens."
            )
        self._allowed = allowed
        self._bans = np.array(sorted(bans), dtype=np.int64)
        self._bias_tokens = np.array(list(options.logit_bias), dtype=np.int64)
        self._bias_values = np.array(list(options.logit_bias.values()), dtype=np.float64)
        self._options = options
        self._temperatures = options.temperatures
        self._greedy = set(options.temperatures) == {0.0}
        self._penalised = counts_needed(options) != (False, False)
        self.key = (
            frozenset(bans), frozenset(options.logit_bias.items()), options.temperatures, options.top_k, options.top_p,
            options.min_p, options.typical_p, options.repetition_penalty, options.presence_penalty,
            options.frequency_penalty,
        )  # fmt: skip

    def draw(self, logits: npt.NDArray[np.float32], samples: Sequence[HasRandom]) -> list[int]:
        """The next token of each sample, from its row of `logits` (B, V)."""
        biased, best = self._biased(logits, samples)
        if self._greedy:
            return biased.argmax(axis=-1).tolist()  # type: ignore[no-any-return]
        numbers = [sample.number() for sample in samples]
        if len(self._temperatures) == 1:
            return filters.draw(self._filtered(biased, best, self._temperatures[0]), numbers)
        turns, filtered = self._in_turns(biased, best, samples)
        tokens = filters.draw(filtered, numbers)
        likeliest = biased.argmax(axis=-1).tolist()
        return [tokens[row] if turn > 0 else likeliest[row] for row, turn in enumerate(turns)]

    def probabilities(self, logits: npt.NDArray[np.float32], samples: Sequence[HasCounts]) -> filters.Logits:
        """The probabilities (B, V) that `draw` would draw with, of the same."""
        biased, best = self._biased(logits, samples)
        turns, filtered = self._in_turns(biased, best, samples)
        greedy = np.array(turns) == 0
        filtered[greedy] = -np.inf
        filtered[greedy, biased.argmax(axis=-1)[greedy]] = 0.0
        return filters.softmax(filtered)

    def biased(self, logits: npt.NDArray[np.float32], samples: Sequence[HasCounts] = ()) -> filters.Logits:
        """What comes before the temperature; penalties only where `samples` are given, one a row."""
        return self._biased(logits, samples)[0]

    def _in_turns(
        self, biased: filters.Logits, best: filters.Logits | float, samples: Sequence[HasCounts]
    ) -> tuple[list[float], filters.Logits]:
        """The temperature of each sample, and the logits filtered with it; 1 stands in for 0."""
        turns = [self._temperatures[sample.drawn % len(self._temperatures)] for sample in samples]
        temperatures = np.array(turns)[:, None]
        return turns, self._filtered(biased, best, np.where(temperatures > 0, temperatures, 1.0))

    def _biased(
        self, logits: npt.NDArray[np.float32], samples: Sequence[HasCounts]
    ) -> tuple[filters.Logits, filters.Logits | float]:
        """The same, and the greatest of each row."""
        options = self._options
        biased = filters.ban(logits, self._bans)
        if options.logit_bias:
            biased = filters.add_bias(biased, self._bias_tokens, self._bias_values)
        if self._penalised:
            for row, sample in enumerate(samples):
                if sample.met is not None and options.repetition_penalty is not None:
                    biased[row] = filters.penalise_repetition(
                        biased[row], sample.met.counts, options.repetition_penalty
                    )
                if sample.written is not None:
                    biased[row] = filters.penalise_presence(
                        biased[row], sample.written.counts, options.presence_penalty, options.frequency_penalty
                    )
        best = filters.greatest(biased)
        if not (math.isfinite(best) if isinstance(best, float) else np.isfinite(best).all()):
            biased = filters.ensure_finite_row(biased, self._allowed)
            best = filters.greatest(biased)
        return biased, best

    def _filtered(
        self,
        logits: filters.Logits,
        best: filters.Logits | float,
        temperature: float | npt.NDArray[np.float64],
    ) -> filters.Logits:
        """Temperature and what comes after it."""
        options = self._options
        logits = filters.apply_temperature(logits, temperature, best)
        if options.top_k is not None:
            logits = filters.keep_top_k(logits, options.top_k)
        if options.top_p is not None:
            logits = filters.keep_top_p(logits, options.top_p)
        if options.min_p is not None:
            logits = filters.keep_min_p(logits, options.min_p)
        if options.typical_p is not None:
            logits = filters.keep_typical_p(logits, options.typical_p)
        return logits


def counts_needed(options: SamplingOptions) -> tuple[bool, bool]:
    """Whether penalties look at prompt and text, and at the drawn tokens."""
    return (
        options.repetition_penalty not in (None, 1.0),
        options.presence_penalty != 0 or options.frequency_penalty != 0,
    )
