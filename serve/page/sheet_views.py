"""The views of the text of the tab Write: the same text, with the surprise of each token, one unit, or copied parts."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lm.copies import LENGTHS
from lm.errors import LMError
from lm.html_parts import escape
from lm.html_parts.token_marks import (
    SURPRISE_SCALE,
    Mark,
    marks_html,
    scale_html,
    score_note,
    surprise_strength,
    visible,
)
from lm.runs.run import Run
from serve.http_errors import RequestError
from serve.page.context import Page
from serve.page.next_token import Place
from serve.page.text_analysis import token_ends
from serve.page.text_editor import EditorCommand
from serve.page.text_generation import next_logits, score, tokenize
from serve.page.token_marks import MAX_MARKS

if TYPE_CHECKING:
    from lm.inspection.neurons import UnitValues
    from serve.engines.model_pool import Model

PLAIN, SURPRISE, NEURON, COPIES = VIEWS = ("Plain", "Surprise", "Neuron", "Copies")
ALTERNATIVES = 5
"""Alternatives in the tooltip of a token."""
COPIED = LENGTHS[0]
"""Characters of the shortest copy that is underlined."""
FIRST_UNIT = "0.0"
NAMING_CHARACTERS = 20_000
"""Of the validation text, in which the units that have a name are searched."""
_EMPTY = '<span class="empty">The text is empty.</span>'
_UNIT_SCALE = scale_html("low", "high", "both")


@dataclass(frozen=True, eq=False)
class SheetTokens:
    """The tokens of the text, for the chart at one of them."""

    model: Model
    command: EditorCommand
    ids: tuple[int, ...]
    """(N + 1,) start token included."""
    ends: Sequence[int]
    """(N,) where the text of each token ends."""

    def is_typed(self, index: int) -> bool:
        """Whether the visitor typed the first character of a token."""
        return self._piece(index)[1] == 0

    def generated(self, index: int) -> int:
        """How many tokens before this one belong to the same piece; 0 at a typed token and at the end of the text."""
        if index >= len(self.ends):
            return 0
        begin, piece = self._piece(index)
        return index - bisect.bisect_right(self.ends, begin) if piece else 0

    def _piece(self, index: int) -> tuple[int, int]:
        """Begin and number of the part in which a token begins."""
        at = self.ends[index - 1] if index else 0
        return next(((begin, piece) for begin, end, piece in self.command.spans() if begin <= at < end), (0, 0))

    def text(self, index: int) -> str:
        """The text of a token."""
        return self.command.text[self.ends[index - 1] if index else 0 : self.ends[index]]


async def sheet_tokens(page: Page, name: str | None, command: EditorCommand) -> SheetTokens:
    """The tokens of a text.

    Raises:
        RequestError, LMError: the model cannot be used, or the text is too long.
    """
    model, ids = await tokenize(page, name, command.text)
    return SheetTokens(model, command, ids, token_ends(command.text, model.tokenizer, ids[1:]) if len(ids) > 1 else [])


async def place_at(page: Page, tokens: SheetTokens, index: int) -> Place:
    """The place before a token, or at the end of the text.

    Raises:
        RequestError, LMError: the model cannot be used.
    """
    ids = tokens.ids[: index + 1]
    model, logits = await next_logits(page, tokens.model.name, ids)
    is_end = index >= len(tokens.ends)
    text = tokens.command.text if is_end else tokens.command.text[: tokens.ends[index - 1] if index else 0]
    return Place(
        model, ids, tokens.generated(index), logits, text, None if is_end else tokens.ids[index + 1],
    )  # fmt: skip


# -- the views ------------------------------------------------------------------------------------------


@dataclass
class Views:
    """Makes the HTML of the views; one for the page, so that each run's text is indexed once."""

    page: Page
    _runs: dict[str, tuple[object, Run]] = field(default_factory=dict)
    _units: dict[object, list[tuple[str, str]]] = field(default_factory=dict)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def html(self, view: str, tokens: SheetTokens, unit: str | None) -> tuple[str, str]:
        """The view's marks and its legend.

        Raises:
            RequestError, LMError: the view cannot be made; the message says why.
        """
        if len(tokens.ids) == 1:
            return _EMPTY, ""
        if view == SURPRISE:
            return await self._surprise(tokens), SURPRISE_SCALE
        if view == NEURON:
            return await self._neuron(tokens, unit), _UNIT_SCALE
        return await self._copies(tokens)

    async def _surprise(self, tokens: SheetTokens) -> str:
        scored = await score(self.page, tokens.model.name, tokens.command.text, top=ALTERNATIVES)
        text_of = scored.model.tokens.text

        def mark(index: int) -> Mark:
            each = scored.scores[index]
            return Mark(tokens.text(index), surprise_strength(each.logprob), score_note(each, text_of))

        return _marks(tokens, mark)

    async def _neuron(self, tokens: SheetTokens, unit: str | None) -> str:
        run = await self._run(tokens)
        async with self._lock:
            found = await asyncio.to_thread(_unit_values, run, tokens.ids, unit or FIRST_UNIT)
        values, levels = found.values.tolist(), found.levels().tolist()

        def mark(index: int) -> Mark:
            level = levels[index]
            note = f"“{visible(tokens.text(index))}”: {values[index]:.3g}"
            return Mark(tokens.text(index), abs(level), note, "surprise" if level > 0 else "less")

        return _marks(tokens, mark)

    async def _copies(self, tokens: SheetTokens) -> tuple[str, str]:
        run, text = await self._run(tokens), tokens.command.text
        async with self._lock:
            copies = await asyncio.to_thread(run.copies, text)
        spans = copies.spans(COPIED)
        legend = (
            f"Underlined: stands word for word in the training text ({COPIED} characters or more); "
            f"{copies.share(COPIED):.0%} of this text. Longest: {copies.longest.length:,} characters."
        )
        return plain_html(tokens.command, spans), escape(legend)

    async def units(self, tokens: SheetTokens) -> list[tuple[str, str]]:
        """(label, "LAYER.UNIT") of the units that track a feature of the text; searched once a model."""
        run = await self._run(tokens)
        async with self._lock:
            if tokens.model.fingerprint not in self._units:
                self._units[tokens.model.fingerprint] = await asyncio.to_thread(_named_units, run)
        return self._units[tokens.model.fingerprint]

    async def _run(self, tokens: SheetTokens) -> Run:
        """The run of a model. Only the last one is kept: the index of its training text takes memory."""
        name, fingerprint = tokens.model.name, tokens.model.fingerprint
        known = self._runs.get(name)
        if known is None or known[0] != fingerprint:
            offer = self.page.models.available_runs.get(name)
            if offer is None:
                raise RequestError(404, f"The model {name!r} is no longer there.")
            self._runs.clear()
            self._runs[name] = (fingerprint, Run(offer.folder, offer.checkpoint))
        return self._runs[name][1]


def _marks(tokens: SheetTokens, mark: Callable[[int], Mark]) -> str:
    """All tokens as marks, or the last MAX_MARKS after the text before them; typed ones stand in `.given`."""
    count = len(tokens.ends)
    first = max(0, count - MAX_MARKS)
    before = tokens.command.text[: tokens.ends[first - 1]] if first else ""
    parts = [f"<span>{escape(before)}</span>"] if before else []
    begin = first
    while begin < count:
        typed = tokens.is_typed(begin)
        end = begin
        while end < count and tokens.is_typed(end) == typed:
            end += 1
        marks = marks_html([mark(index) for index in range(begin, end)], first=begin)
        parts.append(f'<span class="given">{marks}</span>' if typed else marks)
        begin = end
    return "".join(parts)


def plain_html(command: EditorCommand, copied: Sequence[tuple[int, int]] = ()) -> str:
    """The text with typed parts in `.given`, and copied parts underlined."""
    bounds = {0, len(command.text)}
    for begin, end, *_ in (*command.spans(), *copied):
        bounds |= {begin, end}
    ordered, parts = sorted(bounds), []
    for begin, end in zip(ordered, ordered[1:], strict=False):
        classes = []
        if any(start <= begin < stop and not piece for start, stop, piece in command.spans()):
            classes.append("given")
        if any(start <= begin < stop for start, stop in copied):
            classes.append("copied")
        parts.append(f'<span class="{" ".join(classes)}">{escape(command.text[begin:end])}</span>')
    return "".join(parts)


def _unit_values(run: Run, ids: Sequence[int], unit: str) -> UnitValues:
    # Loads torch.
    from lm.inspection.neurons import unit_values

    return unit_values(run, ids, unit)


def _named_units(run: Run) -> list[tuple[str, str]]:
    from lm.inspection.neurons import neurons
    from lm.runs.copying import split_text

    try:
        found = neurons(run, split_text(run.own_text(split="valid"), "valid")[:NAMING_CHARACTERS])
    except LMError:
        # No text, or no hidden units: the view says so itself.
        return []
    best = [(ranking, ranking.units[0]) for ranking in found.rankings if ranking.units and ranking.units[0].named]
    return [
        (
            f"{unit.layer}.{unit.unit}: {ranking.feature} ({ranking.measure} {unit.score:.2f})",
            f"{unit.layer}.{unit.unit}",
        )
        for ranking, unit in best
    ]
