"""What is asked of the engine, and what it tells: requests, events, and the handle between them."""

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
    """A prompt and how to go on from it."""

    prompt: tuple[int, ...]
    """Exactly the ids to read, at least one: the caller puts the tokenizer's start token in front where it belongs."""
    options: SamplingOptions
    score_prompt: bool = False
    """Tell the Score of every token of the prompt."""
    state: Snapshot | None = None
    """Go on from this state instead of from an empty text."""
    keep_state: bool = False
    """Leave the state after the prompt in `Generation.state`."""
    keep_logits: bool = False
    """Leave what follows the prompt in `Generation.logits`."""

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest id of the prompt."""
        return min(self.prompt), max(self.prompt)


@dataclass(frozen=True, slots=True)
class Score:
    """A token under the model, before any filter."""

    token: int
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, likeliest first, the lower id first among equals."""


@dataclass(slots=True)
class Event:
    """News of one sample."""

    index: int
    """Which sample of the request."""
    text: str
    """What is now known to belong to the sample; what may be the start of a stop text is held back."""
    tokens: tuple[int, ...]
    """Tokens drawn since the last event of this sample; only those that stay."""
    scores: tuple[Score, ...] = ()
    """One for each of `tokens`, where `logprobs` was asked for."""
    offsets: tuple[int, ...] = ()
    """Where the text of each of `tokens` begins in the sample's text, in characters."""
    finish_reason: str | None = None
    """Of a sample's last event: "length" at max_tokens, "stop" at a stop text or stop token, "cancelled", "error"."""


@dataclass(slots=True)
class Usage:
    """Tokens counted for a request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that an earlier request had read already."""
    drawn_tokens: int = 0
    """Tokens drawn for all samples, those of a stop text or of a sample that was not chosen included."""


Record = tuple[int, str, int | None, Score | None, int, str | None]
"""One step of a sample: index, text, token, score, offset, finish reason."""


class Generation:
    """The handle of one request. The engine fills it; any thread may look."""

    def __init__(self, request: Request, on_event: Callable[[Generation], None] | None = None) -> None:
        self.request = request
        self.on_event = on_event
        self.usage = Usage(prompt_tokens=len(request.prompt))
        self.prompt_scores: tuple[Score | None, ...] = ()
        """One for each token of the prompt where that was asked for, there before the first event; the first token
        has none."""
        self.state: Snapshot | None = None
        """The state after the prompt, where that was asked for; there before the first event."""
        self.logits: npt.NDArray[np.float32] | None = None
        """The logits (1, V) of what follows the prompt, where that was asked for; there before the first event."""
        self.error: BaseException | None = None
        """What went wrong, where a finish reason is "error"."""
        self.done = False
        """True once no more events will come: `take` then gives the last of them."""
        self.records: deque[Record] = deque()
        """What `take` makes events of. The engine's side."""

    @property
    def behind(self) -> int:
        """Tokens, and alternatives of tokens, that the next `take` gives: what memory and work for it grow with."""
        return len(self.records) * (1 + (self.request.options.logprobs or 0))

    def take(self) -> list[Event]:
        """The events since the last call: one for each sample that has news."""
        scored = self.request.options.logprobs is not None
        if len(self.records) == 1:
            # One token, taken at once: worth a path of its own.
            index, text, token, score, offset, reason = self.records.popleft()
            if token is None:
                return [Event(index, text, (), (), (), reason)]
            return [Event(index, text, (token,), (score,) if scored else (), (offset,), reason)]  # type: ignore[arg-type]
        news: list[Record] = []
        while self.records:
            news.append(self.records.popleft())
        samples: dict[int, list[Record]] = {}
        for record in news:
            samples.setdefault(record[0], []).append(record)
        return [_event(index, samples[index], scored) for index in sorted(samples)]


def _event(index: int, records: list[Record], scored: bool) -> Event:
    tokens = [record for record in records if record[2] is not None]
    return Event(
        index=index,
        text="".join([record[1] for record in records]),
        tokens=tuple([record[2] for record in tokens]),  # type: ignore[misc]
        scores=tuple([record[3] for record in tokens]) if scored else (),  # type: ignore[misc]
        offsets=tuple([record[4] for record in tokens]),
        finish_reason=records[-1][5],
    )
