"""Curves: the points of metrics.jsonl, in a picture and in the terminal."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest

from lm.errors import ConfigError, MissingExtraError, RunError
from lm.runs.curves import Curve, curves, draw, sketch
from lm.runs.run_folder import RunFolder

ROWS = [
    {"step": 10, "tokens": 640, "seconds": 30.0, "train_loss": 2.0, "valid_loss": None, "learning_rate": 0.1},
    {"step": 20, "tokens": 1280, "seconds": 60.0, "train_loss": 1.0, "valid_loss": 1.5, "learning_rate": 0.05},
]


def a_run(folder: Path, name: str, rows: list[dict[str, float | None]] = ROWS) -> RunFolder:
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFolder(folder / name)


@pytest.mark.parametrize(("by", "x"), [("step", [10, 20]), ("tokens", [640, 1280]), ("time", [0.5, 1.0])])
def test_each_run_gives_a_curve_of_training_and_one_of_validation(tmp_path: Path, by: str, x: list[float]) -> None:
    assert curves([a_run(tmp_path, "a"), a_run(tmp_path, "b")], "loss", by) == [
        Curve("a", "train", x, [2.0, 1.0]), Curve("a", "valid", x[1:], [1.5]),
        Curve("b", "train", x, [2.0, 1.0]), Curve("b", "valid", x[1:], [1.5]),
    ]  # fmt: skip


def test_perplexity_is_made_of_the_loss_and_other_figures_are_single_curves(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a")
    train, valid = curves([run], "perplexity")
    assert train.y == pytest.approx([math.exp(2), math.e]) and valid.y == pytest.approx([math.exp(1.5)])
    assert curves([run], "learning_rate") == [Curve("a", "", [10, 20], [0.1, 0.05])]


def test_what_cannot_be_drawn_is_a_sentence(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"--metric 'los'.*Did you mean 'loss'\?.*learning_rate, loss, perplexity"):
        curves([run], "los")
    with pytest.raises(ConfigError, match="--by 'hours': use step, tokens, time"):
        curves([run], "loss", "hours")
    with pytest.raises(RunError, match="Run 'new' has no learning curve"):
        curves([run, RunFolder(tmp_path / "new")])
    old = a_run(tmp_path, "old", [{"step": 1, "train_loss": 2.0, "seconds": 1.0}])
    with pytest.raises(RunError, match="Run 'old' has no loss by tokens: .* older Inkling"):
        curves([run, old], "loss", "tokens")
    with pytest.raises(ConfigError, match=r"x\.jpg: a picture's name ends with \.png, \.svg or \.pdf"):
        draw(curves([run]), tmp_path / "x.jpg", metric="loss", by="step")


@pytest.mark.parametrize(("name", "begins"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path: Path, name: str, begins: bytes) -> None:
    drawn = curves([a_run(tmp_path, "a"), a_run(tmp_path, "b")], "loss", "tokens")
    draw(drawn, tmp_path / name, metric="loss", by="tokens")
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begins) and len(content) > 5000


def test_an_svg_holds_the_names_of_runs_and_axes(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a", [{**row, "valid_loss": 1.0} for row in ROWS])
    draw(curves([run]), tmp_path / "x.svg", metric="loss", by="step")
    text = (tmp_path / "x.svg").read_text()
    for words in ("a train", "a valid", "loss (nats per token)", "step"):
        assert f"<!-- {words} -->" in text


def test_the_first_fall_of_training_does_not_set_the_scale(tmp_path: Path) -> None:
    steps = range(1, 101)
    falling = a_run(tmp_path, "a", [{"step": n, "train_loss": 1 + 9 / n**2, "valid_loss": 1.5} for n in steps])
    draw(curves([falling]), tmp_path / "x.svg", metric="loss", by="step")
    text = (tmp_path / "x.svg").read_text()
    # Tick labels are drawn glyph by glyph, with the label as a comment.
    shown = [float(label) for label in re.findall(r"<!-- ([0-9.]+) -->", text) if "." in label]
    assert shown and max(shown) < 2.5


def test_the_terminal_shows_every_curve_within_its_width(tmp_path: Path) -> None:
    drawn = curves([a_run(tmp_path, "a"), a_run(tmp_path, "b")])
    lines = sketch(drawn, metric="loss", by="step", width=80, height=12, color=False)
    assert "loss (nats per token), by step" in lines[0]
    assert max(map(len, lines)) <= 80 and len(lines) >= 12
    assert all(label in " ".join(lines[-2:]) for label in ("a train", "a valid", "b train", "b valid"))
    assert "\x1b" not in "".join(lines)
    assert "\x1b" in "".join(sketch(drawn, metric="loss", by="step", width=80, height=12, color=True))


@pytest.mark.parametrize(("library", "what"), [("matplotlib.figure", "matplotlib"), ("uniplot", "uniplot")])
def test_a_library_that_is_missing_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, what: str
) -> None:
    drawn = curves([a_run(tmp_path, "a")])
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"{what}: pip install '.\[plot\]'"):
        if what == "uniplot":
            sketch(drawn, metric="loss", by="step", width=80, height=12, color=False)
        else:
            draw(drawn, tmp_path / "x.png", metric="loss", by="step")
