"""Trackers get the lines of metrics.jsonl, the options and the report; a failing one does not stop a training."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.config import CorpusConfig, RunConfig, Section
from lm.errors import ConfigError, MissingExtraError
from lm.jobs.train import resume
from lm.runs.run import Run
from lm.training import trackers
from lm.training.trackers import FILE, LIBRARIES, Library, flat, numbers

OPTIONS = {
    "model.hidden_size": 8, "model.embedding_size": 8, "model.table_orders": [], "training.batch_size": 2,
    "training.bptt": 8, "training.warmup_steps": 0, "training.log_every": 2, "training.film": False,
    "training.evaluate_every": 4,
}  # fmt: skip


def train(folder: Path, name: str, *, stop_after: int | None = None, max_steps: int = 8) -> Run:
    text = folder / "text.txt"
    text.write_text("the cat sat on a mat .\n" * 100, "utf-8")
    overrides = {**OPTIONS, "training.log_to": name}
    return lm.train(
        text, preset="gru-char-small", overrides=overrides, max_steps=max_steps, stop_after=stop_after,
        name=f"run-{name}", runs_dir=folder,
    )  # fmt: skip


def tracked_id(run: Run) -> str:
    return str(json.loads((run.folder.path / FILE).read_text())["id"])


# -- the libraries, offline -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_tracker_has_the_lines_of_a_resumed_run_and_its_report(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if importlib.util.find_spec(LIBRARIES[name].package) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = train(tmp_path, name, stop_after=4)
    id_ = tracked_id(run)
    run, _ = resume(f"run-{name}", runs_dir=tmp_path)
    assert tracked_id(run) == id_
    rows = run.folder.read_metrics()
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    losses, config, report = READERS[name](tmp_path, id_)
    assert losses == [(row["step"], row["train_loss"]) for row in rows]
    assert config["training.log_every"] in (2, "2") and config["model.type"] == "gru"
    assert report == run.reports()["valid"]["bits_per_byte"]


def read_wandb(folder: Path, id_: str) -> Any:
    from wandb.proto.wandb_internal_pb2 import Record

    losses, config, report = [], {}, None
    # Offline, each part is a file of its own, with the same id.
    for file in sorted(folder.glob(f"wandb/offline-run-*/run-{id_}.wandb")):
        for raw in leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(raw)
            config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            for each in record.summary.update:
                if (each.nested_key or [each.key])[-1] == "report/bits_per_byte":
                    report = json.loads(each.value_json)
            values = {(each.nested_key or [each.key])[-1]: json.loads(each.value_json) for each in record.history.item}
            if "train_loss" in values:
                losses.append((values["_step"], values["train_loss"]))
    return losses, config, report


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which is the format of .wandb files: blocks of 32 KiB after a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:
            return
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        # Whole records are 1; parts of one are 2 (first), 3 and 4 (last).
        if kind in (1, 4):
            yield parts
            parts = b""


def read_mlflow(folder: Path, id_: str) -> Any:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(id_)
    assert run.info.status == "FINISHED"
    losses = [(each.step, each.value) for each in client.get_metric_history(id_, "train_loss")]
    return losses, run.data.params, run.data.metrics["report/bits_per_byte"]


def read_trackio(folder: Path, id_: str) -> Any:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("inkling", id_)
    losses = [(each["step"], each["train_loss"]) for each in logs if "train_loss" in each]
    report = [each["report/bits_per_byte"] for each in logs if "report/bits_per_byte" in each]
    return losses, SQLiteStorage.get_run_config("inkling", id_), report[-1]


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


# -- failures ---------------------------------------------------------------------------------------------


class Recording(Library):
    """A tracker in memory."""

    package = "json"
    fails_at: str | None = None
    calls: list[tuple[str, Any]]

    def open(self, run: str, config: Mapping[str, Any], id_: str | None) -> str:
        type(self).calls = [("open", run)]
        return self._done("open", id_ or "first")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._done("log", step)

    def summarize(self, values: Mapping[str, float], step: int) -> None:
        self._done("summarize", dict(values))

    def close(self, *, failed: bool) -> None:
        self._done("close", failed)

    def _done(self, call: str, value: Any) -> Any:
        if call == self.fails_at:
            raise OSError(f"no {call}\nand more")
        self.calls.append((call, value))
        return value


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setattr(trackers, "LIBRARIES", {"wandb": Recording})
    monkeypatch.setattr(Recording, "fails_at", None)
    return Recording


def test_a_tracker_that_fails_in_the_middle_is_one_warning(
    tmp_path: Path, recording: type[Recording], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recording, "fails_at", "log")
    with caplog.at_level(logging.WARNING, "lm"):
        run = train(tmp_path, "wandb")
    assert run.reports()["valid"]["loss"] > 0 and run.folder.read_metrics()[-1]["step"] == 8
    warnings = [each.getMessage() for each in caplog.records if "wandb" in each.getMessage()]
    assert warnings == ["wandb failed and gets no more values; the training continues: no log."]


def test_a_tracker_that_hangs_does_not_hold_the_program(
    tmp_path: Path, recording: type[Recording], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    import threading

    released = threading.Event()
    monkeypatch.setattr(recording, "log", lambda self, values, step: released.wait(20))
    monkeypatch.setattr(trackers, "MAX_WAIT_SECONDS", 0.1)
    assert train(tmp_path, "wandb").folder.read_metrics()[-1]["step"] == 8
    released.set()
    assert any("has not taken all values" in each.getMessage() for each in caplog.records)


def test_a_tracker_that_cannot_start_is_one_sentence_and_leaves_no_run(
    tmp_path: Path, recording: type[Recording], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recording, "fails_at", "open")
    with pytest.raises(ConfigError, match=r"The tracker wandb cannot start: no open\. Correct it, or leave --log-to"):
        train(tmp_path, "wandb")
    assert not list(tmp_path.glob("run-wandb/config.json"))


def test_a_run_that_is_replaced_begins_a_new_tracked_run(tmp_path: Path, recording: type[Recording]):
    run = train(tmp_path, "wandb", stop_after=2)
    (run.folder.path / FILE).write_text('{"tracker": "wandb", "id": "mine"}')
    resume("run-wandb", runs_dir=tmp_path)
    assert ("open", "mine") in recording.calls and recording.calls[-1] == ("close", False)
    (run.folder.path / FILE).write_text('{"tracker": "mlflow", "id": "theirs"}')
    resume("run-wandb", runs_dir=tmp_path, max_steps=10)
    assert ("open", "first") in recording.calls
    assert [value for call, value in recording.calls if call == "log"] == [10]


def test_a_training_that_fails_marks_the_tracked_run(
    tmp_path: Path, recording: type[Recording], monkeypatch: pytest.MonkeyPatch
):
    from lm.training.trainer import Trainer

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, "wandb")
    assert recording.calls[-1] == ("close", True)


def test_a_missing_library_names_the_extra_before_the_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LIBRARIES["trackio"], "package", "no_such_package")
    with pytest.raises(MissingExtraError, match="--log-to trackio needs no_such_package: pip install"):
        lm.train(tmp_path / "missing.txt", preset="gru-char-small", overrides={"training.log_to": "trackio"})


def test_numbers_are_what_a_tracker_can_draw():
    row = {"step": 3, "train_loss": 0.5, "valid_loss": None, "sample": "the", "is_best": True}
    assert numbers(row) == {"step": 3, "train_loss": 0.5}


@pytest.mark.parametrize(("source", "sent"), [
    ("/home/someone/private/my.txt", "my.txt"), ("wikitext-2", "wikitext-2"), ("https://a.org/b.txt",) * 2,
])  # fmt: skip
def test_the_folder_of_a_file_is_not_sent(source: str, sent: str) -> None:
    config = RunConfig(corpus=CorpusConfig(source=source), tokenizer=Section(type="char"), model=Section(type="lstm"))
    assert flat(config)["corpus.source"] == sent
