"""Requests to the engine, and their results: events, scores, and the handle of a request."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm.generation.decoder import Snapshot
from lm.generation.options import SamplingOptions


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: tuple[int, ...]
    """The ids to read, at least one. The caller adds the start token of the tokenizer."""
    options: SamplingOptions
    score_prompt: bool = False
    """Fill `Generation.prompt_scores`."""
    state: Snapshot | None = None
    """Start from this snapshot; None: from an empty text."""
    keep_state: bool = False
    """Fill `Generation.state`."""
    keep_logits: bool = False
    """Fill `Generation.logits`."""

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest id of the prompt."""
        return min(self.prompt), max(self.prompt)


@dataclass(frozen=True, slots=True)
class Score:
    """The probability of a token under the model, before any filter."""

    token: int
    logprob: float
    """Natural logarithm of the probability."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with their log-probabilities; among equals the lower id comes first."""


@dataclass(slots=True)
class Event:
    """New text of one sample."""

    index: int
    """The sample of the request."""
    text: str
    """Text since the last event. Text that may start a stop text comes later."""
    tokens: tuple[int, ...]
    """Tokens since the last event."""
    scores: tuple[Score, ...] = ()
    """One for each of `tokens`, if the options set `logprobs`."""
    offsets: tuple[int, ...] = ()
    """The position in the sample's text, in characters, at which each of `tokens` begins."""
    finish_reason: str | None = None
    """In the last event: "length" at max_tokens, "stop" at a stop text, stop or end token, "cancelled", "error"."""


@dataclass(slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that came from the prefix cache."""
    drawn_tokens: int = 0
    """Generated tokens of all samples, with those of stop texts and of samples that `best_of` drops."""


Record = tuple[int, str, int | None, Score | None, int, str | None]
"""A change of a sample: its index, text, token, score, offset, finish reason. A plain tuple: one is made a token."""


class Generation:
    """The handle of a request. The engine fills it; any thread may read it."""

    def __init__(self, request: Request, on_event: Callable[[Generation], None] | None = None) -> None:
        self.request = request
        self.on_event = on_event
        self.usage = Usage(prompt_tokens=len(request.prompt))
        self.prompt_scores: tuple[Score | None, ...] = ()
        """One for each token of the prompt, None for the first; complete before the first event."""
        self.state: Snapshot | None = None
        """The snapshot after the prompt; complete before the first event."""
        self.logits: npt.NDArray[np.float32] | None = None
        """The logits (1, V) after the prompt; complete before the first event."""
        self.error: BaseException | None = None
        """The exception behind the finish reason "error"."""
        self.done = False
        """True when no more events will come: then `take` returns the last of them."""
        self.records: deque[Record] = deque()
        """Changes that `take` has not returned yet."""

    @property
    def behind(self) -> int:
        """Tokens and alternatives that the next `take` returns: its memory and time grow with this number."""
        return len(self.records) * (1 + (self.request.options.logprobs or 0))

    def take(self) -> list[Event]:
        """The events since the last call: at most one for each sample."""
        scored = self.request.options.logprobs is not None
        if len(self.records) == 1:
            # The usual case, one token: faster by itself.
            index, text, token, score, offset, reason = self.records.popleft()
            if token is None:
                return [Event(index, text, (), (), (), reason)]
            return [Event(index, text, (token,), (score,) if scored else (), (offset,), reason)]  # type: ignore[arg-type]
        samples: dict[int, list[Record]] = {}
        while self.records:
            record = self.records.popleft()
            samples.setdefault(record[0], []).append(record)
        return [_event(samples[index], scored) for index in sorted(samples)]


def _event(records: list[Record], scored: bool) -> Event:
    indices, texts, tokens, scores, offsets, reasons = zip(*records, strict=True)
    drawn = [number for number, token in enumerate(tokens) if token is not None]
    return Event(
        index=indices[0],
        text="".join(texts),
        tokens=tuple([tokens[number] for number in drawn]),
        scores=tuple([scores[number] for number in drawn]) if scored else (),
        offsets=tuple([offsets[number] for number in drawn]),
        finish_reason=reasons[-1],
    )
