"""A text that a user and a model write in turns; the model's state is kept between them.

There is no template but plain text: what the user said, as it is; the model's reply, which ends before a stop text, a
stop token or at `max_tokens`; then `after_reply`, whatever ended it. Undoing goes back to the state before a turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from lm.generation.engine import Engine, Event, Request, Score
from lm.generation.options import SamplingOptions
from lm.generation.snapshots import NamedSnapshot

MOST_UNDONE = 100
"""Turns that can be taken back."""


class Conversation:
    """Turns of a user and a model over one engine."""

    def __init__(
        self, engine: Engine, options: SamplingOptions, begin: NamedSnapshot, *, after_reply: Sequence[int]
    ) -> None:
        """Start with no turns.

        Args:
            engine: computes the replies.
            options: how they are drawn; reply k, counted from 0, has the seed `options.seed` + k.
            begin: what was read before.
            after_reply: tokens that follow each reply, at least one.
        """
        self.state = begin
        """After the last reply."""
        self.scores: tuple[Score, ...] = ()
        """Of the tokens of the last reply, where `logprobs` is asked for."""
        self._engine = engine
        self._options = options
        self._begin = begin
        self._after_reply = tuple(after_reply)
        self._before: deque[NamedSnapshot] = deque(maxlen=MOST_UNDONE)
        self._turns = 0

    def say(self, ids: Sequence[int]) -> Iterator[Event]:
        """Add tokens, and let the model reply; a reply that is not taken to its end stays as far as it was taken."""
        before = self.state
        prompt = (*before.unread, *ids)
        options = self._options.model_copy(update={"seed": (self._options.seed + self._turns) % 2**63, "n": 1})
        generation = self._engine.submit(Request(prompt, options, state=before.snapshot, keep_state=True))
        reply: list[int] = []
        scores: list[Score] = []
        try:
            while not generation.done:
                self._engine.step()
                for event in generation.take():
                    reply += event.tokens
                    scores += event.scores
                    yield event
        finally:
            self._engine.cancel(generation)
            if generation.state is not None:
                unread = (*reply, *self._after_reply)
                self._before.append(before)
                self.state = NamedSnapshot(unread, before.tokens + len(ids) + len(unread), generation.state)
                self.scores = tuple(scores)
                self._turns += 1

    def undo(self) -> bool:
        """Take the last turn back; False if there is none."""
        if not self._before:
            return False
        self.state = self._before.pop()
        self.scores = ()
        self._turns -= 1
        return True

    def reset(self) -> None:
        """Begin again."""
        self.state, self.scores, self._turns = self._begin, (), 0
        self._before.clear()
