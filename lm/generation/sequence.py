"""One sample while it is generated: its tokens, its text, and where it ends."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from lm._renamed import old_names
from lm.generation.decoder import Decoder, Snapshot
from lm.generation.distribution import uniforms
from lm.generation.filters import SamplingContext
from lm.generation.options import SamplingOptions
from lm.generation.request import Generation, Record, Score
from lm.generation.sampler import Sampler
from lm.generation.stop_strings import StopFinder
from lm.tokenizers.base import Tokenizer

RANDOM_BATCH = 64
"""Random numbers that are made at once."""


def stop_tokens_of(options: SamplingOptions, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens before which a text ends: those of the options, and those that end a text for the model."""
    return frozenset(options.stop_tokens if options.ignore_eos else (*options.stop_tokens, *tokenizer.end_ids))


class Sample:
    """One sample of a request. It has a slot while it runs, and a snapshot while it waits."""

    slots_needed = 1

    def __init__(
        self,
        generation: Generation,
        index: int,
        tokenizer: Tokenizer,
        samplers: tuple[Sampler, Sampler],
        records: deque[Record],
    ) -> None:
        """Start an empty sample.

        Args:
            generation: of the request.
            index: of the sample in the request; part of the random key.
            tokenizer: of the model.
            samplers: before and after `min_tokens`.
            records: receives what the sample generates.
        """
        options, prompt = generation.request.options, generation.request.prompt
        self.generation = generation
        self.index = index
        self.context = SamplingContext.after(prompt, (), options, tokenizer.vocab_size)
        self.last = -1
        """The last token, which the decoder has not read yet."""
        self.slot: int | None = None
        self.is_done = False
        self.records = records
        self.alternatives = options.logprobs if options.logprobs is not None else -1 + (options.best_of is not None)
        """Alternatives to score for each token; -1 if tokens have no scores."""
        self._logprob = 0.0
        self._turn_start = 0
        self.snapshot: Snapshot | None = None
        """Of a sample that waits for a slot."""
        self._early, self._late = samplers
        self.sampler_change = options.min_tokens if self._early is not self._late else -1
        """The position at which another sampler starts."""
        self._options = options
        self._min_tokens, self._max_tokens = options.min_tokens, options.max_tokens
        self._stop_tokens = stop_tokens_of(options, tokenizer)
        self._stream = tokenizer.stream(after=prompt)
        self._stops = StopFinder(options.stop) if options.stop else None
        self._length = 0  # characters of the text
        self._emitted = 0  # characters in `records`
        self._held: deque[Record] = deque()  # tokens whose text may start a stop text
        self._numbers: list[float] = []
        self._numbers_start = 0

    @property
    def sampler(self) -> Sampler:
        """Draws the next token."""
        return self._late if self.context.position >= self._min_tokens else self._early

    @property
    def turn_tokens(self) -> int:
        """Tokens generated since it got its slot."""
        return self.context.position - self._turn_start

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of a token, if tokens have scores."""
        return self._logprob / max(self.context.position, 1)

    def park(self, decoder: Decoder) -> None:
        """Save a snapshot and free the slot."""
        assert self.slot is not None, "a running sample has a slot"
        self.snapshot = decoder.export(self.slot)
        self.close(decoder)

    def resume(self, decoder: Decoder) -> None:
        """Continue in a new slot."""
        assert self.snapshot is not None, "a waiting sample has a snapshot"
        self.slot, self.snapshot, self._turn_start = decoder.restore(self.snapshot), None, self.context.position

    def close(self, decoder: Decoder) -> None:
        """Free the slot."""
        if self.slot is not None:
            decoder.close(self.slot)
            self.slot = None

    def random_number(self) -> float:
        """The random number in [0, 1) of this position."""
        position = self.context.position
        offset = position - self._numbers_start
        if offset >= len(self._numbers):
            count = min(RANDOM_BATCH, self._max_tokens - position)
            self._numbers = uniforms(self._options.seed, self.index, position, count)
            self._numbers_start, offset = position, 0
        return self._numbers[offset]

    def push(self, token: int, score: Score | None = None) -> bool:
        """Append a drawn token; True if the sample ends."""
        context = self.context
        context.position += 1
        if context.has_counts:
            context.count(token)
        self.last = token
        if score is not None and self.alternatives >= 0:
            self._logprob += score.logprob
            if len(score.top) > self.alternatives:
                score = replace(score, top=score.top[: self.alternatives])
        if token in self._stop_tokens:
            self.end("stop")
            return True
        offset = self._length
        text = self._stream.feed(token)
        self._length = offset + len(text)
        if self._stops is None or context.position <= self._min_tokens:
            self._emitted = self._length
            self.records.append((self.index, text, token, score, offset, None))
        else:
            self._held.append((self.index, "", token, score, offset, None))
            self._emit(self._stops.feed(text))
            if self._stops.found:
                self._finish("stop")
                return True
        if context.position == self._max_tokens:
            self.end("length")
            return True
        return False

    def _emit(self, text: str) -> None:
        """Record text that cannot be part of a stop text, and the tokens that begin in it."""
        self._emitted += len(text)
        if text:
            self.records.append((self.index, text, None, None, 0, None))
        while self._held:
            *_, offset, _ = self._held[0]
            if offset >= self._emitted:
                return
            self.records.append(self._held.popleft())

    def end(self, reason: str) -> None:
        """Record the text that was held back, and why the sample ends."""
        text = self._stream.end()
        if self._stops is not None:
            text = self._stops.feed(text)
            if self._stops.found:
                reason = "stop"
            else:
                text += self._stops.end()
        self._emit(text)
        if self._stops is None or not self._stops.found:
            self.records.extend(self._held)
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        self._held.clear()
        self.is_done = True
        self.records.append((self.index, "", None, None, 0, reason))


if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
