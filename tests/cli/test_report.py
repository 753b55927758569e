"""lm report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lm.copies import CopyIndex
from lm.errors import CorpusError
from lm.evaluation.calibration import Calibration, Temperature, equal_mass
from lm.evaluation.report import Report
from lm.report_page.page import MAX_CURVE_POINTS, _underlined, calibration_sentences, thinned, verdict
from lm.runs.run import Run, load
from tests.cli.conftest import Lm


def test_a_report_is_one_page_with_figures_curves_samples_and_the_surprise_of_each_token(
    lm: Lm, runs: Path, text: Path
):
    done = lm(
        "report", "a", "--split", "valid", "--html", "a.html", "--samples", "2", "--seed", "5", "--temperature", "0.5"
    )
    assert done.code == 0 and done.err + done.out == "Wrote a.html.\n"
    page = Path("a.html").read_text("utf-8")
    assert not re.search(r"(src|href)=|url\(|@import", page)
    run = load("a")
    report = run.reports()["valid"]
    assert f"{report['bits_per_byte']:.3f} bits for each byte" in page and report["text_sha256"] in page
    assert page.count('class="line"') == 4
    samples = run.samples(n=2, seed=5, temperature=0.5, max_tokens=400)
    assert page.count('class="sample"') == 2
    assert all(sample.split("\n")[0].replace("'", "&#x27;") in page for sample in samples)
    # Each character of the validation split is a mark with its probability.
    # The text is cut into 4,500, 250 and 250 characters.
    tokens = run.score(text.read_text("utf-8")[4500:4750])
    assert page.count('class="mark ') == len(tokens) == report["tokens"]
    assert f"({tokens[-1].nats:.2f} nats)" in page
    for section in ("Are its probabilities right?", "Learned or copied?", "Expected calibration error", "sha256"):
        assert section in page
    assert report["signature"] in page


def test_without_the_text_the_page_has_the_saved_figures_and_no_map(
    lm: Lm, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    def gone(*_: object, **__: object) -> None:
        raise CorpusError("words.txt does not exist.")

    monkeypatch.setattr(Run, "own_text", gone)
    done = lm("report", "a", "--split", "valid")
    assert done.code == 0 and "note: The page has no map of the text. words.txt does not exist." in done.err + done.out
    page = Path("a-report.html").read_text("utf-8")
    assert "bits for each byte" in page and 'class="mark ' not in page
    # The test split was not scored at the end of training: its figures need the text.
    assert lm("report", "a", "--split", "test").code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "dev"], "has no 'dev' split"),
        (["--html", "checkpoints"], "checkpoints"),
        (["--corpus", "gone.txt"], "gone.txt"),
    ],
)
def test_a_mistake_is_one_sentence(lm: Lm, runs: Path, arguments: list[str], words: str):
    done = lm("report", "a", *arguments)
    assert done.code == 1 and words in done.err and done.err.count("\n") == 1


def test_copies_in_a_sample_are_underlined_from_twenty_characters():
    index = CopyIndex("the cat sat on the mat and <saw> it all\n")
    text = "A dog: cat sat on the mat and <saw> a hen on the mat"
    found = index.find(text)
    assert _underlined(text, found) == ("A dog:<u> cat sat on the mat and &lt;saw&gt; </u>a hen on the mat")
    assert _underlined("a dog <b>", index.find("a dog <b>")) == "a dog &lt;b&gt;"


def test_calibration_in_sentences():
    bins = equal_mass(np.array([0.5, 0.5, 0.9, 0.9]), np.array([True, False, True, False]), 2)
    found = Calibration(4, bins, bins, loss=1.5, expected_loss=1.2, temperature=Temperature(1.25, "valid", 9, 2, 1),
                        loss_at_temperature=1.4)  # fmt: skip
    first, second, third = calibration_sentences(found)
    assert "probability of 70.0% in the mean, and 50.0% of them are right: it is too sure" in first
    assert "Temperature 1.250" in second and "1.4000 instead of 1.5000" in second
    assert third == "It expects 1.200 nats per token; the text has 1.500."


def test_the_verdict_compares_with_the_floor(runs: Path):
    saved = Report.model_validate(load("a", runs_dir=runs).reports()["valid"])
    values = {"bits_per_byte": 2.0, "loss": 1.4, "floor_loss": 1.5, "floor": "7-gram counts of the text"}
    report = saved.model_copy(update={**values, "training_overlap": 0.0})
    assert "needs 2.000 bits for each byte" in verdict(report) and "4.0 times shorter" in verdict(report)
    assert "better than n-gram counts of the training text (7-gram counts), by 0.100 nats" in verdict(report)
    assert "worse than n-gram counts" in verdict(report.model_copy(update={"floor_loss": 1.3}))
    assert "as good as n-gram counts" in verdict(report.model_copy(update={"floor_loss": 1.399}))
    assert "shows memory" in verdict(report.model_copy(update={"training_overlap": 0.5}))


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_point():
    points = [(float(step), float(step % 2)) for step in range(3 * MAX_CURVE_POINTS)]
    thin = thinned(points)
    assert len(thin) == MAX_CURVE_POINTS and thin[-1] == points[-1]
    assert thin[0] == (2.0, pytest.approx(1 / 3)) and thinned(points[:5]) == points[:5]
