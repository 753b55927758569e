"""A text that a user and a model write in turns, with a snapshot between the turns.

The text is the user's text, then the model's reply, then `after_reply`. With a chat template these hold its special
tokens (`TemplateTurns`). A reply ends before a stop text, stop token or end token, or at `max_tokens`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from lm.generation.engine import Engine, Event, Request, Score
from lm.generation.options import SamplingOptions
from lm.generation.snapshots import NamedSnapshot

MAX_UNDO = 100
"""Turns that can be undone."""


class Conversation:
    """The turns of a user and a model."""

    def __init__(
        self,
        engine: Engine,
        options: SamplingOptions,
        begin: NamedSnapshot,
        *,
        after_reply: Sequence[int] | Callable[[str], Sequence[int]],
    ) -> None:
        """Start without turns.

        Args:
            engine: generates the replies.
            options: of the replies; reply k, counted from 0, has the seed `options.seed` + k.
            begin: the text before the first turn.
            after_reply: tokens after each reply, at least one; or a function that gives those after the reply's text.
        """
        self.state = begin
        """The snapshot after the last reply."""
        self.scores: tuple[Score, ...] = ()
        """Of the tokens of the last reply, if the options set `logprobs`."""
        self._engine = engine
        self._options = options
        self._begin = begin
        self._after_reply = after_reply if callable(after_reply) else lambda text: after_reply
        self._before: deque[NamedSnapshot] = deque(maxlen=MAX_UNDO)
        self._turns = 0

    def say(self, ids: Sequence[int], *, from_begin: bool = False) -> Iterator[Event]:
        """Add the user's tokens and generate a reply; if the iterator is closed early, the reply ends there.

        Args:
            ids: the tokens.
            from_begin: they are the whole conversation, and replace what the model has read of it.
        """
        before = self._begin if from_begin else self.state
        prompt = (*before.unread, *ids)
        options = self._options.model_copy(update={"seed": (self._options.seed + self._turns) % 2**63, "n": 1})
        generation = self._engine.submit(Request(prompt, options, state=before.snapshot, keep_state=True))
        reply: list[int] = []
        text = ""
        scores: list[Score] = []
        try:
            while not generation.done:
                self._engine.step()
                for event in generation.take():
                    reply += event.tokens
                    text += event.text
                    scores += event.scores
                    yield event
        finally:
            self._engine.cancel(generation)
            if generation.state is not None:
                unread = (*reply, *self._after_reply(text))
                self._before.append(self.state)
                self.state = NamedSnapshot(unread, before.tokens + len(ids) + len(unread), generation.state)
                self.scores = tuple(scores)
                self._turns += 1

    def undo(self) -> bool:
        """Undo the last turn; False if there is none."""
        if not self._before:
            return False
        self.state = self._before.pop()
        self.scores = ()
        self._turns -= 1
        return True

    def reset(self) -> None:
        """Remove all turns."""
        self.state, self.scores, self._turns = self._begin, (), 0
        self._before.clear()
