"""Beam search: the likeliest texts, without randomness.

What counts is the sum of a text's log-probabilities under the model after bans and biases, the token or text that ends
it included. The temperature and all filters after it play no part. With as many beams as there are texts, the search is
exhaustive.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lm.generation.decoder import Decoder, Logits, Snapshot
from lm.generation.distribution import log_softmax
from lm.generation.request import Generation, Record, Score
from lm.generation.sampler import Sampler
from lm.generation.sequence import Sample
from lm.generation.stop_strings import StopFinder
from lm.generation.token_scores import score_rows
from lm.tokenizers.base import StreamDecoder, Tokenizer

_SORTED_AT_FIRST = 256
"""Most searches go no further down the list of what may follow."""


@dataclass(frozen=True)
class _Text:
    """A text that is searched from, or one that is found."""

    logprob: float = 0.0
    tokens: tuple[int, ...] = ()
    scores: tuple[Score, ...] = ()
    watch: _Watch | None = None
    """What looks for stop texts in it, where there are any."""


class _Watch:
    """Looks for stop texts in one text that grows."""

    def __init__(self, stream: StreamDecoder, finder: StopFinder) -> None:
        self._stream, self._finder = stream, finder

    @property
    def found(self) -> bool:
        """Whether the text holds a stop text."""
        return self._finder.found

    def after(self, token: int, *, counts: bool) -> _Watch:
        """The same after one more token; `counts`: a stop text may stand in it."""
        stream, finder = self._stream.copy(), copy.copy(self._finder)
        text = stream.feed(token)
        if counts:
            finder.feed(text)
        return _Watch(stream, finder)


class Beams:
    """The search of one request. It holds a slot for each beam while it runs, and snapshots while it waits."""

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
        self._stop_tokens = frozenset(options.stop_tokens)
        watch = None
        if options.stop:
            watch = _Watch(tokenizer.stream(after=generation.request.prompt), StopFinder(options.stop))
        self._live = [_Text(watch=watch)]
        self._found: list[_Text] = []

    @property
    def last(self) -> list[int]:
        """The token of each beam that the decoder has not read yet."""
        return [text.tokens[-1] for text in self._live]

    def park(self, decoder: Decoder) -> None:
        """Give the slots back."""
        self._snapshots = [decoder.export(slot) for slot in self.slots]
        self.close(decoder)

    def resume(self, decoder: Decoder) -> None:
        """Take slots again."""
        self.turn_tokens = 0
        for snapshot in self._snapshots:
            self.slots.append(decoder.restore(snapshot))
        self._snapshots = []

    def close(self, decoder: Decoder) -> None:
        """Free the slots."""
        while self.slots:
            decoder.close(self.slots.pop())

    def advance(self, decoder: Decoder, logits: Logits) -> bool:
        """Go one token on, from the logits (S, V) after each beam; True if the search is over."""
        self.turn_tokens += 1
        position = len(self._live[0].tokens)
        options = self._options
        sampler = self._samplers[position >= options.min_tokens]
        live: list[tuple[int, _Text]] = []
        found: list[_Text] = []
        for parent, token, logprob in _likeliest(sampler, logits, self._live):
            before = self._live[parent]
            watch = before.watch and before.watch.after(token, counts=position >= options.min_tokens)
            text = _Text(logprob, (*before.tokens, token), before.scores, watch)
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
        # Stable: of equals the one found first.
        self._found = sorted([*self._found, *found], key=lambda text: -text.logprob)[: options.n]
        if not live or (len(self._found) == options.n and self._found[-1].logprob >= live[0][1].logprob):
            # Sums only fall: no text that is still searched can become likelier than those found.
            self.close(decoder)
            self._tell()
            return True
        self._move([parent for parent, _ in live], decoder)
        self._live = [text for _, text in live]
        return False

    def _ends(self, text: _Text) -> bool:
        options = self._options
        if len(text.tokens) == options.max_tokens or text.tokens[-1] in self._stop_tokens:
            return True
        return text.watch is not None and text.watch.found

    def _move(self, parents: list[int], decoder: Decoder) -> None:
        """Give each new beam a slot with its parent's state."""
        for place, slot in enumerate(self.slots):
            if place not in parents:
                # First, so that there are never more slots than beams.
                decoder.close(slot)
        owned: set[int] = set()
        slots = []
        for parent in parents:
            slots.append(decoder.fork(self.slots[parent]) if parent in owned else self.slots[parent])
            owned.add(parent)
        self.slots = slots

    def _tell(self) -> None:
        for index, text in enumerate(self._found):
            # Through the rules of a sample, which say what is given out.
            sample = Sample(self.generation, index, self._tokenizer, self._samplers, self.generation.records)
            scores = text.scores or (None,) * len(text.tokens)
            for token, score in zip(text.tokens, scores, strict=True):
                sample.push(token, score)
        # Where bans leave fewer texts than were asked for, the rest is empty.
        for index in range(len(self._found), self._options.n):
            self.generation.records.append(Record(index, finish_reason="length"))


def _likeliest(sampler: Sampler, logits: Logits, live: list[_Text]) -> Iterator[tuple[int, int, float]]:
    """What may follow, likeliest first: beam, token, sum of log-probabilities; of equals the lower beam and id."""
    logprobs = log_softmax(sampler.biased(logits))
    sums = (logprobs + np.array([text.logprob for text in live])[:, None]).reshape(-1)
    size, given, most = logits.shape[-1], 0, _SORTED_AT_FIRST
    while True:
        border = np.partition(sums, len(sums) - most)[len(sums) - most] if most < len(sums) else -np.inf
        places = np.flatnonzero((sums >= border) & np.isfinite(sums))
        order = places[np.argsort(-sums[places], kind="stable")]
        for place in order[given:].tolist():
            yield *divmod(place, size), float(sums[place])
        if most >= len(sums):
            return
        given, most = len(order), 8 * most
