"""Batches as pure functions of their number."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from lm.corpora import Counts, TokenSplit
from lm.corpora.batches import Batches, make_batches
from lm.errors import CorpusError

KINDS = ["streams", "rotated", "random", "shuffled"]
START = 200


def split_of(tokens: int, *, name: str = "train") -> TokenSplit:
    """Tokens 0, 1, 2, … behind the start token 200; every token tells its place."""
    ids = np.concatenate([[START], np.arange(tokens)]).astype(np.uint16)
    return TokenSplit(name, ids, Counts(0, 0, 0, 0, 0, tokens, 0), "")


def made(kind: str, tokens: int, batch_size: int, bptt: int, seed: int = 1) -> Batches:
    return make_batches(kind, split_of(tokens), batch_size, bptt, seed)  # type: ignore[arg-type]


# -- streams --------------------------------------------------------------------------------------------


def test_streams_are_the_rows_of_a_small_text_worked_by_hand():
    batches = made("streams", 11, batch_size=2, bptt=2)  # S = 5, one token left out
    assert batches.per_epoch == 3 and batches.tokens_per_batch == 4
    got = [batches.batch(index) for index in range(4)]
    assert [batch.fresh for batch in got] == [True, False, False, True]
    assert [batch.inputs.tolist() for batch in got[:3]] == [[[START, 0], [START, 5]], [[1, 2], [6, 7]], [[3], [8]]]
    assert [batch.targets.tolist() for batch in got[:3]] == [[[0, 1], [5, 6]], [[2, 3], [7, 8]], [[4], [9]]]
    assert got[3].inputs.tolist() == got[0].inputs.tolist()


def test_an_epoch_of_streams_has_every_target_once_but_the_last_few():
    batches = made("streams", 103, batch_size=5, bptt=7)
    targets = np.concatenate([batches.batch(index).targets.ravel() for index in range(batches.per_epoch)])
    assert sorted(targets) == list(range(100))


def test_streams_whose_rows_divide_evenly_end_with_a_full_batch():
    batches = made("streams", 24, batch_size=2, bptt=4)
    assert batches.per_epoch == 3 and batches.batch(2).inputs.shape == (2, 4)


@pytest.mark.parametrize("bptt", [4, 7, 20])
def test_rotated_streams_have_every_target_once_in_each_epoch_and_start_elsewhere(bptt):
    batches, streams = (made(kind, 103, batch_size=5, bptt=bptt) for kind in ("rotated", "streams"))
    first_targets = []
    for epoch in range(4):
        got = [batches.batch(epoch * batches.per_epoch + number) for number in range(batches.per_epoch)]
        assert sorted(np.concatenate([batch.targets.ravel() for batch in got])) == list(range(100))
        assert [batch.fresh for batch in got] == [True] + [False] * (len(got) - 1)
        assert {batch.place for batch in got} == {None}
        rows = np.concatenate([batch.targets for batch in got], axis=1)
        inputs = np.concatenate([batch.inputs for batch in got], axis=1)
        assert inputs[:, 0].tolist() == [START] * 5
        # Each target follows its input, also where a row continues from its end at its beginning.
        assert (inputs[:, 1:] == np.where(rows[:, 1:] == 0, START, rows[:, 1:] - 1)).all()
        assert (np.sort(rows) == np.arange(100).reshape(5, 20)).all()
        first_targets.append(rows[:, 0].tolist())
        if epoch == 0:
            expected = [streams.batch(number).inputs.tolist() for number in range(len(got))]
            assert [batch.inputs.tolist() for batch in got] == expected
    shifts = [[target % 20 for target in targets] for targets in first_targets]
    assert len({tuple(shift) for shift in shifts}) == 4 and len(set(shifts[1])) > 1


# -- windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_a_window_is_consecutive_and_may_begin_with_the_start_token(kind):
    batches = made(kind, 150, batch_size=6, bptt=5)
    for index in range(2 * batches.per_epoch):
        batch = batches.batch(index)
        assert batch.fresh
        assert (np.diff(batch.targets, axis=1) == 1).all()
        assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
        first = batch.inputs[:, 0]
        assert ((first == START) | (first == batch.targets[:, 0] - 1)).all()


def test_random_windows_start_anywhere_from_the_first_token_to_the_last_possible():
    batches = made("random", 20, batch_size=4, bptt=4)
    firsts = Counter(int(first) for index in range(400) for first in batches.batch(index).targets[:, 0])
    assert set(firsts) == set(range(17))
    assert max(firsts.values()) < 2 * min(firsts.values())
    assert batches.per_epoch == 1


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_about_one_row_in_sixteen_begins_with_the_start_token(kind):
    batches = made(kind, 190, batch_size=8, bptt=4)
    replaced = [
        bool(first == START)
        for index in range(500)
        for first, target in zip(batches.batch(index).inputs[:, 0], batches.batch(index).targets[:, 0], strict=True)
        if target != 0  # the text's own first window begins so anyway
    ]
    assert 0.045 < np.mean(replaced) < 0.08


def test_shuffled_windows_come_once_an_epoch_in_an_order_of_the_epochs_own():
    batches = made("shuffled", 103, batch_size=4, bptt=5)  # (103 - 4) // 5 = 19 windows, the last batch has 3
    assert batches.per_epoch == 5
    orders = []
    for epoch in range(6):
        got = [batches.batch(epoch * 5 + number).targets for number in range(5)]
        assert [len(rows) for rows in got] == [4, 4, 4, 4, 3]
        firsts = [int(first) for rows in got for first in rows[:, 0]]
        offset = min(firsts)
        assert 0 <= offset < 5
        assert sorted(firsts) == [offset + 5 * number for number in range(19)]
        orders.append(firsts)
    assert len({min(firsts) for firsts in orders}) > 1
    assert len({tuple(np.array(firsts) - min(firsts)) for firsts in orders}) == 6


def test_a_text_of_one_window_is_shuffled_too():
    batches = made("shuffled", 5, batch_size=1, bptt=5)
    assert batches.per_epoch == 1
    assert batches.batch(3).targets.tolist() == [[0, 1, 2, 3, 4]]


# -- all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_depends_on_its_number_alone(kind):
    batches, others = made(kind, 180, 3, 7), made(kind, 180, 3, 7)
    forward = [batches.batch(index) for index in range(30)]
    for index in reversed(range(30)):
        again = others.batch(index)
        assert (again.inputs == forward[index].inputs).all() and (again.targets == forward[index].targets).all()
        assert again.fresh == forward[index].fresh
        assert again.inputs.dtype == again.targets.dtype == np.int64


@pytest.mark.parametrize("kind", ["random", "shuffled"])
@pytest.mark.parametrize("seeds", [(1, 2), (0, 2**63 - 1)])
def test_another_seed_gives_another_order(kind, seeds):
    first, second = (made(kind, 190, 8, 4, seed=seed) for seed in seeds)
    assert any((first.batch(index).targets != second.batch(index).targets).any() for index in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_may_be_changed_without_changing_the_text(kind):
    batches = made(kind, 60, 3, 5)
    before = batches.batch(0).targets.copy()
    batch = batches.batch(0)
    batch.inputs[:] = batch.targets[:] = 0
    assert (batches.batch(0).targets == before).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_shorter_than_one_batch_says_what_it_has_what_is_needed_and_what_to_set(kind):
    made(kind, 12, 3, 4)  # just enough
    with pytest.raises(CorpusError, match=re.escape("The train split has 11 tokens")) as caught:
        made(kind, 11, 3, 4)
    for part in ("3 rows of 4 tokens", "(12)", "training.batch_size", "training.bptt"):
        assert part in str(caught.value)
