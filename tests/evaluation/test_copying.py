"""Samples against held-out text: who copies more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import lm
from lm.copies import CopyIndex
from lm.errors import ConfigError
from lm.evaluation.copying import copy_report, passages_like


def sentences(count: int, seed: int) -> str:
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 8))) for _ in range(300)]
    return "".join(" ".join(source.choices(words, k=9)) + ".\n" for _ in range(count))


TRAIN = sentences(300, seed=1)
HELD_OUT = sentences(100, seed=2)


def test_a_model_that_recites_copies_more_than_held_out_text() -> None:
    samples = [TRAIN[start : start + 200] for start in (0, 900, 4000, 7000)]
    report = copy_report(CopyIndex(TRAIN), samples, HELD_OUT, split="valid")
    assert report.copies_more
    assert report.sentence.startswith("The samples copy more than held-out text of the same author does: 100.0%")
    assert (report.samples.longest_run, report.samples.longest_line, report.samples.share_50) == (200, 1, 1.0)
    assert report.samples.longest_text == samples[0]
    assert report.held_out.characters == 800 and report.held_out.share_50 == 0


def test_new_text_copies_no_more_than_held_out_text() -> None:
    new = sentences(40, seed=3)
    report = copy_report(CopyIndex(TRAIN), [new[:300], new[300:600]], HELD_OUT, split="valid")
    assert not report.copies_more
    assert report.sentence == "The samples copy no more than held-out text of the same author does."


def test_one_long_run_in_one_of_many_samples_is_named() -> None:
    new = sentences(60, seed=3)
    samples = [new[start : start + 200] for start in range(0, 1800, 200)] + [TRAIN[500:700]]
    report = copy_report(CopyIndex(TRAIN), samples, HELD_OUT, split="valid")
    assert not report.copies_more and report.samples.longest_run >= 200
    assert "but one verbatim run has 20" in report.sentence


def test_held_out_passages_have_the_lengths_of_the_samples_and_do_not_overlap() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 100)))
    passages = passages_like(["x" * 10, "", "x" * 30], text)
    assert [len(each) for each in passages] == [10, 0, 30]
    assert len(set("".join(passages))) == 40 and "".join(sorted("".join(passages))) == "".join(passages)
    # A text that is too short is used whole.
    assert "".join(passages_like(["x" * 100, "x" * 300], text)) == text
    assert passages_like(["abc"], "") == [""]


def test_samples_without_a_character_are_no_copies() -> None:
    report = copy_report(CopyIndex(TRAIN), ["", ""], HELD_OUT, split="valid")
    assert (report.samples.characters, report.samples.longest_run, report.samples.longest_line) == (0, 0, None)
    assert not report.copies_more


def test_a_run_finds_copies_of_its_training_text(real_data: Path) -> None:
    run = lm.load("shakespeare-gru")
    run.copy_index(data_dir=real_data)
    line = "Before we proceed any further, hear me speak."
    copies = run.copies(f"He said: {line}")
    assert copies.longest.length >= len(line)
    assert run.copy_index().place(copies.longest.source).line == 2
    with pytest.raises(ConfigError, match="at least 2 samples"):
        run.copy_report(samples=1)
