"""The summed log-likelihood over all N tokens of a split, from which all figures of a report come.

The model's `context_length` chooses one of two context rules:

- None: the state is carried from the first token to the last (`rows` = 1), or within `rows` equal parts of the split
  that run together, which is faster. With `warm_up`, each part but the first begins with the state after the tokens
  before it; validation during training does this;
- C: a window of C tokens slides by `stride`. After the first window only its last `stride` tokens are scored, so that
  each is predicted from at least C - stride tokens. The last window ends with the text, and is as long as the others.

Each token is scored exactly once. The first one is predicted from the start token.

Of conversations (a split with marks, `lm.corpora.answers`) each begins without a context, and its answers alone are
scored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lm.corpora.answers import ANSWER
from lm.corpora.batches import conversation_bounds, pad_rows
from lm.device import Precision, computing, memory_bytes, to_device
from lm.evaluation.per_token import Scored, Watcher
from lm.evaluation.score_sums import Scores
from lm.models.base import LanguageModel, State
from lm.models.target_scores import TargetScores, scores_of

__all__ = ["Piece", "Scores", "pieces", "score"]

LOGITS_AT_ONCE, GPU_LOGITS_AT_ONCE = 16_000_000, 1 << 28
"""Logits in memory at a time, at least those of one window. It limits the memory of an evaluation; a GPU needs large
pieces."""
MAX_TOKENS_AT_ONCE, MAX_GPU_TOKENS_AT_ONCE = 8192, 1 << 16
LOGITS_SHARE = 1 / 256
"""Logits at a time for each byte of a GPU's memory, at most: with their copies of 4 bytes they need an eighth of it."""
MAX_PENDING_TOKENS = 1 << 20
"""Scored tokens whose nats may be on a GPU before the host waits for them."""
SCORED_PER_WARM_UP = 4
"""Tokens that a row scores, at least, for each warm-up token; limits the unscored work."""

Ids = npt.NDArray[Any]


def tokens_at_once(width: int, device: torch.device) -> int:
    """Tokens, each with `width` logits, that run through a model together; a longer window still runs whole."""
    if device.type == "cpu":
        return max(1, min(MAX_TOKENS_AT_ONCE, LOGITS_AT_ONCE // width))
    logits = min(GPU_LOGITS_AT_ONCE, int(memory_bytes(device) * LOGITS_SHARE))
    return max(1, min(MAX_GPU_TOKENS_AT_ONCE, logits // width))


@dataclass
class Piece:
    """Tokens to run through the model together; the first `skip` columns are context only."""

    inputs: Ids
    targets: Ids
    skip: int = 0
    keep_row: int | None = None
    """Continue from the state of this row alone."""
    fresh: bool = field(default=False)
    scored_rows: int | None = None
    """The first `scored_rows` rows are scored; the others only update their state. None: all."""
    scored: npt.NDArray[np.bool_] | None = None
    """(B, T) which targets are scored; then `skip` and `scored_rows` say nothing. None: all that these leave."""
    counts: bool = True
    """False if the tokens belong to another share; the model runs on them only to be called equally often."""


def pieces(ids: Ids, context: int | None, at_once: int, *, stride: int | None = None) -> Iterator[Piece]:
    """What `score` runs through a model at a time, in the order of the text.

    Args:
        ids: (N + 1,) the start token, then the N tokens.
        context: the model's `context_length`; None: its state is carried from piece to piece, in one row.
        at_once: maximum number of tokens of a piece; a longer window is still whole.
        stride: of a window; default: half the context length.
    """
    if context is None:
        return _carried(ids, 1, max(1, at_once), (0, 1))
    return _sliding(ids, context, min(stride or context // 2, context), max(1, at_once // context))


def score(
    model: LanguageModel,
    ids: Ids,
    *,
    precision: Precision | None = "fp32",
    rows: int = 1,
    warm_up: int = 0,
    stride: int | None = None,
    share: tuple[int, int] = (0, 1),
    marks: npt.NDArray[np.uint8] | None = None,
    unknown_id: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[npt.NDArray[np.float64]], None] | None = None,
    each_rank: Callable[[npt.NDArray[np.float32]], None] | None = None,
    watchers: Sequence[Watcher] = (),
) -> Scores:
    """Score every token of a split, or one share of them.

    Args:
        model: its mode and device stay as they are.
        ids: (N + 1,) the start token, then the N tokens.
        precision: of the matrix products; the loss is float32, its sum float64. None: the caller's setting.
        rows: for a carried state, maximum number of equal parts of the split that run together.
        warm_up: tokens that each row but the first reads before its scored tokens. A row scores at least
            `SCORED_PER_WARM_UP` times as many, so a short split has fewer rows.
        stride: of a window; default: half the context length.
        share: (index from 0, number of shares) of the rows or windows. The sums of all shares add up to those of the
            split. All shares call the model equally often.
        marks: (N + 1,) of conversations; then each is read by itself, and its answers alone are scored. `rows` and
            `warm_up` say nothing.
        unknown_id: the token whose nats are also summed separately.
        progress: called with tokens done and tokens in all.
        each: called with the nats of the tokens just scored, in the order of the text if `rows` is 1.
        each_rank: called with their ranks (`lm.models.target_scores`) in the same order; 0 is the first choice.
        watchers: called with the `Scored` tokens, in the same order.
    """
    count = len(ids) - 1
    device = next(model.parameters(), torch.empty(0)).device
    every_logit = bool(watchers) or marks is not None
    at_once = tokens_at_once(model.vocab_size if every_logit else model.logits_per_target, device)
    context = model.context_length
    if marks is not None:
        learned = int(np.count_nonzero(np.asarray(marks) == ANSWER))
        stride = min(stride or context // 2, context) if context is not None else None
        in_order = _in_turn(_conversations(ids, marks, context, at_once, stride), share)
        rule = f"each conversation by itself; answers only: {learned:,} tokens of {count:,}"
        count = learned
    elif context is None:
        rows = max(1, min(rows, count // (SCORED_PER_WARM_UP * warm_up) if warm_up else count))
        warm_up = warm_up if rows > 1 else 0
        in_order = _carried(ids, rows, max(1, at_once // rows), share, warm_up)
        rule = "state carried over the whole split"
        if rows > 1:
            rule = f"state carried within each of {rows} equal parts of the split"
        if warm_up:
            rule += f", each after the {warm_up} tokens before it"
    else:
        stride = min(stride or context // 2, context)
        in_order = _in_turn(pieces(ids, context, at_once, stride=stride), share)
        rule = f"sliding window of {context} tokens, stride {stride}"
    scores, pending = Scores(rule), _PendingNats(unknown_id, each, each_rank)
    was_training = model.training
    model.eval()
    begun = time.perf_counter()
    try:
        within = contextlib.nullcontext() if precision is None else computing(device, precision)
        with torch.inference_mode(), within:
            state: State | None = None
            for piece in in_order:
                if piece.fresh:
                    state = None
                elif piece.keep_row is not None and state is not None:
                    state = state.select([piece.keep_row])
                inputs, targets = (to_device(part.astype(np.int64), device) for part in (piece.inputs, piece.targets))
                scored: Any = slice(piece.scored_rows), slice(piece.skip, None)
                if piece.scored is not None:
                    # In the order of the text.
                    scored = np.nonzero(piece.scored)
                if every_logit:
                    logits, state = model(inputs, state)
                    flat, flat_targets = logits[scored].reshape(-1, logits.shape[-1]).float(), targets[scored].flatten()
                    found = scores_of(flat, flat_targets)
                else:
                    found, state = model.target_scores(inputs, targets[scored], state)
                if piece.counts:
                    pending.add(found, piece.targets[scored])
                    if watchers:
                        just_scored = Scored(flat, flat_targets, found.nats)
                        for watcher in watchers:
                            watcher(just_scored)
                if device.type == "cpu" or pending.tokens >= MAX_PENDING_TOKENS:
                    pending.move_to(scores)
                if progress is not None:
                    progress(min((scores.tokens + pending.tokens) * share[1], count), count)
            pending.move_to(scores)
    finally:
        model.train(was_training)
    scores.seconds = time.perf_counter() - begun
    return scores


class _PendingNats:
    """Nats and ranks of scored tokens, on the model's device until `move_to`, the one wait for it.

    The nats are float32, because Apple's GPUs have no float64. The host adds them up in float64.
    """

    def __init__(
        self,
        unknown_id: int | None,
        each: Callable[[npt.NDArray[np.float64]], None] | None,
        each_rank: Callable[[npt.NDArray[np.float32]], None] | None,
    ) -> None:
        self._unknown_id, self._each, self._each_rank = unknown_id, each, each_rank
        self._parts: list[Tensor] = []
        self._targets: list[Ids] = []
        self.tokens = 0

    def add(self, found: TargetScores, targets: Ids) -> None:
        """Add the scores of targets, any shape."""
        # One tensor, so that there is one transfer; ranks below 2^24 are exact in float32.
        self._parts.append(torch.stack([found.nats, found.ranks.float()]))
        self._targets.append(targets.reshape(-1))
        self.tokens += targets.size

    def move_to(self, scores: Scores) -> None:
        """Add all tokens to the sums, and forget them."""
        if not self._parts:
            return
        lengths = [len(targets) for targets in self._targets]
        for part, targets in zip(torch.cat(self._parts, dim=1).cpu().split(lengths, dim=1), self._targets, strict=True):
            nats, ranks = part[0].double(), part[1]
            scores.tokens += len(targets)
            scores.nats += float(nats.sum())
            scores.squared_nats += float(nats.square().sum())
            scores.top1 += int((ranks < 1).sum())
            scores.top5 += int((ranks < 5).sum())
            if self._unknown_id is not None:
                scores.unknown_nats += float(nats[torch.from_numpy(targets == self._unknown_id)].sum())
            if self._each is not None:
                self._each(nats.numpy())
            if self._each_rank is not None:
                self._each_rank(ranks.numpy())
        self._parts, self._targets, self.tokens = [], [], 0


def _carried(ids: Ids, rows: int, time: int, share: tuple[int, int], warm_up: int = 0) -> Iterator[Piece]:
    # All rows are equally long: the first row scores its first `warm_up` tokens, the others do not.
    scored = (len(ids) - 1 - warm_up) // rows
    length = warm_up + scored
    first, last = (rows * number // share[1] for number in (share[0], share[0] + 1))
    counts = first < last
    starts = scored * np.arange(first, last if counts else first + 1)
    for begin in range(0, length, time):
        columns = starts[:, None] + np.arange(begin, min(begin + time, length))
        own = Piece(ids[columns], ids[columns + 1], fresh=begin == 0, counts=counts)
        # If the warm-up ends inside a piece, the piece is cut there.
        skipped = min(warm_up - begin, columns.shape[1])
        if skipped <= 0:
            yield own
            continue
        warming = replace(own, inputs=own.inputs[:, :skipped], targets=own.targets[:, :skipped])
        yield replace(warming, scored_rows=1, counts=counts and first == 0)
        if skipped < columns.shape[1]:
            yield replace(own, inputs=own.inputs[:, skipped:], targets=own.targets[:, skipped:], fresh=False)
    if rest := len(ids) - 1 - warm_up - rows * scored:
        # The remaining tokens, fewer than rows, continue the last row, which belongs to the last share.
        counts = share[0] == share[1] - 1
        yield Piece(ids[None, -1 - rest : -1], ids[None, -rest:], keep_row=len(starts) - 1, counts=counts)


def _conversations(
    ids: Ids, marks: npt.NDArray[np.uint8], context: int | None, at_once: int, stride: int | None
) -> Iterator[Piece]:
    """Neighbouring conversations as the rows of a piece; one that is longer than the context slides through it."""
    begins, ends = conversation_bounds(marks)
    held: list[tuple[int, int]] = []

    def together() -> Piece:
        inputs, targets, scored = pad_rows(ids, marks, np.array(held), int(ids[0]))
        return Piece(inputs, targets, fresh=True, scored=scored)

    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        row = begin, end - 1
        longest = max((last - first for first, last in [*held, row]), default=0)
        if held and longest * (len(held) + 1) > at_once:
            yield together()
            held = []
        if context is None or end - 1 - begin <= context:
            held.append(row)
            continue
        if held:
            yield together()
            held = []
        assert stride is not None
        for piece in _sliding(np.arange(begin, end), context, stride, max(1, at_once // context)):
            scored = np.asarray(marks[piece.targets] == ANSWER)
            scored[:, : piece.skip] = False
            yield Piece(ids[piece.inputs], ids[piece.targets], fresh=True, scored=scored)
    if held:
        yield together()


def _in_turn(pieces: Iterator[Piece], share: tuple[int, int]) -> Iterator[Piece]:
    """The pieces of this share; if the last round has none for it, one that does not count."""
    number, shares = share
    while turn := list(islice(pieces, shares)):
        yield turn[number] if number < len(turn) else replace(turn[0], counts=False)


def _sliding(ids: Ids, context: int, stride: int, batch: int) -> Iterator[Piece]:
    count = len(ids) - 1
    first = min(context, count)
    yield Piece(ids[None, :first], ids[None, 1 : first + 1], fresh=True)
    # Window k covers the targets k·stride … k·stride + context - 1; its last `stride` are new.
    whole = max(0, (count - context) // stride)
    skip = context - stride
    offsets = np.arange(context)
    for begin in range(1, whole + 1, batch):
        starts = np.arange(begin, min(begin + batch, whole + 1)) * stride
        window = starts[:, None] + offsets
        yield Piece(ids[window], ids[window + 1], skip=skip, fresh=True)
    done = first + whole * stride
    if rest := count - done:
        start = count - context
        yield Piece(ids[None, start:-1], ids[None, start + 1 :], skip=context - rest, fresh=True)
