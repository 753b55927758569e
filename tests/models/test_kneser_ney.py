"""Smoothed n-gram counts, against values by hand and an independent computation."""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lm.models.kneser_ney as counts_module
from lm.kernels.compiled import native
from lm.kernels.counts import discounts_of
from lm.models.kneser_ney import NGramCounts, count_text, histories_of

# Start token 0, then 1 2 1 2 1. Pairs: 0 1 once, 1 2 twice, 2 1 twice.
TINY = np.array([0, 1, 2, 1, 2, 1])
DISCOUNTS = np.array([0, 0.6, 1.1, 1.4])
"""For tests that do not test the discounts."""


@pytest.fixture(params=["native", "numpy"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on the native module and on numpy."""
    monkeypatch.setenv("INKLING_NATIVE", str(int(request.param == "native")))
    assert (native() is not None) == (request.param == "native")
    return str(request.param)


def tokens(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """A text in which each token depends on the one before it."""
    rng = np.random.default_rng(seed)
    ids = [0]
    for _ in range(count):
        ids.append(
            int((ids[-1] * 2 + rng.integers(3)) % vocab_size) if rng.random() < 0.8 else rng.integers(vocab_size)
        )
    return np.array(ids)


def compacted(counts: NGramCounts) -> NGramCounts:
    return NGramCounts.from_arrays(counts.compact_arrays(), order=counts.context_size + 1, vocab_size=counts.vocab_size)


def kneser_ney(ids: np.ndarray, order: int, vocab_size: int, history: tuple[int, ...], token: int) -> float:
    """P(token | history) by the formulas of Chen and Goodman, from dictionaries."""
    text = [None, *ids.tolist()]  # None: the start of the text, before the first n-grams

    def level(length: int) -> Counter[tuple[int, ...]]:
        # n-grams of `length` + 1 tokens that end in a target, that is not in the start token
        grams = [(i, tuple(ids[i - length : i + 1].tolist())) for i in range(max(1, length), len(ids))]
        if length == order - 1:
            return Counter(gram for _, gram in grams)
        before = defaultdict(set)
        for i, gram in grams:
            before[gram].add(text[i - length])
        return Counter({gram: len(left) for gram, left in before.items()})

    probability = 1 / vocab_size
    for length in range(order):
        found = level(length)
        context = history[len(history) - length :] if length else ()
        if len(context) < length or not any(gram[:-1] == context for gram in found):
            break
        here = {gram[-1]: count for gram, count in found.items() if gram[:-1] == context}
        total = sum(here.values())
        mass = sum(DISCOUNTS[min(count, 3)] for count in here.values()) / total
        own = here.get(token, 0)
        probability = (own - DISCOUNTS[min(own, 3)]) / total + mass * probability
    return probability


def test_probabilities_of_a_tiny_text_by_hand() -> None:
    counts = count_text(TINY, order=2, vocab_size=3)
    # Too short to estimate discounts: 0.5, 1, 1.5. Empty context: 1 follows two different tokens, 2 one, 3 in all;
    # 1.5 of 3 backs off to the uniform distribution.
    unigram = [1 / 6, 1 / 3 + 1 / 6, 1 / 6 + 1 / 6]
    after_1 = [unigram[0] / 2, unigram[1] / 2, 1 / 2 + unigram[2] / 2]
    found = counts.probabilities(np.array([[-1], [1]]))
    assert found == pytest.approx(np.array([unigram, after_1]), rel=1e-6)


def test_discounts_are_estimated_from_the_numbers_of_small_counts() -> None:
    # 4 pairs with count 1, 2 with 2, 1 with 3, 1 with 4: Y = 4 / (4 + 2 · 2) = 1/2.
    counts = np.array([1, 1, 1, 1, 2, 2, 3, 4])
    # 1 - 2Y · 2/4, 2 - 3Y · 1/2, 3 - 4Y · 1/1
    assert discounts_of(counts) == pytest.approx([0, 0.5, 1.25, 1.0])
    # More counts of 4 than of 3 would make the last one negative: 1.5 instead.
    assert discounts_of(np.append(counts, [4, 4])) == pytest.approx([0, 0.5, 1.25, 1.5])


def test_an_unknown_context_backs_off_to_the_shorter_one() -> None:
    counts = count_text(tokens(200, 5)[:-1], order=4, vocab_size=6)
    known, unknown = counts.probabilities(np.array([[-1, -1, 2], [5, 5, 2]]))
    assert np.array_equal(known, unknown)


def test_leave_one_out_by_hand() -> None:
    counts = count_text(TINY, order=2, vocab_size=3)
    twice, once = counts.probabilities(np.array([[1], [0]]), np.array([2, 1]))
    # The count of 1 2 falls from 2 to 1: half is its share, half backs off; the unigrams do not change.
    assert twice == pytest.approx([1 / 12, 1 / 4, 1 / 2 + 1 / 6], rel=1e-6)
    # 0 1 has no occurrence left, nor has the context 0; only one different token is left before 1.
    assert once == pytest.approx([1 / 6, 1 / 4 + 1 / 6, 1 / 4 + 1 / 6], rel=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_textbook(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.kernels.counts.discounts_of", lambda counts: DISCOUNTS)
    ids = tokens(600, 7)
    counts = count_text(ids, order=order, vocab_size=7)
    histories = histories_of(ids[None], order - 1)[0][[0, 1, 2, 50, 333]]
    expected = [
        [kneser_ney(ids, order, 7, tuple(token for token in row.tolist() if token >= 0), token) for token in range(7)]
        for row in histories
    ]
    assert counts.probabilities(histories) == pytest.approx(np.array(expected), rel=1e-5)


@pytest.mark.parametrize("vocab_size", [7, 1000])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 40, 3000])
def test_every_distribution_sums_to_one_and_has_no_zero(length: int, vocab_size: int) -> None:
    ids = tokens(length, vocab_size, seed=length)
    counts = count_text(ids, order=5, vocab_size=vocab_size)
    histories = histories_of(np.concatenate([ids, tokens(30, vocab_size, seed=9)])[None], 4)[0][-60:]
    for found in (
        counts.probabilities(histories),
        compacted(counts).probabilities(histories),
        counts.probabilities(histories[:-1], np.append(ids, tokens(30, vocab_size, seed=9))[-len(histories) + 1 :]),
    ):
        assert np.abs(found.sum(axis=1, dtype=np.float64) - 1).max() < 1e-6
        assert found.min() > 0


def test_cached_distributions_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKLING_NATIVE", "0")
    ids = tokens(2000, 9)
    histories = histories_of(ids[None], 4)[0][:-1]
    kept = count_text(ids, order=5, vocab_size=9)
    assert len(kept._cached[1]) == 5
    monkeypatch.setattr(counts_module, "DENSE_VALUES", 0)
    mixed = count_text(ids, order=5, vocab_size=9)
    assert len(mixed._cached[1]) == 1
    assert mixed.probabilities(histories) == pytest.approx(kept.probabilities(histories), rel=1e-5)
    assert mixed.probabilities(histories, ids[1:]) == pytest.approx(kept.probabilities(histories, ids[1:]), rel=1e-4)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    ids = tokens(2000, 9)
    counts = count_text(ids, order=5, vocab_size=9)
    histories = histories_of(ids[None], 4)[0]
    together = counts.probabilities(histories)
    assert np.array_equal(counts.probabilities(histories[700:701])[0], together[700])


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [9, 70_000])
@pytest.mark.parametrize("order", [1, 2, 7])
def test_native_distributions_are_those_of_numpy_with_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, path: str, order: int, vocab_size: int
) -> None:
    if path == "numpy":
        return
    ids = tokens(400 if vocab_size > 9 else 6000, vocab_size)
    other = np.append(ids[:30], tokens(10, vocab_size, seed=5)) if vocab_size > 9 else ids[:300]
    found = {}
    for name, threads in (("0", 1), ("1", 1), ("1", 3)):
        monkeypatch.setenv("INKLING_NATIVE", name)
        counts = count_text(ids, order=order, vocab_size=vocab_size)
        # The start of the text, its own contexts, and unknown ones.
        histories = histories_of(other[None], order - 1)[0]
        found[name, threads] = (
            counts.probabilities(histories, threads=threads),
            counts.probabilities(histories[:-1], other[1:], threads=threads),
            counts.log_probabilities_of(other),
        )
    for reference, ours, theirs in zip(*found.values(), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=2e-6, atol=5e-8)
        np.testing.assert_array_equal(ours, theirs)


def test_tokens_and_histories_of_another_vocabulary_are_refused() -> None:
    counts = count_text(TINY, order=2, vocab_size=3)
    if counts._compiled is None:
        return
    with pytest.raises(IndexError, match="outside the counts' vocabulary"):
        counts.probabilities(np.array([[1]]), np.array([3]))
    with pytest.raises(IndexError, match="outside the counts' vocabulary"):
        counts.log_probabilities_of(np.array([0, 3]))
    with pytest.raises(ValueError, match="do not fit the counts"):
        counts.probabilities(np.array([[1, 1]]))


def test_log_probabilities_of_tokens_equal_those_of_whole_distributions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = count_text(tokens(2000, 9), order=4, vocab_size=9)
    other = tokens(500, 9, seed=3)
    found = counts.probabilities(histories_of(other[None], 3)[0][:-1])
    expected = np.log(found[np.arange(500), other[1:]])
    assert counts.log_probabilities_of(other) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(counts_module, "CHUNK_VALUES", 7)
    assert counts.log_probabilities_of(other) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cut", [30, 100, 399, 400])
def test_leave_one_out_of_the_last_token_equals_counts_of_the_text_without_it(
    monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    # The last token of a text is in no context, so the text without it is the text cut short. The discounts are
    # those with the token.
    monkeypatch.setattr("lm.kernels.counts.discounts_of", lambda counts: DISCOUNTS)
    ids = tokens(cut, 6, seed=cut)
    whole, without = (count_text(part, order=4, vocab_size=6) for part in (ids, ids[:-1]))
    history = histories_of(ids[None], 3)[0][-2:-1]
    found = whole.probabilities(history, ids[-1:])
    assert found == pytest.approx(without.probabilities(history), rel=1e-5)
    assert found[0, ids[-1]] < whole.probabilities(history)[0, ids[-1]]


def test_leaving_out_a_token_that_is_not_in_the_text_changes_nothing() -> None:
    counts = count_text(TINY, order=2, vocab_size=4)
    history = np.array([[1]])
    assert counts.probabilities(history, np.array([3])) == pytest.approx(counts.probabilities(history), rel=1e-6)


def test_a_text_of_one_kind_of_token_is_nearly_certain() -> None:
    counts = count_text(np.zeros(500, dtype=np.uint8), order=3, vocab_size=2)
    assert counts.probabilities(np.array([[0, 0]]))[0, 0] > 0.99
    assert math.isfinite(counts.log_probabilities_of(np.ones(5)).sum())


def test_memory_grows_with_the_text_and_not_with_the_vocabulary() -> None:
    ids = np.random.default_rng(0).integers(30_000, size=5001)
    counts = count_text(ids, order=4, vocab_size=30_000)
    # At most one pair for each token and level.
    assert counts.size <= 4 * 5000
    assert sum(array.nbytes for array in counts.arrays().values()) < 1_000_000


def test_counts_are_saved_and_loaded() -> None:
    ids = tokens(300, 7)
    counts = count_text(ids, order=3, vocab_size=7)
    loaded = NGramCounts.from_arrays(counts.arrays(), order=3, vocab_size=7)
    histories = histories_of(ids[None], 2)[0]
    assert np.array_equal(loaded.probabilities(histories), counts.probabilities(histories))
    assert loaded.size == counts.size == sum(len(level.tokens) for level in counts.levels)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("counts.0", lambda array: array[:-1], r"counts.0 is \(6,\) in the file, \(7,\) in the model"),
        ("keys.2", lambda array: array[::-1], "do not fit together"),
        ("tokens.1", lambda array: array + 7, "do not fit together"),
        ("starts.1", lambda array: array[:-1], "do not fit together"),
        ("counts.2", lambda array: array * 0, "do not fit together"),
        ("keys.1", lambda array: array + 100, "do not fit together"),
    ],
)
def test_inconsistent_arrays_are_refused(name: str, change: object, message: str) -> None:
    arrays = count_text(tokens(300, 7), order=3, vocab_size=7).arrays()
    arrays[name] = change(arrays[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        NGramCounts.from_arrays(arrays, order=3, vocab_size=7)


@pytest.mark.slow
@pytest.mark.parametrize("order", [7, 8])
def test_the_compact_file_is_a_fifth_and_another_text_costs_a_thousandth_of_a_nat_more_at_most(
    order: int, path: str
) -> None:
    if path == "numpy":
        return
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files)[:600_000], np.uint8)
    raw = count_text(text[:500_000], order=order, vocab_size=256)
    compact, other = compacted(raw), text[499_999:]
    raw_bytes, compact_bytes = (sum(array.nbytes for array in each.arrays().values()) for each in (raw, compact))
    assert compact_bytes < 0.2 * raw_bytes
    more = raw.log_probabilities_of(other) - compact.log_probabilities_of(other)
    assert abs(more.mean()) < 1e-3
    assert np.abs(more).max() < 0.2
    # That is a wrong rounding nowhere, and not one that is made good elsewhere.
    assert np.abs(more).mean() < 0.02


@pytest.mark.parametrize("bound", [50, 10_000, 1 << 61])
def test_distinct_values_and_places_are_those_of_numpy(bound: int) -> None:
    values = np.random.default_rng(2).integers(min(bound, 300), size=200) * (bound // 300 or 1)
    for found, expected in zip(
        counts_module._distinct(values, bound), np.unique(values, return_inverse=True), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_counts_without_their_arrays_give_the_same_distributions() -> None:
    ids = tokens(300, 7)
    counts, freed = (count_text(ids, order=3, vocab_size=7) for _ in range(2))
    freed.free_arrays()
    histories = histories_of(ids[None], 2)[0][:-1]
    assert np.array_equal(freed.probabilities(histories, ids[1:]), counts.probabilities(histories, ids[1:]))
    assert freed.size == counts.size
    compact = compacted(counts)
    compact.free_arrays()
    assert np.array_equal(compact.probabilities(histories), compacted(counts).probabilities(histories))
    assert len(compact.levels) == 3


@pytest.mark.parametrize("length", [0, 1, 5, 400])
def test_compact_counts_of_any_text_have_the_same_bits_after_saving(length: int) -> None:
    ids = tokens(length, 6)
    compact = compacted(count_text(ids, order=4, vocab_size=6))
    loaded = NGramCounts.from_arrays(compact.arrays(), order=4, vocab_size=6)
    histories = histories_of(ids[None], 3)[0]
    assert np.array_equal(loaded.probabilities(histories), compact.probabilities(histories))
    assert np.array_equal(loaded.arrays()["packed"], compact.arrays()["packed"])
    assert not loaded.can_leave_out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unigrams", lambda array: array[:-1], r"unigrams is \(6,\) in the file, \(7,\) in the model"),
        ("unigrams", lambda array: array * np.nan, "no probabilities"),
        ("contexts.2", lambda array: array[::-1], "do not fit together"),
        ("contexts.1", lambda array: array + np.uint8(7), "do not fit together"),
        ("children.2", lambda array: array[:-1], "do not fit together"),
        ("children.1", lambda array: array + np.uint8(1), "do not fit together"),
        ("sizes.2", lambda array: array * np.uint8(2), "do not fit together"),
        ("backoffs.1", lambda array: array[:-1], "do not fit together"),
        ("tokens.1", lambda array: array + np.uint8(7), "do not fit together"),
        ("tokens.2", lambda array: array[::-1], "do not fit together"),
        ("shares.2", lambda array: array.astype(np.float32), "do not fit together"),
    ],
)
def test_inconsistent_compact_arrays_are_refused(name: str, change: object, message: str) -> None:
    packed = count_text(tokens(300, 7), order=3, vocab_size=7).compact_arrays()["packed"]
    arrays = safetensors.numpy.load(zlib.decompress(packed.tobytes()))
    arrays[name] = np.ascontiguousarray(change(arrays[name]))  # type: ignore[operator]
    changed = np.frombuffer(zlib.compress(safetensors.numpy.save(arrays)), np.uint8)
    with pytest.raises(ValueError, match=message):
        NGramCounts.from_arrays({"packed": changed}, order=3, vocab_size=7)


@pytest.mark.parametrize("content", [b"", b"x", zlib.compress(b"x"), zlib.compress(bytes(5_000_000))])
def test_a_packed_array_of_anything_else_is_refused(content: bytes) -> None:
    packed = np.frombuffer(content, np.uint8)
    with pytest.raises(ValueError, match="does not hold counts"):
        NGramCounts.from_arrays({"packed": packed}, order=3, vocab_size=7)


def test_counts_of_another_order_are_refused_by_name() -> None:
    arrays = count_text(TINY, order=2, vocab_size=3).arrays()
    with pytest.raises(ValueError, match=r"counts and model differ in counts\.2"):
        NGramCounts.from_arrays(arrays, order=3, vocab_size=3)
