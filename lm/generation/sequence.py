"""One sample while it is drawn: its tokens, its text, where it ends."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from lm.generation.decoder import Decoder, Snapshot
from lm.generation.filters import uniforms
from lm.generation.request import Generation, Record, Score
from lm.generation.sampler import Counts, Sampler, counts_needed
from lm.generation.stop_strings import StopFinder
from lm.tokenizers.base import Tokenizer

NUMBERS_AT_ONCE = 64
"""Random numbers made at a time."""


class Sequence:
    """One sample of a request. It holds a slot while it runs, and a snapshot while it waits."""

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
            generation: the request it belongs to.
            index: which of its samples; keys the randomness.
            tokenizer: of the model.
            samplers: before and after `min_tokens`.
            records: where its news go.
        """
        options = generation.request.options
        self.generation = generation
        self.index = index
        self.drawn = 0
        self.last = -1
        """The token drawn last, which the decoder has not read yet."""
        self.turn = 0
        """Tokens drawn since it got its slot."""
        self.slot: int | None = None
        self.over = False
        self._snapshot: Snapshot | None = None
        self._logprob = 0.0
        self.alternatives = options.logprobs if options.logprobs is not None else -1 + (options.best_of is not None)
        """How many to tell beside each token; -1 where no scores are kept."""
        self.records = records
        prompt = generation.request.prompt
        by_prompt, by_text = counts_needed(options)
        self.met = Counts(tokenizer.vocab_size, options.penalty_window, prompt) if by_prompt else None
        self.written = Counts(tokenizer.vocab_size, options.penalty_window) if by_text else None
        self._early, self._late = samplers
        self.changes_at = options.min_tokens if self._early is not self._late else -1
        """After so many tokens another sampler draws."""
        self._counted = by_prompt or by_text
        self._min_tokens, self._max_tokens = options.min_tokens, options.max_tokens
        self._stop_tokens = frozenset(options.stop_tokens)
        self._stream = tokenizer.stream(after=prompt)
        self._stops = StopFinder(options.stop) if options.stop else None
        self._length = 0  # characters of all the text
        self._given = 0  # those given out
        self._held: deque[Record] = deque()  # tokens whose text is not given out yet
        self._numbers: list[float] = []
        self._numbers_from = 0

    @property
    def sampler(self) -> Sampler:
        """What draws its next token."""
        return self._late if self.drawn >= self._min_tokens else self._early

    @property
    def mean_logprob(self) -> float:
        """Of a drawn token, where scores are kept."""
        return self._logprob / max(self.drawn, 1)

    def park(self, decoder: Decoder) -> None:
        """Give the slot back."""
        assert self.slot is not None, "what is parked runs"
        self.wait(decoder.export(self.slot))
        self.close(decoder)

    def wait(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, once there is a slot."""
        self._snapshot = snapshot

    def resume(self, decoder: Decoder) -> None:
        """Take a slot again."""
        assert self._snapshot is not None, "what waits has a snapshot"
        self.slot, self._snapshot, self.turn = decoder.restore(self._snapshot), None, 0

    def close(self, decoder: Decoder) -> None:
        """Free the slot."""
        if self.slot is not None:
            decoder.close(self.slot)
            self.slot = None

    def number(self) -> float:
        """The random number of this position."""
        place = self.drawn - self._numbers_from
        if place >= len(self._numbers):
            count = min(NUMBERS_AT_ONCE, self._max_tokens - self.drawn)
            options = self.generation.request.options
            self._numbers, self._numbers_from = uniforms(options.seed, self.index, self.drawn, count), self.drawn
            place = 0
        return self._numbers[place]

    def push(self, token: int, score: Score | None = None) -> bool:
        """Take a drawn token; True if it was the last."""
        self.drawn += 1
        self.turn += 1
        self.last = token
        if score is not None and self.alternatives >= 0:
            self._logprob += score.logprob
            if len(score.top) > self.alternatives:
                score = replace(score, top=score.top[: self.alternatives])
        if token in self._stop_tokens:
            self.end("stop")
            return True
        if self._counted:
            self._count(token)
        offset = self._length
        text = self._stream.feed(token)
        self._length = offset + len(text)
        if self._stops is None or self.drawn <= self._min_tokens:
            self._given = self._length
            self.records.append((self.index, text, token, score, offset, None))
        else:
            self._held.append((self.index, "", token, score, offset, None))
            self._give(self._stops.feed(text))
            if self._stops.found:
                self._close_text("stop")
                return True
        if self.drawn == self._max_tokens:
            self.end("length")
            return True
        return False

    def _count(self, token: int) -> None:
        if self.met is not None:
            self.met.add(token)
        if self.written is not None:
            self.written.add(token)

    def _give(self, text: str) -> None:
        """Tell text that is known to stay, and the tokens that begin in it."""
        self._given += len(text)
        if text:
            self.records.append((self.index, text, None, None, 0, None))
        held = self._held
        while held and held[0][4] < self._given:
            self.records.append(held.popleft())

    def end(self, reason: str) -> None:
        """Tell what was held back, and why the sample ends."""
        text = self._stream.end()
        if self._stops is not None:
            text = self._stops.feed(text)
            if self._stops.found:
                reason = "stop"
            else:
                text += self._stops.end()
        self._give(text)
        if self._stops is None or not self._stops.found:
            self.records.extend(self._held)
        self._close_text(reason)

    def _close_text(self, reason: str) -> None:
        self._held.clear()
        self.over = True
        self.records.append((self.index, "", None, None, 0, reason))
