"""Tokens → training batches, each a pure function of its index.

Shapes: B rows (batch_size), T tokens a row (bptt), N targets in the split.

To resume, only the index of the next batch is needed: a batch does not depend on the batches made before it. Random
numbers come from Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), a generator with a key
and a counter. The key is the seed and the purpose; the counter's high half is the index of the batch or epoch, its low
half counts the draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from lm.corpora import TokenSplit
from lm.corpora.answers import ANSWER, START
from lm.errors import CorpusError
from lm.tokenizers.base import Ids

if TYPE_CHECKING:
    from torch import Tensor

BatchingKind = Literal["streams", "rotated", "random", "shuffled"]
STREAMS = "streams", "rotated"
"""Kinds of contiguous text, through which a state can be carried."""

START_TOKEN_SHARE = 1 / 16
"""Share of windows whose first input is the start token, so that the model learns it as a context."""

SAME_LENGTH = 1.25
"""Conversations in one batch: the longest is at most this many times as long as the shortest."""

_WINDOWS, _ORDER, _STARTS, _ROTATION = 0, 1, 2, 3


@dataclass(frozen=True)
class Batch:
    """Inputs and the tokens that follow them."""

    inputs: npt.NDArray[np.int64]
    """(B, T)"""
    targets: npt.NDArray[np.int64]
    """(B, T): targets[b, t] follows inputs[b, t]."""
    fresh: bool
    """Whether to reset the carried state before this batch."""
    weight: float = 1.0
    """Of a share of a batch: its number of rows, divided by that of an average share."""
    pinned: Mapping[str, Tensor] | None = None
    """Copies for a GPU: "inputs", "targets" and the model's host inputs, in pinned memory."""
    place: int | None = None
    """Number of the batch in its epoch, from 0, where all epochs have the same batches; None: they differ."""
    learned: npt.NDArray[np.int64] | None = None
    """(P,) places of the targets that count, in the flat (B · T,) targets; None: all."""


class Batches(ABC):
    """All batches of a split, or one share of each."""

    per_epoch: int
    """Batches in one pass over the split."""
    tokens_per_batch: int
    """Targets in a full batch; the last batch of an epoch may have fewer."""

    def __init__(
        self, split: TokenSplit, batch_size: int, bptt: int, seed: int, *, share: tuple[int, int] = (0, 1)
    ) -> None:
        self._ids = split.ids
        self._seed, self._share = seed, share
        self._start_id = int(split.ids[0])
        self._targets = len(split.ids) - 1
        self._batch_size, self._bptt = batch_size, bptt
        self.tokens_per_batch = batch_size * bptt
        if self._targets < self.tokens_per_batch:
            rows, length = min(batch_size, 8), min(bptt, 16)
            if rows * length > self._targets:
                rows, length = 1, min(length, self._targets)
            raise CorpusError(
                f"The {split.name} split has {self._targets:,} tokens, fewer than one batch of {batch_size} rows of "
                f"{bptt} tokens needs ({self.tokens_per_batch:,}). Give a longer text, or lower the batch: "
                f"--set training.batch_size={rows} --set training.bptt={length}"
            )

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """The batch at `index`, from 0; epochs follow one another without end. Any thread may call it.

        Each share has its own rows of the same batch, in order. If there are more shares than rows, a share without
        rows gets one row of weight 0.
        """

    def _own(self, rows: int) -> tuple[slice, float]:
        """The rows of a batch that belong to this share, and their weight."""
        number, shares = self._share
        begin, end = rows * number // shares, rows * (number + 1) // shares
        if begin == end:
            return slice(0, 1), 0.0
        return slice(begin, end), (end - begin) * shares / rows

    def _windows(self, starts: npt.NDArray[np.int64], draws: np.random.Generator) -> Batch:
        """The windows of T + 1 tokens from `starts`; some begin with the start token."""
        rows, weight = self._own(len(starts))
        windows = take(self._ids, starts[rows], self._bptt + 1)
        inputs, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
        inputs[(draws.random(len(starts)) < START_TOKEN_SHARE)[rows], 0] = self._start_id
        return Batch(inputs, targets, True, weight)


class StreamBatches(Batches):
    """Contiguous streams for carried state (truncated back-propagation through time).

    The N targets are cut into B rows of S = N // B; batch k of an epoch holds columns k·T to (k+1)·T of every row, and
    the last batch is shorter. At an epoch's first batch the state is reset and each row begins with the start token.
    The N - B·S tokens at the end, fewer than B, are left out.
    """

    repeats = True
    """Whether all epochs have the same batches."""

    def __init__(
        self, split: TokenSplit, batch_size: int, bptt: int, seed: int, *, share: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__(split, batch_size, bptt, seed, share=share)
        self._length = self._targets // batch_size
        self.per_epoch = -(-self._length // bptt)

    def batch(self, index: int) -> Batch:
        """See `Batches.batch`."""
        epoch, number = divmod(index, self.per_epoch)
        begin = number * self._bptt
        rows, weight = self._own(self._batch_size)
        inputs, targets = self._read(epoch, rows, begin, min(self._bptt, self._length - begin))
        if number == 0:
            inputs[:, 0] = self._start_id
        return Batch(inputs, targets, number == 0, weight, place=number if self.repeats else None)

    def _read(
        self, epoch: int, rows: slice, begin: int, length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets (R, length) of these rows, from column `begin` of the epoch on."""
        starts = begin + self._length * np.arange(self._batch_size)[rows]
        windows = take(self._ids, starts, length + 1)
        return windows[:, :-1].copy(), windows[:, 1:].copy()


class RotatedStreams(StreamBatches):
    """Streams whose rows begin at other tokens in each epoch; the first epoch is that of `StreamBatches`.

    A row is a ring: its first token follows its last one, and each target comes once an epoch. So windows have other
    ends, and a batch other combinations of tokens, in each epoch.

    Source: Press 2019, "Partially shuffling the training data to improve language models".
    """

    repeats = False

    def _read(
        self, epoch: int, rows: slice, begin: int, length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `StreamBatches._read`."""
        if epoch == 0:
            return super()._read(epoch, rows, begin, length)
        shifts = _generator(self._seed, _ROTATION, epoch).integers(0, self._length, size=self._batch_size)
        first = (begin + shifts[rows]) % self._length
        starts = self._length * np.arange(self._batch_size)[rows]
        before_end = np.minimum(length, self._length - first)
        inputs, targets = np.empty((2, len(starts), length), np.int64)
        for row, (start, at, part) in enumerate(zip(starts.tolist(), first.tolist(), before_end.tolist(), strict=True)):
            for offset, places in ((start + at, slice(0, part)), (start, slice(part, length))):
                tokens = self._ids[offset : offset + places.stop - places.start + 1]
                inputs[row, places], targets[row, places] = tokens[:-1], tokens[1:]
        return inputs, targets


class RandomWindows(Batches):
    """Windows that start anywhere, drawn for every batch, with replacement."""

    def __init__(
        self, split: TokenSplit, batch_size: int, bptt: int, seed: int, *, share: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__(split, batch_size, bptt, seed, share=share)
        self.per_epoch = max(1, self._targets // self.tokens_per_batch)

    def batch(self, index: int) -> Batch:
        """See `Batches.batch`."""
        draws = _generator(self._seed, _WINDOWS, index)
        starts = draws.integers(0, self._targets - self._bptt + 1, size=self._batch_size)
        return self._windows(starts, _generator(self._seed, _STARTS, index))


class ShuffledWindows(Batches):
    """Every window once an epoch, in a random order.

    The windows follow one another from a random offset of 0 to T - 1, so that they begin at other tokens in each
    epoch; the up to 2·T - 2 tokens outside them are left out. The last batch of an epoch may have fewer rows.
    """

    def __init__(
        self, split: TokenSplit, batch_size: int, bptt: int, seed: int, *, share: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__(split, batch_size, bptt, seed, share=share)
        self._count = max(1, (self._targets - bptt + 1) // bptt)
        self._offsets = min(bptt, self._targets - self._count * bptt + 1)
        self.per_epoch = -(-self._count // batch_size)
        self._shuffled: tuple[int, int, npt.NDArray[np.int64]] | None = None

    def batch(self, index: int) -> Batch:
        """See `Batches.batch`."""
        epoch, number = divmod(index, self.per_epoch)
        # Read and replaced as a whole, because several threads may ask for batches.
        shuffled = self._shuffled
        if shuffled is None or shuffled[0] != epoch:
            draws = _generator(self._seed, _ORDER, epoch)
            offset = int(draws.integers(0, self._offsets))
            self._shuffled = shuffled = epoch, offset, draws.permutation(self._count)
        _, offset, order = shuffled
        windows = order[number * self._batch_size : (number + 1) * self._batch_size]
        starts = offset + windows * self._bptt
        return self._windows(starts, _generator(self._seed, _STARTS, index))


class ConversationBatches(Batches):
    """Conversations, one in each row, so that no conversation is context of another one.

    Only answers are targets that count. All rows of a batch are as long as its longest conversation; those of about the
    same length share a batch. A batch has about `batch_size` · `bptt` tokens: many short rows, or few long ones.
    A conversation longer than `longest` tokens is cut there; the parts without answers are left out. The order and
    who shares a batch are new in each epoch; the number of batches is the same.

    Args:
        split: with marks.
        batch_size, bptt, seed, share: as for `Batches`.
        longest: tokens of a row at most; None: the tokens of a batch.
    """

    def __init__(
        self,
        split: TokenSplit,
        batch_size: int,
        bptt: int,
        seed: int,
        *,
        share: tuple[int, int] = (0, 1),
        longest: int | None = None,
    ) -> None:
        assert split.marks is not None
        self._ids, self._marks = split.ids, split.marks
        self._seed, self._share = seed, share
        self._start_id = int(split.ids[0])
        self.tokens_per_batch = batch_size * bptt
        begins, ends = conversation_bounds(split.marks)
        size = min(longest or self.tokens_per_batch, self.tokens_per_batch)
        rows = [
            (first, min(first + size, end - 1))
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
            for first in range(begin, end - 1, size)
        ]
        # Row r reads the tokens first … last - 1 and predicts first + 1 … last.
        answers = np.concatenate([[0], np.cumsum(split.marks == ANSWER)])
        self._rows = np.array([row for row in rows if answers[row[1] + 1] > answers[row[0] + 1]], np.int64)
        self._groups = _of_like_length(self._rows[:, 1] - self._rows[:, 0], self.tokens_per_batch)
        self.per_epoch = sum(-(-len(members) // count) for members, count in self._groups)
        self._order: tuple[int, list[npt.NDArray[np.int64]]] | None = None

    def batch(self, index: int) -> Batch:
        """See `Batches.batch`."""
        epoch, number = divmod(index, self.per_epoch)
        # Read and replaced as a whole, because several threads may ask for batches.
        order = self._order
        if order is None or order[0] != epoch:
            self._order = order = epoch, self._epoch(epoch)
        rows = self._rows[order[1][number]]
        inputs, targets, learned = pad_rows(self._ids, self._marks, rows, self._start_id)
        own, weight = self._own(len(rows))
        counted = learned[own]
        if weight:
            # The loss of a share is the mean over its own answers.
            weight = int(counted.sum()) * self._share[1] / int(learned.sum())
        if not counted.any():
            counted = counted.copy()
            counted[0, 0] = True
        return Batch(inputs[own], targets[own], True, weight, learned=np.flatnonzero(counted))

    def _epoch(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The rows of each batch of an epoch, in order."""
        draws = _generator(self._seed, _ORDER, epoch)
        batches = []
        for members, count in self._groups:
            mixed = draws.permutation(members)
            batches += [mixed[begin : begin + count] for begin in range(0, len(mixed), count)]
        return [batches[number] for number in draws.permutation(len(batches))]


def conversation_bounds(marks: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first token of each conversation, and the end of each, (C,) both."""
    begins = np.flatnonzero(np.asarray(marks) == START)
    return begins, np.append(begins[1:], len(marks))


def pad_rows(
    ids: Ids, marks: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], padding: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Rows of tokens as inputs, targets, and whether a target is part of an answer, each (R, longest).

    Args:
        ids: (N,) tokens.
        marks: (N,)
        rows: (R, 2): a row reads the tokens first … last - 1, and predicts first + 1 … last.
        padding: the token after the end of a row; it does not count.
    """
    shape = len(rows), int((rows[:, 1] - rows[:, 0]).max())
    inputs, targets = np.full(shape, padding, np.int64), np.full(shape, padding, np.int64)
    learned = np.zeros(shape, np.bool_)
    for number, (first, last) in enumerate(rows.tolist()):
        inputs[number, : last - first] = ids[first:last]
        targets[number, : last - first] = ids[first + 1 : last + 1]
        learned[number, : last - first] = marks[first + 1 : last + 1] == ANSWER
    return inputs, targets, learned


def _of_like_length(lengths: npt.NDArray[np.int64], tokens: int) -> list[tuple[npt.NDArray[np.int64], int]]:
    """Groups of rows of about the same length, and the rows of a batch of each group.

    Args:
        lengths: (R,) of the rows.
        tokens: of a batch.
    """
    order = np.argsort(lengths, kind="stable")
    groups: list[tuple[npt.NDArray[np.int64], int]] = []
    begin = 0
    while begin < len(order):
        # A row is at most a quarter longer than the shortest of its group, but a group fills at least a batch.
        end = int(np.searchsorted(lengths[order], lengths[order[begin]] * SAME_LENGTH, side="right"))
        while end < len(order) and (end - begin) * lengths[order[end - 1]] < tokens:
            end += 1
        if (len(order) - end) * lengths[order[-1]] < tokens / 2:
            end = len(order)
        groups.append((order[begin:end], max(1, tokens // int(lengths[order[end - 1]]))))
        begin = end
    return groups


_KINDS: dict[BatchingKind, type[Batches]] = {
    "streams": StreamBatches, "rotated": RotatedStreams, "random": RandomWindows, "shuffled": ShuffledWindows,
}  # fmt: skip


def make_batches(
    kind: BatchingKind,
    split: TokenSplit,
    batch_size: int,
    bptt: int,
    seed: int,
    *,
    share: tuple[int, int] = (0, 1),
    longest: int | None = None,
) -> Batches:
    """The batches of a split, or one `share` of each: (index from 0, number of shares).

    Conversations have batches of their own kind; `longest` is for them.

    Raises:
        CorpusError: the split is shorter than one batch.
    """
    if split.marks is not None:
        return ConversationBatches(split, batch_size, bptt, seed, share=share, longest=longest)
    return _KINDS[kind](split, batch_size, bptt, seed, share=share)


def take(ids: Ids, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """The tokens (R, length) from each start; only these are read from the memory-mapped files."""
    if isinstance(ids, np.ndarray):
        found: Ids = ids[starts[:, None] + np.arange(length)]
    else:
        found = np.stack([ids[start : start + length] for start in starts.tolist()])
    return found.astype(np.int64)


def _generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed | purpose << 64, counter=index << 128))
