"""Compact counts: what is dropped costs little, and the file is a quarter."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from lm.kernels.counts import compact_arrays, owners
from lm.models.count_pruning import _losses, _predictions, _pruned, compacted
from lm.models.kneser_ney import NGramCounts, count_text, histories_of


@pytest.fixture(scope="module")
def code() -> np.ndarray:
    """A megabyte of Python's own modules, as tokens of bytes after a start token."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:1_000_000]
    return np.concatenate([[0], np.frombuffer(text, np.uint8)]).astype(np.int64)


def random_text(count: int = 400, vocab_size: int = 6) -> np.ndarray:
    source = np.random.default_rng(4)
    ids = [0]
    for noise in source.integers(3, size=count):
        ids.append(int(ids[-1] * 2 + noise) % vocab_size)
    return np.array(ids)


def bytes_of(counts: NGramCounts) -> int:
    return sum(array.nbytes for array in counts.arrays().values())


@pytest.mark.slow
@pytest.mark.parametrize("order", [7, 8])
def test_the_file_is_a_quarter_and_another_text_costs_at_most_three_thousandths_of_a_nat_more(
    code: np.ndarray, order: int
) -> None:
    raw = count_text(code[:900_000], order=order, vocab_size=256)
    compact, other = compacted(raw), code[899_999:]
    assert bytes_of(compact) < 0.26 * bytes_of(raw)
    more = (raw.log_probabilities_of(other) - compact.log_probabilities_of(other)).mean()
    assert more < 0.003
    # Rounding alone costs nearly nothing, and no token much.
    rounded = NGramCounts.from_arrays(compact_arrays(raw.levels), order=order, vocab_size=256)
    changes = raw.log_probabilities_of(other) - rounded.log_probabilities_of(other)
    assert abs(changes.mean()) < 1e-3 and np.abs(changes).max() < 0.2


@pytest.mark.parametrize("length", [0, 1, 5, 400])
def test_compact_counts_of_any_text_have_the_same_bits_after_saving(length: int) -> None:
    ids = random_text(length)
    compact = compacted(count_text(ids, order=4, vocab_size=6))
    loaded = NGramCounts.from_arrays(compact.arrays(), order=4, vocab_size=6)
    histories = histories_of(ids[None], 3)[0]
    np.testing.assert_array_equal(loaded.probabilities(histories), compact.probabilities(histories))
    assert all(np.array_equal(array, loaded.arrays()[name]) for name, array in compact.arrays().items())


def test_a_short_text_keeps_nearly_all() -> None:
    raw = count_text(random_text(), order=4, vocab_size=6)
    assert compacted(raw).size > 0.9 * raw.size


def test_the_share_of_a_dropped_pair_backs_off_by_hand() -> None:
    # After 1, 2 follows twice: share 1/2, and 1/2 backs off (see the tests of the counts).
    raw = count_text(np.array([0, 1, 2, 1, 2, 1]), order=2, vocab_size=3)
    marks = [np.ones(len(level.tokens), dtype=bool) for level in raw.levels]
    marks[1][(owners(raw.levels[1]) == 1) & (raw.levels[1].tokens == 2)] = False
    pruned = NGramCounts(_pruned(raw.levels, marks), 3)
    unigrams = pruned.probabilities(np.array([[-1]]))
    assert pruned.probabilities(np.array([[1]])) == pytest.approx(unigrams)
    # Nothing of the context 1 is left, so it is dropped; 0 and 2 stay.
    assert pruned.levels[1].keys.tolist() == [0, 2]
    assert pruned.probabilities(np.array([[2]])) == pytest.approx(raw.probabilities(np.array([[2]])))


def test_contexts_stay_while_longer_ones_need_them() -> None:
    raw = count_text(random_text(), order=4, vocab_size=6)
    marks = [np.ones(len(level.tokens), dtype=bool) for level in raw.levels]
    marks[1][:] = marks[2][:] = False
    pruned = _pruned(raw.levels, marks)
    assert [len(level.keys) for level in pruned] == [len(level.keys) for level in raw.levels]
    assert pruned[2].backoff == pytest.approx(1)


def test_the_loss_of_a_pair_is_the_relative_entropy_without_it() -> None:
    raw = count_text(random_text(), order=2, vocab_size=6)
    level, (losses, predictions) = raw.levels[1], (_losses(raw.levels)[1], _predictions(raw.levels)[1])
    before = raw.probabilities(np.arange(6)[:, None]).astype(np.float64)
    for pair, context in enumerate(owners(level)):
        marks = [np.ones(len(each.tokens), dtype=bool) for each in raw.levels]
        marks[1][pair] = False
        token = level.keys[context]
        after = NGramCounts(_pruned(raw.levels, marks), 6).probabilities(np.array([[token]]))[0]
        exact = (before[token] * np.log(before[token] / after)).sum() * predictions[context]
        # The gain of tokens with other pairs is taken to be linear, so the estimate is a little too low.
        assert 0.7 * exact - 1e-3 < losses[pair] < exact + 1e-3


def test_a_longer_context_that_is_certain_makes_shorter_ones_rarely_needed() -> None:
    # Each token is certain after the two before it; half of the tokens 0 are followed by 1, the others by 2.
    text = np.tile([0, 1, 0, 2], 200)
    levels = count_text(text, order=3, vocab_size=3).levels
    predictions = _predictions(levels)
    assert predictions[2].sum() > 700
    assert predictions[1].sum() < 100
