"""The block bootstrap: intervals that hold as often as they say, also where neighbours resemble each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lm.comparison.bootstrap import (
    BLOCK_BYTES,
    Blocks,
    joined_for,
    mean_interval,
    resampled_sums,
    t_quantile,
    text_blocks,
)

TRIALS = 500
Floats = npt.NDArray[np.float64]


def simulated(correlation: float, cells: int, seed: int) -> Floats:
    """(TRIALS, cells) differences with mean 0.05 and deviation 1, each correlated with the cell before it."""
    source = np.random.default_rng(seed)
    noise = source.standard_normal((TRIALS, cells)) * np.sqrt(1 - correlation**2)
    noise[:, 0] /= np.sqrt(1 - correlation**2)
    for cell in range(1, cells):
        noise[:, cell] += correlation * noise[:, cell - 1]
    return 0.05 + noise


# A cell is 100 bytes, so that blocks of ten are those of a text. At 0.9, a cell still shows after 1,000 bytes.
@pytest.mark.parametrize(("correlation", "cells"), [(0.0, 600), (0.5, 1100), (0.9, 1100), (0.9, 3000)])
def test_95_percent_intervals_cover_93_to_97_percent_of_simulated_pairs(correlation: float, cells: int) -> None:
    blocks = Blocks(np.arange(0, cells, 10), cells)
    covered = 0
    for trial, difference in enumerate(simulated(correlation, cells, seed=3)):
        found, _ = mean_interval(difference, blocks, resamples=600, seed=trial)
        assert found is not None
        covered += found.low <= 0.05 <= found.high
    assert 0.93 <= covered / TRIALS <= 0.97


def test_blocks_are_joined_where_neighbours_resemble_each_other() -> None:
    blocks = Blocks(np.arange(0, 3000, 10), 3000)
    alternating, alike = np.tile(np.repeat([1.0, -1.0], 10), 150), simulated(0.97, 3000, seed=5)[0]
    assert len(joined_for(blocks, alternating).starts) == 300
    assert 16 <= len(joined_for(blocks, alike).starts) < 150


def test_blocks_are_whole_lines_of_a_thousand_bytes_or_more() -> None:
    data = ("a line of 24 characters\n" * 5000).encode()
    blocks = text_blocks(data)
    assert all(data[start - 1] == ord("\n") for start in blocks.starts[1:].tolist())
    assert blocks.sizes.min() >= BLOCK_BYTES and blocks.sizes[:-1].max() < BLOCK_BYTES + 24
    assert blocks.sizes.sum() == len(data) and np.bincount(blocks.of_bytes).tolist() == blocks.sizes.tolist()


def test_a_text_without_lines_is_cut_and_a_short_one_has_short_blocks() -> None:
    assert text_blocks(b"x" * 30_000).starts.tolist() == list(range(0, 29_001, 1000))
    assert 15 <= len(text_blocks(b"word and word\n" * 150).starts) <= 20
    assert len(text_blocks(b"x" * 5_000_000).starts) <= 1000


def test_the_same_seed_draws_the_same_blocks_for_every_column() -> None:
    values = np.arange(12.0).reshape(6, 2)
    sums = resampled_sums(values, resamples=50, seed=4)
    assert np.array_equal(sums, resampled_sums(values, resamples=50, seed=4))
    # The second column is the first plus one, in each of six drawn blocks.
    assert np.array_equal(sums[:, 1] - sums[:, 0], np.full(50, 6.0))
    assert not np.array_equal(sums, resampled_sums(values, resamples=50, seed=5))


def test_equal_models_have_an_interval_of_zero_and_a_text_of_few_blocks_has_none() -> None:
    blocks = text_blocks(b"word and word\n" * 2000)
    found, _ = mean_interval(np.zeros(blocks.size), blocks, resamples=100)
    assert found == (0.0, 0.0) and not found.excludes_zero
    short = text_blocks(b"a few words")
    assert mean_interval(np.ones(short.size), short)[0] is None


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (4, 2.776), (5, 2.571), (10, 2.228), (100, 1.984)])
def test_quantiles_of_the_t_distribution_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, abs=0.004)
