"""The report: what of older ones can still be compared."""

from __future__ import annotations

from typing import Any

import pytest

from lm.corpora import Counts
from lm.evaluation.report import as_measured_now, make_report
from lm.evaluation.score_sums import Scores
from lm.runs.card import figures_of, perplexity

FACTS = {
    "run": "r", "state": "best", "step": 1, "corpus": "c", "split": "valid", "text_sha256": "0",
    "device": "cpu", "precision": "fp32", "version": "0",
}  # fmt: skip
LN2 = 0.6931471805599453


def report_of(spelling_nats: float | None) -> Any:
    """100 bytes in 20 tokens of 1 bit, 4 of them unknown with 2 bits each; the others have 0.75."""
    scores = Scores("all", 20, 20 * LN2, 30 * LN2**2, unknown_nats=8 * LN2)
    return make_report(
        scores, Counts(100, 100, 20, 1, 20, 20, 4, spelling_nats=spelling_nats), spelling="letter by letter", **FACTS
    )


def test_what_the_tokens_do_not_say_is_part_of_bits_per_byte_and_of_no_perplexity() -> None:
    report = report_of(60 * LN2)
    assert (report.token_bits_per_byte, report.bits_per_byte) == (pytest.approx(0.2), pytest.approx(0.8))
    assert report.bits_per_char == pytest.approx(0.8)
    assert (report.perplexity, report.word_perplexity) == (pytest.approx(2), pytest.approx(2))
    # KenLM's excluding OOVs: 12 bits over 16 tokens.
    assert report.perplexity_without_unknown == pytest.approx(2**0.75)
    assert "4 of the tokens are the unknown token" in report.notes[0]
    assert "include a spelling cost of 0.6000 bits per byte: letter by letter" in report.notes[1]


@pytest.mark.parametrize(
    ("spelling_nats", "why"), [(None, "An older Inkling did not measure"), (float("inf"), "were left out")]
)
def test_where_the_tokens_do_not_determine_the_text_there_are_no_bits_per_byte(
    spelling_nats: float | None, why: str
) -> None:
    report = report_of(spelling_nats)
    assert report.bits_per_byte is report.bits_per_char is report.spelling_nats is report.spelling is None
    assert report.token_bits_per_byte == pytest.approx(0.2) and why in report.notes[0]


@pytest.mark.parametrize(("lossless", "unknown", "bits"), [(True, 0, 0.5), (True, 2, None), (False, 0, None)])
def test_an_older_report_is_comparable_where_its_tokens_determined_the_text(
    lossless: bool, unknown: int, bits: float | None
) -> None:
    old = {"run": "r", "split": "valid", "bits_per_byte": 0.5, "bits_per_char": 0.5, "notes": [],
           "unknown_tokens": unknown}  # fmt: skip
    now = as_measured_now(old, lossless=lossless)
    assert (now["bits_per_byte"], now["token_bits_per_byte"]) == (bits, 0.5)
    assert bool(now["notes"]) == (bits is None) and ("lm eval r --split valid" in str(now["notes"])) == (bits is None)
    assert as_measured_now(now, lossless=lossless) == now


def test_a_figure_that_repeats_another_is_not_shown() -> None:
    charged, free = report_of(60 * LN2).model_dump(), report_of(0.0).model_dump()
    assert "token_bits_per_byte" in figures_of([free, charged])
    assert "token_bits_per_byte" not in figures_of([free]) and "bits_per_byte" in figures_of([free])


@pytest.mark.parametrize(
    ("loss", "shown"),
    [(0.0, "1.00"), (2.0, "7.39"), (13.0, "442,413.39"), (60.0, "1.1e26"), (2000.0, "3.9e868"), (float("nan"), "–")],
)
def test_a_huge_perplexity_is_a_power_of_ten_and_not_cut(loss: float, shown: str) -> None:
    assert perplexity(loss) == shown
