"""Beam search: finds the most likely texts, without randomness.

The score of a text is the sum of its log-probabilities after bans and biases, with the token or text that ends it. The
temperature, the penalties and the filters after them are not used. With as many beams as texts, the search is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lm.generation.decoder import Decoder, Logits, Snapshot
from lm.generation.distribution import log_softmax
from lm.generation.request import Generation, Score
from lm.generation.sampler import Sampler
from lm.generation.sequence import Sample, stop_tokens_of
from lm.generation.stop_strings import StopFinder
from lm.generation.token_scores import score_rows
from lm.tokenizers.base import StreamDecoder, Tokenizer

_FIRST_SORTED = 256
"""Continuations that are sorted first; most steps need no more."""


@dataclass(frozen=True)
class _Text:
    """An unfinished or finished text of the search."""

    logprob: float = 0.0
    tokens: tuple[int, ...] = ()
    scores: tuple[Score, ...] = ()
    stops: tuple[StreamDecoder, StopFinder] | None = None
    """Finds stop texts, if the options have any."""


class Beams:
    """The search of one request. Each beam has a slot while the search runs, and a snapshot while it waits."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, samplers: tuple[Sampler, Sampler]) -> None:
        options = generation.request.options
        self.generation = generation
        self.slots_needed = options.num_beams or 1
        self.turn_tokens = 0
        """Steps since it got its slots."""
        self.slots: list[int] = []
        self._snapshots: list[Snapshot] = []
        self._tokenizer = tokenizer
        self._samplers = samplers
        self._options = options
        self._stop_tokens = stop_tokens_of(options, tokenizer)
        stops = None
        if options.stop:
            stops = tokenizer.stream(after=generation.request.prompt), StopFinder(options.stop)
        self._live = [_Text(stops=stops)]
        self._found: list[_Text] = []

    @property
    def last(self) -> list[int]:
        """The last token of each beam, which the decoder has not read yet."""
        return [text.tokens[-1] for text in self._live]

    def park(self, decoder: Decoder) -> None:
        """Save snapshots and free the slots."""
        self._snapshots = [decoder.export(slot) for slot in self.slots]
        self.close(decoder)

    def resume(self, decoder: Decoder) -> None:
        """Continue in new slots."""
        self.turn_tokens = 0
        self.slots += [decoder.restore(snapshot) for snapshot in self._snapshots]
        self._snapshots = []

    def close(self, decoder: Decoder) -> None:
        """Free the slots."""
        while self.slots:
            decoder.close(self.slots.pop())

    def advance(self, decoder: Decoder, logits: Logits) -> bool:
        """Add one token, from the logits (S, V) after each beam; True if the search is done."""
        self.turn_tokens += 1
        position = len(self._live[0].tokens)
        options = self._options
        may_stop = position >= options.min_tokens
        live: list[tuple[int, _Text]] = []
        found: list[_Text] = []
        for parent, token, logprob in _most_likely(self._samplers[may_stop], logits, self._live):
            before = self._live[parent]
            stops = None
            if before.stops is not None:
                stream, finder = stops = before.stops[0].copy(), copy.copy(before.stops[1])
                piece = stream.feed(token)
                if may_stop:
                    finder.feed(piece)
            text = _Text(logprob, (*before.tokens, token), before.scores, stops)
            if options.logprobs is not None:
                score = score_rows(logits[parent : parent + 1], (token,), options.logprobs)
                text = replace(text, scores=(*before.scores, *score))
            if not self._ends(text):
                live.append((parent, text))
            elif len(found) < options.n:
                found.append(text)
            if len(live) == self.slots_needed or (position + 1 == options.max_tokens and len(found) == options.n):
                break
        self.generation.usage.drawn_tokens += len(live)
        # A stable sort: among equals, the text that was found first.
        self._found = sorted([*self._found, *found], key=lambda text: -text.logprob)[: options.n]
        if not live or (len(self._found) == options.n and self._found[-1].logprob >= live[0][1].logprob):
            # A sum never grows: no unfinished text can pass the finished ones.
            self.close(decoder)
            self._record()
            return True
        self._fork([parent for parent, _ in live], decoder)
        self._live = [text for _, text in live]
        return False

    def _ends(self, text: _Text) -> bool:
        if len(text.tokens) == self._options.max_tokens or text.tokens[-1] in self._stop_tokens:
            return True
        return text.stops is not None and text.stops[1].found

    def _fork(self, parents: list[int], decoder: Decoder) -> None:
        """Give each new beam a slot with the state of its parent."""
        for index, slot in enumerate(self.slots):
            if index not in parents:
                # Closed first: a search never has more slots than beams.
                decoder.close(slot)
        used: set[int] = set()
        slots = []
        for parent in parents:
            slots.append(decoder.fork(self.slots[parent]) if parent in used else self.slots[parent])
            used.add(parent)
        self.slots = slots

    def _record(self) -> None:
        """Record the texts as samples."""
        for index, text in enumerate(self._found):
            sample = Sample(self.generation, index, self._tokenizer, self._samplers, self.generation.records)
            scores = text.scores or (None,) * len(text.tokens)
            for token, score in zip(text.tokens, scores, strict=True):
                sample.push(token, score)
        # Bans can leave fewer texts than requested: the other samples are empty.
        for index in range(len(self._found), self._options.n):
            self.generation.records.append((index, "", None, None, 0, "length"))


def _most_likely(sampler: Sampler, logits: Logits, live: list[_Text]) -> Iterator[tuple[int, int, float]]:
    """Yield continuations by falling sum: beam, token, sum; among equals the lower beam, then the lower id first."""
    logprobs = log_softmax(sampler.biased(logits))
    sums = (logprobs + np.array([text.logprob for text in live])[:, None]).reshape(-1)
    size, yielded, count = logits.shape[-1], 0, _FIRST_SORTED
    while True:
        border = np.partition(sums, len(sums) - count)[len(sums) - count] if count < len(sums) else -np.inf
        candidates = np.flatnonzero((sums >= border) & np.isfinite(sums))
        order = candidates[np.argsort(-sums[candidates], kind="stable")]
        for candidate in order[yielded:].tolist():
            yield *divmod(candidate, size), float(sums[candidate])
        if count >= len(sums):
            return
        yielded, count = len(order), 8 * count
