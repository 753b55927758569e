"""A turn next to a busy process, and turns that other programs disturbed."""

import time

from benchmarks import load


def test_a_busy_process_computes_while_the_turn_runs_and_ends_with_it():
    begun = load._used_by_us()
    assert load.with_load(lambda: time.sleep(0.3) or 7.0) == 7.0
    # It computed, and it ended: only an ended child's time is counted.
    assert load._used_by_us() - begun > 0.05


def test_the_turn_that_others_disturbed_least_counts(monkeypatch):
    # CPU seconds of others in each turn: 5, 0.01 of a second's turn.
    used = iter([0.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(load, "_used_by_all", lambda: next(used))
    monkeypatch.setattr(load, "_used_by_us", lambda: 0.0)
    figures = iter([1.0, 2.0, 3.0])
    assert load.undisturbed(lambda: next(figures))[1] == 2.0
