"""Text from a decoder: the loop of filter, draw and step, and stop texts found across token borders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lm.generation.decoder import PREFILL_CHUNK, Decoder
from lm.generation.filters import apply_filters, draw
from lm.generation.options import SamplingOptions
from lm.tokenizers.base import Ids, Tokenizer


@dataclass
class Outcome:
    """How a generation ended; complete once its iterator is used up."""

    tokens: int = 0
    finish_reason: str = "length"
    """"length" at max_tokens, "stop" at a stop text."""


class StopFinder:
    """Gives out text up to the first stop text, and holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is now known to come before any stop text."""
        self._held += text
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            given, self._held = self._held[: min(hits)], ""
            return given
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                given, self._held = self._held[:-size], self._held[-size:]
                return given
        given, self._held = self._held, ""
        return given

    def end(self) -> str:
        """What was held back, when no more text comes."""
        given, self._held = self._held, ""
        return given


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: Ids,
    options: SamplingOptions,
    *,
    index: int = 0,
    outcome: Outcome | None = None,
) -> Iterator[str]:
    """Pieces of the text that follows the prompt, as they are made.

    Args:
        decoder: of the model.
        tokenizer: of the model.
        prompt: ids; the start token is put in front, so that an empty prompt has a first token too.
        options: how to draw.
        index: which of several samples of one request this is; each has randomness of its own.
        outcome: filled in while the pieces are taken.
    """
    outcome = outcome if outcome is not None else Outcome()
    banned = (tokenizer.unknown_id,) if tokenizer.unknown_id is not None and not options.allow_unknown else ()
    stream, stops = tokenizer.stream(after=prompt), StopFinder(options.stop)
    slot = decoder.open()
    try:
        ids = [tokenizer.start_id, *prompt.tolist()]
        for begin in range(0, len(ids), PREFILL_CHUNK):
            # Only the last row is needed: a long prompt must not hold a row of logits for each of its tokens.
            logits = decoder.prefill(slot, ids[begin : begin + PREFILL_CHUNK])[-1:]
        for position in range(options.max_tokens):
            token = int(draw(apply_filters(logits, options, banned), options.seed, index, position)[0])
            outcome.tokens += 1
            if text := stops.feed(stream.feed(token)):
                yield text
            if stops.found:
                outcome.finish_reason = "stop"
                return
            if position + 1 < options.max_tokens:
                logits = decoder.step([slot], [token])
        if text := stops.feed(stream.end()):
            yield text
        if stops.found:
            outcome.finish_reason = "stop"
        elif text := stops.end():
            yield text
    finally:
        decoder.close(slot)
