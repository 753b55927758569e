"""lm inspect: each view as a table, as JSON and as a file, and what cannot be is one sentence."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lm as lm_package
from cli.commands.inspect import print_colored
from tests.cli.conftest import make_text

Lm = Callable[..., Any]


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with lines, names, quotation marks and brackets."""
    words = iter(make_text(40_000, seed=7).split())
    turns = (
        'ROMEO:\n{} {} the {} (on {} {})\n{} {} {} "{} {}" {}.\n'.format(*(next(words) for _ in range(11)))
        for _ in range(300)
    )
    path = tmp_path_factory.mktemp("play") / "play.txt"
    path.write_text("".join(turns), "utf-8")
    return path


@pytest.fixture(scope="session")
def trained(play: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, one a family, each trained for a few steps."""
    folder = tmp_path_factory.mktemp("inspected")
    network = {
        "model.hidden_size": 16, "model.table_orders": [2], "training.batch_size": 4, "training.bptt": 16,
        "training.max_steps": 4, "training.warmup_steps": 0,
    }  # fmt: skip
    recurrent = {**network, "model.embedding_size": 8}
    attention = {**network, "model.num_heads": 2, "model.num_layers": 2, "model.context_length": 32}
    families: dict[str, dict[str, Any]] = {
        "gru-char": recurrent, "lstm-char": recurrent, "hybrid-char": recurrent, "transformer-char": attention,
        "ngram-char": {},
    }  # fmt: skip
    for preset, options in families.items():
        config = lm_package.compose(str(play), preset=preset, overrides=options)
        lm_package.train(play, config, name=preset, runs_dir=folder)
    return folder


@pytest.fixture
def inspected(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs, where the program looks by itself."""
    monkeypatch.setenv("INKLING_RUNS", str(trained))
    return trained


# -- neurons ----------------------------------------------------------------------------------------------


def test_units_are_ranked_for_each_feature_on_held_out_text(lm: Lm, inspected: Path, play: Path) -> None:
    done = lm("inspect", "neurons", "gru-char", "--text", str(play))
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80
    assert "gru-char: What single units track in" in done.out and "of play.txt" in done.out
    assert re.search(r"^position in line +mean [\d.]+ +0\.\d+ +r 0\.\d\d ", done.out, re.MULTILINE)
    assert re.search(r"^inside brackets +[\d.]+% +0\.\d+ +AUC 0\.\d\d ", done.out, re.MULTILINE)
    assert "Chance: the 99th percentile" in done.out and "\x1b" not in done.out


def test_neurons_as_json_say_the_rule_and_give_every_value(lm: Lm, inspected: Path, play: Path) -> None:
    found = json.loads(lm("inspect", "neurons", "gru-char", "--text", str(play), "--unit", "0.3", "--json").out)
    assert found["run"] == "gru-char" and found["layer_sizes"] == [16] and "99th percentile" in found["rule"]
    assert [feature["feature"] for feature in found["features"]][:3] == [
        "position in line", "inside quotes", "inside brackets",
    ]  # fmt: skip
    (unit,) = found["units"]
    assert (unit["layer"], unit["unit"]) == (0, 3) and len(unit["values"]) == found["tokens"] == len(found["pieces"])


def test_a_chosen_unit_marks_the_text_also_without_color(lm: Lm, inspected: Path, play: Path) -> None:
    done = lm("inspect", "neurons", "gru-char", "--text", str(play), "--unit", "0.3")
    lines = done.out.partition("the middle is the median\n\n")[2].splitlines()
    shown = "".join(lines[::2]).removesuffix("… of ")
    assert play.read_text()[:200].replace("\n", "↵") == shown[:200]
    assert set(lines[1]) <= set("▁▂▃▄▅▆▇█") and len(lines[1]) == len(lines[0])


def test_a_terminal_gets_colors_unless_no_color_is_set(
    inspected: Path, play: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lm_package.load("gru-char", runs_dir=inspected)
    view = lm_package.inspect.neurons(run, play.read_text()[:2000], unit="0.3")
    for colored in (True, False):
        if not colored:
            monkeypatch.setenv("NO_COLOR", "1")
        screen = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
        print_colored(screen, view, view.shown[0])
        printed = screen.file.getvalue()  # type: ignore[attr-defined]
        assert ("48;2;" in printed) is colored and ("▁" in printed) is not colored
