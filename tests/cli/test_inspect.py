"""lm inspect: each view as a table, as JSON and as a file, and what cannot be is one sentence."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lm as lm_package
from cli.inspect_tables import print_colored
from tests.cli.conftest import make_text

pytestmark = pytest.mark.slow

Lm = Callable[..., Any]
ROOT = Path(__file__).parents[2]


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
    assert done.out.startswith("gru-char: what single units track\n") and " tokens of play.txt\n" in done.out
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


# -- every view -------------------------------------------------------------------------------------------

VIEWS = {
    "gradients": ("gru-char", "--steps", "8"),
    "attention": ("transformer-char", "--layer", "1"),
    "neurons": ("gru-char",),
    "why": ("hybrid-char",),
    "shapes": ("transformer-char", "--batch", "3", "--length", "7"),
}
"""View → run and flags."""


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_a_table_of_80_columns_and_one_line_of_json(lm: Lm, inspected: Path, view: str) -> None:
    done = lm("inspect", view, *VIEWS[view])
    assert done.code == 0, done.err
    assert "\x1b" not in done.out and max(map(len, done.out.splitlines())) <= 80
    done = lm("inspect", view, *VIEWS[view], "--json")
    assert done.code == 0 and len(done.out.splitlines()) == 1 and json.loads(done.out)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_written_as_picture_and_page_and_replaces_an_old_file(lm: Lm, inspected: Path, view: str) -> None:
    for name, begins in (("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.html", b"<!doctype html>")):
        Path(name).write_text("old")
        done = lm("inspect", view, *VIEWS[view], "--out", name)
        assert done.code == 0 and f"Wrote {name}." in done.err
        assert Path(name).read_bytes().startswith(begins)
    assert not re.search(r"(src|href)=.?https?:|url\(.?http|@import", Path("x.html").read_text())
    assert sorted(path.name for path in Path().iterdir()) == ["x.html", "x.png", "x.svg"]


@pytest.mark.parametrize("view", VIEWS)
def test_an_output_that_cannot_be_is_a_sentence_before_the_work(lm: Lm, inspected: Path, view: str) -> None:
    done = lm("inspect", view, *VIEWS[view], "--out", "x.gif")
    assert done.code == 1 and done.out == ""
    assert done.err == "error: x.gif: the name of a view's file ends with .png, .svg or .html.\n"
    Path("folder.png").mkdir()
    assert "it is no file" in lm("inspect", view, *VIEWS[view], "--out", "folder.png").err


@pytest.mark.parametrize(("arguments", "sentence"), [
    ("attention gru-char", "A model of type gru has no attention. It has inputs, hidden, gates,"),
    ("attention transformer-char --layer 5", "layer 5: transformer-char has 2 layers, 0 to 1."),
    ("attention transformer-char --head 4", "head 4: transformer-char has 2 heads a layer, 0 to 1."),
    ("attention transformer-char --span 3", "--span '3': give FIRST:END, counted from 0, such as 0:40."),
    ("neurons ngram-char", "A model of type ngram has no hidden. It has contributions"),
    ("neurons gru-char --unit 3.1", "unit 3.1: gru-char has 1 layer, number 0."),
    ("neurons gru-char --unit x", "unit 'x': give LAYER.UNIT, counted from 0, such as 0.17."),
    ("neurons gru-char --text short.txt", "short.txt has 5 tokens, too few to say what a unit tracks:"),
    ("gradients gru-char --text short.txt", "has 5 tokens"),
    ("gradients gru-char --set model.num_layers=2", "--set is for the models of --preset"),
    ("gradients --preset gru-chat", "Did you mean 'gru-char'?"),
    ("gradients --preset gru-char --untrained", "--untrained is for runs"),
    ("gradients transformer-char --steps 64", "depends on 32 tokens: 64 steps are too many"),
    ("gradients ngram-char", "A model of type ngram has no hidden."),
    ("why gru-char --text missing.txt", "There is no file 'missing.txt'."),
    ("why gru-char --text binary.txt", "binary.txt"),
    ("why gru-char --encoding latin-1", "--encoding is for --text"),
    ("shapes ghost", "No run 'ghost'"),
    ("shapes transformer-char --length 33", "length 33: this model depends on 32 tokens at most."),
    ("shapes gru-char --text short.txt", "--text is for the model of --preset"),
    ("shapes gru-char --preset lstm-char", "Give a run or --preset, not both."),
])  # fmt: skip
def test_a_bad_request_is_one_sentence(lm: Lm, inspected: Path, arguments: str, sentence: str) -> None:
    Path("short.txt").write_text("ROMEO")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\xd8\x01")
    done = lm("inspect", *arguments.split())
    assert done.code == 1 and done.out == ""
    (line,) = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ") and sentence in line


def test_the_help_has_examples_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['lm', 'inspect', 'gradients', '--help']\n"
        "from cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "lm inspect gradients RUN --untrained" in ran.stdout and ran.stdout.endswith("False\n")
