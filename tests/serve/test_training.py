"""Trainings in line: each in a process of its own, whose life and death leave the server whole."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.corpora import open_text
from lm.errors import ConfigError, CorpusError, TrainingError
from lm.runs.run_folder import RunFolder, list_runs
from serve.engines.model_pool import ModelPool
from serve.settings import ServeOptions
from serve.training_queue import MAX_ENDED, MAX_ROWS, MAX_WAITING, Job, TrainingQueue, families, keep_text, safe_name
from tests.serve.conftest import ROOT, make_text

pytestmark = pytest.mark.slow

TEXT = make_text(11_000).encode()
"""Too long to be known by heart in the time that is given here."""
MOST_BYTES = 1 << 20
LONG = 0.4
"""Minutes of a training that is not meant to come to its end."""
SECONDS = 60
"""What the slowest machine may take for anything that is waited for here."""


@pytest.fixture
def text() -> Path:
    return keep_text(io.BytesIO(TEXT), "hens.txt", MOST_BYTES)


@pytest.fixture(autouse=True)
def from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def live(
    runs_dir: Path, story: Callable[[TrainingQueue, ModelPool], Coroutine[Any, Any, None]], runs: tuple[str, ...] = ()
) -> None:
    """Tell a story on an event loop, as the server does; no process is left at its end."""

    async def main() -> None:
        models = ModelPool(ServeOptions(runs_dir=runs_dir, runs=runs))
        queue = TrainingQueue(models, ServeOptions(runs_dir=runs_dir))
        try:
            await story(queue, models)
        finally:
            await queue.close()
            models.close()

    asyncio.run(main())


async def until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.02)


def pid(queue: TrainingQueue) -> int:
    assert queue._process is not None
    return queue._process.pid


def is_gone(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


# -- the line -----------------------------------------------------------------------------------------


def test_trainings_run_one_after_another_and_each_leaves_an_available_run(tmp_path: Path, text: Path):
    async def story(queue: TrainingQueue, models: ModelPool) -> None:
        first = queue.submit(text, "hens.txt", "gru", 0.02)
        second = queue.submit(text, "hens.txt", "lstm", 0.02)
        assert (queue.ahead(first), queue.ahead(second), queue.busy) == (0, 1, True)
        seen = set()
        while not first.ended:
            seen.add(first.status)
            assert second.status == "waiting"
            await asyncio.sleep(0.01)
        assert {"reading", "training", "validating"} <= seen
        await until(lambda: second.ended)
        assert not queue.busy
        for job, preset in ((first, "gru"), (second, "lstm")):
            assert (job.status, job.sentence, job.run) == ("done", None, f"hens-{preset}")
            assert job.report is not None and 0 < job.report["bits_per_byte"] < 8
            assert job.rows[-1]["step"] == job.step and any(row["valid_loss"] for row in job.rows)
            # Samples are of the best weights: each of a lower validation loss than the one before.
            losses = [sample.valid_loss for sample in job.samples]
            assert losses and losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)
            run = lm.load(job.run, runs_dir=tmp_path)
            assert run.config.model.type == preset and run.record["corpus"]["name"] == "hens"
            assert job.samples[-1].text == run.sample("", seed=1, temperature=0.8, max_tokens=240)
            lease = await models.lease(job.run)
            lease.close()

    live(tmp_path, story)


def test_a_stopped_training_is_saved_with_its_report(tmp_path: Path, text: Path):
    async def story(queue: TrainingQueue, models: ModelPool) -> None:
        job, waiting = queue.submit(text, "hens.txt", "gru", LONG), queue.submit(text, "hens.txt", "gru", LONG)
        queue.stop(waiting)
        assert waiting.status == "stopped" and waiting.run is None and queue.ahead(waiting) == 1
        await until(lambda: job.rows)
        assert job.seconds_left is not None and job.seconds_left > 5
        queue.stop(job)
        # A second press changes nothing, where a second Ctrl-C would end the training at once.
        queue.stop(job)
        await until(lambda: job.ended)
        assert (job.status, job.reason, job.sentence) == ("stopped", "interrupted", None)
        assert job.report is not None and job.report["step"] == job.step > 0
        assert job.run in models.available_runs
        run = lm.load(job.run, runs_dir=tmp_path)
        assert run.reports()["valid"] == job.report and run.folder.has_last()
        assert [sample.text for sample in job.samples] == [run.sample("", seed=1, temperature=0.8, max_tokens=240)]

    # If runs were named, the new one is available in addition.
    live(tmp_path, story, runs=("shakespeare-gru",))


def test_a_killed_training_has_a_message_and_the_next_one_runs(tmp_path: Path, text: Path):
    short = keep_text(io.BytesIO(b"ab"), "tiny.txt", MOST_BYTES)
    runs = []

    async def story(queue: TrainingQueue, models: ModelPool) -> None:
        job, other = queue.submit(text, "hens.txt", "gru", LONG), queue.submit(short, "tiny.txt", "gru", LONG)
        await until(lambda: job.step)
        os.kill(pid(queue), signal.SIGKILL)
        await until(lambda: job.ended)
        assert job.status == "failed" and job.report is None
        assert job.sentence is not None and "killed by SIGKILL" in job.sentence
        assert f"Run {job.run} has what was saved." in job.sentence
        runs.append(job.run)
        await until(lambda: other.ended)
        # The library's sentence, with the name that the visitor knows.
        assert other.status == "failed" and other.run is None
        assert other.sentence is not None and other.sentence.startswith("tiny.txt is too short to split")
        assert await models.reload() == {}

    live(tmp_path, story)
    # Which size it is depends on the machine's speed.
    assert runs == ["hens-gru"]
    assert RunFolder(tmp_path / runs[0]).has_last() and os.listdir(tmp_path) == runs


def test_closing_saves_the_training_and_leaves_no_process(tmp_path: Path, text: Path):
    numbers = []

    async def story(queue: TrainingQueue, models: ModelPool) -> None:
        job, waiting = queue.submit(text, "hens.txt", "gru", LONG), queue.submit(text, "hens.txt", "gru", LONG)
        await until(lambda: job.step)
        numbers.append(pid(queue))
        started = time.monotonic()
        await queue.close()
        assert time.monotonic() - started < 20
        assert job.status == waiting.status == "stopped" and job.run is not None
        state, _ = RunFolder(tmp_path / job.run).read_last()
        assert state["train_state"]["stop_reason"] == "interrupted" and state["train_state"]["step"] >= job.step
        with pytest.raises(TrainingError):
            queue.submit(text, "hens.txt", "gru", LONG)

    live(tmp_path, story)
    assert is_gone(numbers[0])


def test_a_training_stopped_before_it_began_leaves_nothing(tmp_path: Path, text: Path):
    async def story(queue: TrainingQueue, models: ModelPool) -> None:
        job = queue.submit(text, "hens.txt", "gru", LONG)
        await until(lambda: queue._process is not None)
        queue.stop(job)
        await until(lambda: job.ended)
        assert (job.status, job.run, job.sentence) == ("stopped", None, None)
        queue.forget(job)
        assert queue.jobs == [] and queue.find(job.number) is None

    live(tmp_path, story)
    assert os.listdir(tmp_path) == []


def test_a_training_whose_server_died_saves_and_ends(tmp_path: Path, text: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.training_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    order = {"text": str(text), "family": "gru", "minutes": LONG, "runs_dir": str(tmp_path)}
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    try:
        while json.loads(process.stdout.readline())["event"] != "progress":
            pass
        # The same as the end of the server.
        process.stdin.close()
        process.stdout.close()
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
    (folder,) = (run for run in list_runs(tmp_path) if run.path.parent == tmp_path)
    assert folder.has_last() and folder.read_last()[0]["train_state"]["step"] > 0


def test_invalid_trainings_are_refused_and_the_queue_is_limited(tmp_path: Path, text: Path):
    async def story(queue: TrainingQueue, models: ModelPool) -> None:
        with pytest.raises(ConfigError, match="no kind of model 'perceptron'"):
            queue.submit(text, "hens.txt", "perceptron", 1)
        for minutes in (0, -1, float("nan"), 1e9):
            with pytest.raises(ConfigError, match="give more than 0"):
                queue.submit(text, "hens.txt", "gru", minutes)
        for _ in range(MAX_WAITING):
            queue.submit(text, "hens.txt", "gru", 1)
        with pytest.raises(TrainingError, match="queue is full"):
            queue.submit(text, "hens.txt", "gru", 1)
        for _ in range(3):
            for job in queue.jobs:
                queue.stop(job)
            for _ in range(MAX_WAITING):
                queue.submit(text, "hens.txt", "gru", 1)
        assert sum(job.ended for job in queue.jobs) <= MAX_ENDED

    live(tmp_path, story)


def test_a_long_training_keeps_a_curve_of_bounded_length_with_every_validation():
    job = Job(1, Path("x"), "x", "gru", 1)
    for step in range(1, 20 * MAX_ROWS):
        valid = 1.0 if step % 1000 == 0 else None
        job.apply({"event": "row", "step": step, "seconds": step, "train_loss": 1.0, "valid_loss": valid})
    assert len(job.rows) <= MAX_ROWS
    assert [row["step"] for row in job.rows if row["valid_loss"]] == list(range(1000, 20 * MAX_ROWS, 1000))


def test_the_default_and_every_family_that_has_a_preset_can_be_requested():
    assert families() == {
        "Default": "default", "GRU": "gru", "Hybrid": "hybrid", "LSTM": "lstm", "Ngram": "ngram",
        "Transformer": "transformer",
    }  # fmt: skip


# -- texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("letters.txt", "letters"),
        ("My diary (2).md", "My-diary-2"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot"),
        ("/", "text"),
        ("..", "text"),
        (".bashrc", "bashrc"),
        ("", "text"),
        ("☂☂☂.txt", "text"),
        ("Война и мир.txt", "Война-и-мир"),
        ("<script>alert(1)</script>.txt", "script"),
        ("<img src=x onerror=alert(1)>.txt", "img-src-x-onerror-alert-1"),
        ("a\0b\nc.txt", "a-b-c"),
        ("\udc80.txt", "text"),
        ("x" * 500 + ".txt", "x" * 60),
        ("語" * 500 + ".txt", "語" * 40),
    ],
)
def test_a_file_name_of_any_kind_becomes_a_plain_one(shown: str, expected: str):
    assert safe_name(shown) == expected


def test_a_text_is_kept_under_its_hash_whatever_it_is_called():
    kept = keep_text(io.BytesIO(TEXT), "../../x.txt", MOST_BYTES)
    assert kept.read_bytes() == TEXT and kept.name == "x.txt"
    assert kept.parent.parent == Path(os.environ["INKLING_CACHE"]) / "texts" and len(kept.parent.name) == 12
    assert keep_text(io.BytesIO(TEXT), "x.txt", MOST_BYTES) == kept


def test_an_uploaded_table_stays_a_table_and_utf_16_is_text():
    kept = keep_text(io.BytesIO(b'{"text": "a"}\n{"text": "b"}\n'), "rows.JSONL", MOST_BYTES)
    assert kept.name == "rows.jsonl" and "".join(open_text(str(kept)).chunks()) == "a\nb"
    wide = keep_text(io.BytesIO("text".encode("utf-16")), "wide.txt", MOST_BYTES)
    assert "".join(open_text(str(wide)).chunks()) == "text"
    # A file that unpacks to more than was sent is no text here.
    with pytest.raises(CorpusError, match=r"a\.txt\.gz is not UTF-8"):
        keep_text(io.BytesIO(gzip.compress(TEXT)), "a.txt.gz", MOST_BYTES)
    with pytest.raises(CorpusError, match=r"rows\.csv has no column 'text'"):
        keep_text(io.BytesIO(b"a,b\n1,2\n"), "rows.csv", MOST_BYTES)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "mine.txt is empty: there is no text to read."),
        (b"caf\xe9 au lait", "mine.txt is not UTF-8: byte 3 (line 1) is 0xe9"),
        (b"a\0b", "mine.txt looks like a binary file"),
        (b"a" * (MOST_BYTES + 1), "mine.txt is longer than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_not_text_is_refused_and_not_stored(content: bytes, sentence: str):
    def kept() -> list[Path]:
        return sorted((Path(os.environ["INKLING_CACHE"]) / "texts").rglob("*"))

    before = kept()
    with pytest.raises(CorpusError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        keep_text(io.BytesIO(content), "mine.txt", MOST_BYTES)
    assert kept() == before
