"""Bands across seeds: the mean of runs, and their spread, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lm.errors import ConfigError
from lm.runs.curves import Band, Curve, curves, draw, sketch, with_bands
from lm.runs.run_folder import RunFolder

ONE = Curve("a-s1", "valid", [0.0, 2.0], [0.0, 4.0])
TWO = Curve("a-s2", "valid", [1.0, 2.0, 3.0], [1.0, 3.0, 9.0])
OTHER = Curve("b", "valid", [1.0], [5.0])
GROUPS = {"a-s1": "a", "a-s2": "a", "b": "b"}


def test_a_band_is_of_the_places_where_all_runs_have_values() -> None:
    # At 1 and 2 the first has 2 and 4, by a line from 0 to 4; the second has 1 and 3.
    assert with_bands([ONE, OTHER, TWO], GROUPS, "min-max") == [
        Curve("a", "valid", [1.0, 2.0], [1.5, 3.5], Band("min-max", ("a-s1", "a-s2"), [1.0, 3.0], [2.0, 4.0])),
        OTHER,
    ]


def test_a_run_alone_has_the_name_of_its_group_and_no_band() -> None:
    assert with_bands([OTHER], {"b": "another"}, "std") == [Curve("another", "valid", [1.0], [5.0])]


def test_the_standard_deviation_is_that_of_a_sample() -> None:
    curve = with_bands([ONE, TWO], GROUPS, "std")[0]
    assert curve.band is not None
    # Two figures 1 apart: 0.5 on each side of the mean, divided by sqrt(2 - 1), squared, added, and the root.
    assert curve.band.low == pytest.approx([1.5 - math.sqrt(0.5), 3.5 - math.sqrt(0.5)])
    assert curve.band.high == pytest.approx([1.5 + math.sqrt(0.5), 3.5 + math.sqrt(0.5)])


def test_curves_of_different_splits_are_different_bands() -> None:
    drawn = [ONE, TWO, Curve("a-s1", "train", [1.0], [7.0]), Curve("a-s2", "train", [1.0], [9.0])]
    assert [(curve.split, curve.y) for curve in with_bands(drawn, GROUPS, "min-max")] == [
        ("valid", [1.5, 3.5]), ("train", [8.0]),
    ]  # fmt: skip


def test_an_unknown_kind_of_band_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="--bands 'max': use min-max or std"):
        with_bands([ONE], GROUPS, "max")


@pytest.mark.parametrize(
    ("kind", "words"), [("min-max", "band: lowest to highest of the seeds"), ("std", "± standard deviation")]
)
def test_the_legend_says_what_the_band_is(tmp_path: Path, kind: str, words: str) -> None:
    drawn = with_bands([ONE, TWO], GROUPS, kind)
    draw(drawn, tmp_path / "x.svg", metric="loss", by="step")
    assert words in (picture := (tmp_path / "x.svg").read_text()) and "a valid: mean" in picture
    lines = sketch(drawn, metric="loss", by="step", width=100, height=10, color=False)
    assert words in lines[0] and "a valid: mean" in "".join(lines) and sum(line.count(".") for line in lines) >= 4


def test_as_many_curves_as_fit_are_drawn_with_letters() -> None:
    many = [Curve(f"r{number}", "valid", [0.0, 1.0], [0.0, float(number)]) for number in range(12)]
    lines = sketch(many, metric="loss", by="step", width=80, height=20, color=False)
    assert "r11 valid" in "".join(lines)


def test_curves_without_bands_are_as_before(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text(json.dumps({"step": 1, "valid_loss": 2.0}) + "\n")
    assert curves([RunFolder(tmp_path / "a")]) == [Curve("a", "valid", [1], [2.0])]
