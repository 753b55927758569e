"""lm film."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lm.runs.run_folder import RunFolder
from tests.cli.conftest import Lm


@pytest.fixture
def filmed(runs: Path) -> Path:
    """The folder of a run with a film of three frames, as an interrupted and resumed training leaves it."""
    folder = RunFolder(runs / "a")
    for step, loss, text in ((0, None, "q$<b>\x1b[31mz\nx"), (5, 2.5, "the ca"), (40, 1.25, "the cat sat\non a mat")):
        folder.append_film({"step": step, "seconds": step / 4, "progress": step / 40, "valid_loss": loss, "text": text})
    with (folder.path / "film.jsonl").open("a") as file:
        file.write('{"step": 41, "te')
    return folder.path


def test_a_pipe_gets_a_line_for_each_frame(lm: Lm, filmed: Path) -> None:
    lines = lm("film", "a").out.splitlines()
    assert lines[1:] == [
        "step 5 of 40 · validation loss 2.500: the ca",
        "step 40 of 40 · validation loss 1.250: the cat sat↵on a mat",
    ]
    assert lines[0].startswith("step 0 of 40: q$<b>") and lines[0].endswith("z↵x")
    frames = json.loads(lm("film", "a", "--json").out)
    assert [frame["step"] for frame in frames] == [0, 5, 40] and frames[2]["text"] == "the cat sat\non a mat"


def test_the_page_is_one_file_with_every_frame(lm: Lm, filmed: Path, tmp_path: Path) -> None:
    done = lm("film", "a", "--html", str(tmp_path / "film.html"))
    assert done.code == 0 and done.out == "" and "Wrote" in done.err
    page = (tmp_path / "film.html").read_text("utf-8")
    assert page.count("<figure") == 3 and page.count("<figure hidden>") == 2 and 'max="2"' in page
    assert "q&#36;&lt;b&gt;·[31mz" in page and "\x1b" not in page and "<b>" not in page.partition("<figure")[2]
    assert len(re.findall(r'class="dot( now)?" style="stroke:var\(--film-dot\)"', page)) == 3
    assert "prefers-color-scheme: dark" in page and not re.search(r"(src|href)=|https?://", page)


def test_the_picture_moves_and_rests_at_the_end(lm: Lm, filmed: Path, tmp_path: Path) -> None:
    assert lm("film", "a", "--gif", str(tmp_path / "film.gif")).code == 0
    with Image.open(tmp_path / "film.gif") as picture:
        durations = []
        for number in range(picture.n_frames):
            picture.seek(number)
            durations.append(picture.info["duration"])
    assert durations == [500, 500, 3000]


def test_what_cannot_be_shown_is_one_sentence(lm: Lm, runs: Path, filmed: Path, tmp_path: Path) -> None:
    done = lm("film", "a", "--gif", str(tmp_path / "film.png"))
    assert (done.code, done.out) == (1, "") and "ends with .gif" in done.err
    done = lm("film", "a", "--gif", "x.gif", "--html", "x.html")
    assert done.code == 1 and "give one of them" in done.err
    (filmed / "film.jsonl").unlink()
    done = lm("film", "a")
    assert (done.code, done.out) == (1, "") and done.err.startswith("error: Run 'a' has no film.")
