"""Several processes are one trainer: the same losses, the same files, and an end whatever happens to one of them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lm
from lm.config import compose
from lm.corpora.batches import make_batches
from lm.errors import ConfigError, DeviceError
from lm.runs.run_folder import RunFolder
from lm.training import distributed
from lm.training.distributed import World
from tests.training import processes
from tests.training.conftest import make_text

TIMEOUT_SECONDS = 300
TORCHRUN = sys.executable, "-m", "torch.distributed.run"
LM = sys.executable, "-m", "cli.main"


# -- the same losses ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: each case in one process (CASE-1) and in two (CASE-2), and parts of some."""
    folder = tmp_path_factory.mktemp("both")
    text = folder / "words.txt"
    text.write_text(make_text(), "utf-8")
    for case in processes.CASES:
        processes.train(text, folder / f"{case}-1", case)
    processes.train(text, folder / "gru-end", "gru", stop_after=processes.STOP)
    parts = ("gru@half", "gru@end", "gru@clock", "gru-dropout@halves", "lstm-shard@halves", "transformer-shard@half")
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", processes.__file__]
    with job(folder, *command, str(text), str(folder), *processes.CASES, *parts, text=False) as started:
        code = started.wait(TIMEOUT_SECONDS)
    assert code == 0, (folder / "log").read_text("utf-8")
    for case in ("gru", "transformer-shard"):
        processes.train(text, folder / f"{case}-half", case, resumes=True)
    return folder


def assert_equal_losses(one: RunFolder, two: RunFolder, tolerance: float = 2e-6) -> None:
    rows, others = one.read_metrics(), two.read_metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, processes.PLAN.steps + 1))
    for row, other in zip(rows, others, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=tolerance)
        assert row["train_accuracy"] == pytest.approx(other["train_accuracy"], abs=0.02)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], abs=tolerance * 10)
        if row["valid_loss"] is not None:
            assert row["valid_loss"] == pytest.approx(other["valid_loss"], abs=tolerance)
            assert row["valid_accuracy"] == pytest.approx(other["valid_accuracy"], abs=0.01)


def assert_same_bytes(one: RunFolder, two: RunFolder) -> None:
    (_, first), (_, second) = one.read_last(), two.read_last()
    assert first.keys() == second.keys()
    for file, arrays in first.items():
        assert arrays.keys() == second[file].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, second[file][name], err_msg=f"{file}: {name}")


NOISY = {"transformer-muon": 2e-4, "gru-masters": 5e-3}
"""Muon orthogonalises in bf16, which makes more of the last bits; and at O2 all products are in bf16."""


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in processes.CASES if case != "gru-dropout"])
def test_two_processes_have_the_losses_of_one(both: Path, case: str) -> None:
    one, two = (RunFolder(both / f"{case}-{count}") for count in (1, 2))
    assert_equal_losses(one, two, NOISY.get(case, 2e-6))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gru", "gru-tables", "transformer-shard", "lstm-shard"])
def test_the_files_of_two_processes_are_those_of_one(both: Path, case: str) -> None:
    one, two = (RunFolder(both / f"{case}-{count}") for count in (1, 2))
    (_, first), (_, second) = one.read_last(), two.read_last()
    assert second["random"].keys() == {"cpu", "cpu.1"}
    assert first.keys() == second.keys()
    for file in first.keys() - {"random"}:
        shapes = [{name: array.shape for name, array in found[file].items()} for found in (first, second)]
        assert shapes[0] == shapes[1]
    one_best, two_best = (folder.read_weights("best") for folder in (one, two))
    assert one_best[1]["step"] == two_best[1]["step"]
    for name, array in one_best[0].items():
        np.testing.assert_allclose(array, two_best[0][name], atol=5e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_follow_the_clock_of_the_first(both: Path) -> None:
    # That both end with the same weights is checked in the processes.
    run = RunFolder(both / "gru-clock")
    progress, rows = run.read_state()["train_state"], run.read_metrics()
    assert progress["stop_reason"] == "finished" and len(progress["segments"]) > 1
    assert progress["step"] > 8 and rows[-1]["progress"] == 1
    assert progress["learning_rate_share"] == pytest.approx(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gru-half", "gru-end", "transformer-shard-half"])
def test_another_number_of_processes_continues_at_the_same_token(both: Path, case: str) -> None:
    # gru-half: begun by two, ended by one; gru-end: begun by one, ended by two. The carried state is split and joined.
    straight = RunFolder(both / f"{case.rpartition('-')[0]}-1")
    assert_equal_losses(straight, RunFolder(both / case))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gru-dropout", "lstm-shard"])
def test_two_processes_resume_bit_for_bit(both: Path, case: str) -> None:
    assert_same_bytes(RunFolder(both / f"{case}-2"), RunFolder(both / f"{case}-halves"))


@pytest.mark.slow
def test_each_process_drops_other_units(both: Path) -> None:
    _, tensors = RunFolder(both / "gru-dropout-2").read_last()
    assert not np.array_equal(tensors["random"]["cpu"], tensors["random"]["cpu.1"])


# -- shares -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [2, 3, 6])
@pytest.mark.parametrize("kind", ["streams", "rotated", "random", "shuffled"])
def test_the_shares_of_a_batch_are_its_rows_in_order(prepared: Any, kind: Any, shares: int) -> None:
    train = prepared.splits["train"]
    whole = make_batches(kind, train, 6, 16, 1)
    parts = [make_batches(kind, train, 6, 16, 1, share=(number, shares)) for number in range(shares)]
    for index in (0, 1, whole.per_epoch - 1, whole.per_epoch):
        batch, own = whole.batch(index), [part.batch(index) for part in parts]
        counted = [part for part in own if part.weight]
        np.testing.assert_array_equal(batch.inputs, np.concatenate([part.inputs for part in counted]))
        np.testing.assert_array_equal(batch.targets, np.concatenate([part.targets for part in counted]))
        assert all(part.fresh == batch.fresh for part in own)
        # Each process's mean, weighted, adds up to the mean over all rows.
        for part in counted:
            assert part.weight == pytest.approx(len(part.inputs) * shares / len(batch.inputs))
        assert sum(part.weight for part in own) == pytest.approx(shares)


# -- what is refused ----------------------------------------------------------------------------------


def config(**overrides: Any) -> Any:
    return compose(
        "words.txt", preset="gru-char", overrides={path.replace("__", "."): v for path, v in overrides.items()}
    )


def test_a_batch_that_does_not_split_is_refused_with_sizes_that_do() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=62 .* over 4 processes: use 60 or 64 "):
        distributed.check(config(training__batch_size=62), 4)
    with pytest.raises(ConfigError, match=r"batch_size=3 .* over 8 processes: use 8 "):
        distributed.check(config(training__batch_size=3), 8)
    distributed.check(config(training__batch_size=64), 4)


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"context tables.*model.table_orders=\[\]"):
        distributed.check(config(training__shard=True, model__table_orders=[2]), 2)
    with pytest.raises(ConfigError, match="--shard and training.amp=O2 cannot be combined.*--amp O1"):
        distributed.check(
            config(training__shard=True, model__table_orders=[], training__amp="O2", training__precision="bf16"), 2
        )
    with pytest.raises(ConfigError, match="Muon needs whole matrices"):
        distributed.check(config(training__shard=True, model__table_orders=[], training__optimizer="muon"), 2)
    distributed.check(config(training__shard=True, model__table_orders=[]), 2)


def test_more_devices_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "usable_threads", lambda: 2)
    with pytest.raises(DeviceError, match=r"--devices 3: this machine has 2 CPU cores; use --devices 2 or fewer\."):
        distributed.check_devices(3, "cpu")
    distributed.check_devices(2, "cpu")


def test_processes_that_share_one_named_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(1, 2, 1, 2).pick_device("cuda") == torch.device("cuda", 1)
    assert World(1, 2, 1, 2).pick_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="'cuda:0' is one device and 2 processes train: use cuda"):
        World(1, 2, 1, 2).pick_device("cuda:0")
    with pytest.raises(
        DeviceError, match="--devices 4: this machine has 2 GPUs; use --devices 2 or fewer, or --device"
    ):
        World(3, 4, 3, 4).pick_device(None)


# -- whole jobs ---------------------------------------------------------------------------------------

TRAIN = (
    "train", "words.txt", "--preset", "gru-char", "--runs-dir", "runs", "--device", "cpu",
    "--set", "model.hidden_size=16", "--set", "model.table_orders=[2]", "--set", "training.batch_size=8",
    "--set", "training.bptt=32", "--set", "training.log_every=1", "--set", "training.evaluate_every=25",
)  # fmt: skip


@contextlib.contextmanager
def job(folder: Path, *command: str, text: bool = True) -> Iterator[subprocess.Popen[str]]:
    if text:
        (folder / "words.txt").write_text(make_text(), "utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
        )
        try:
            yield started
        finally:
            for child in children(started.pid):
                os.kill(child, signal.SIGKILL)
            started.kill()
            started.wait()


def children(launcher: int) -> list[int]:
    """Process ids, in the order in which they were started."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children")
    return sorted(map(int, found.read_text().split())) if found.exists() else []


def worker(launcher: int, rank: int) -> int:
    return next(
        child
        for child in children(launcher)
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0")
    )


def wait_for_step(started: subprocess.Popen[str], folder: Path, step: int) -> None:
    until = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < until and started.poll() is None:
        rows = RunFolder(folder).read_metrics()
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError((folder.parents[1] / "log").read_text("utf-8"))


@pytest.mark.soak
def test_a_killed_process_costs_what_was_not_saved_and_the_job_completes_under_torchrun(tmp_path: Path) -> None:
    launcher = [*TORCHRUN, "--standalone", "--no-python", "--nproc-per-node", "2", "--max-restarts", "1"]
    with job(tmp_path, *launcher, *LM, *TRAIN, "--max-steps", "90") as started:
        run = tmp_path / "runs" / "words-gru-char"
        wait_for_step(started, run, 30)
        os.kill(worker(started.pid, 1), signal.SIGKILL)
        code = started.wait(TIMEOUT_SECONDS)
    log = (tmp_path / "log").read_text("utf-8")
    assert code == 0, log
    assert "resumes at step" in log and "Finished the plan" in log
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["words-gru-char"]
    folder = RunFolder(run)
    assert [row["step"] for row in folder.read_metrics()] == list(range(1, 91))
    assert (run / "report.json").is_file()


@pytest.mark.soak
def test_a_killed_process_ends_the_job_that_devices_started_and_another_number_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs" / "a"
    with job(tmp_path, *LM, *TRAIN, "--max-steps", "60", "--name", "a", "--devices", "2") as started:
        wait_for_step(started, run, 30)
        os.kill(worker(started.pid, 1), signal.SIGKILL)
        code = started.wait(TIMEOUT_SECONDS)
    log = (tmp_path / "log").read_text("utf-8")
    assert code == 1 and "Process 2 of 2 was ended by SIGKILL" in log, log
    assert "Traceback" not in log
    # One process, under the same lock and from the step that two of them saved.
    with caplog.at_level(logging.WARNING, logger="lm"):
        _, went_on = lm.resume("a", runs_dir=tmp_path / "runs")
    assert went_on and "processes '2' then, '1' now" in caplog.text
    assert [row["step"] for row in RunFolder(run).read_metrics()] == list(range(1, 61))


@pytest.mark.soak
def test_after_a_lost_machine_the_others_continue(tmp_path: Path) -> None:
    # Two launchers, as on two machines, of which the second dies with all that it started.
    port = free_port()
    launcher = [
        *TORCHRUN, "--no-python", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "one",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1",
        "--rdzv-conf", "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3",
    ]  # fmt: skip
    command = [*launcher, *LM, *TRAIN, "--max-steps", "400"]
    (tmp_path / "second").mkdir()
    with job(tmp_path, *command) as first:
        time.sleep(3)
        with job(tmp_path / "second", *command[:-1], "400", "--runs-dir", str(tmp_path / "runs")) as second:
            wait_for_step(first, tmp_path / "runs" / "words-gru-char", 60)
            for process in (*children(second.pid), second.pid):
                os.kill(process, signal.SIGKILL)
        code = first.wait(TIMEOUT_SECONDS)
    log = (tmp_path / "log").read_text("utf-8")
    assert code == 0 and "processes '2' then, '1' now" in log and "Finished the plan" in log, log
    rows = RunFolder(tmp_path / "runs" / "words-gru-char").read_metrics()
    assert [row["step"] for row in rows] == list(range(1, 401))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.soak
def test_a_process_that_hangs_ends_the_job_after_the_timeout(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    short = "--set", "training.timeout_seconds=10"
    with job(tmp_path, *LM, *TRAIN, *short, "--max-steps", "100000", "--name", "a", "--devices", "2") as started:
        wait_for_step(started, run, 5)
        hung = worker(started.pid, 1)
        os.kill(hung, signal.SIGSTOP)
        while "did not answer in training.timeout_seconds" not in (tmp_path / "log").read_text("utf-8"):
            assert started.poll() is None
            time.sleep(0.1)
        # Else the launcher would wait for it to save.
        os.kill(hung, signal.SIGKILL)
        assert started.wait(TIMEOUT_SECONDS) == 1
    log = (tmp_path / "log").read_text("utf-8")
    assert "Traceback" not in log


@pytest.mark.soak
def test_sigterm_to_the_launcher_saves_and_ends_all(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with job(tmp_path, *LM, *TRAIN, "--max-steps", "100000", "--name", "a", "--devices", "2") as started:
        wait_for_step(started, run, 30)
        started.send_signal(signal.SIGTERM)
        assert started.wait(TIMEOUT_SECONDS) == 128 + signal.SIGTERM
    state, _ = RunFolder(run).read_last()
    assert state["train_state"]["stop_reason"] == "interrupted"
    assert state["train_state"]["step"] == RunFolder(run).read_metrics()[-1]["step"]
    assert "Interrupted, saved at step" in (tmp_path / "log").read_text("utf-8")


@pytest.mark.slow
def test_what_the_first_process_refuses_is_said_once_and_ends_the_job(tmp_path: Path) -> None:
    with job(tmp_path, *LM, *TRAIN, "--devices", "2", "--max-steps", "5", text=False) as started:
        assert started.wait(TIMEOUT_SECONDS) == 1
    log = (tmp_path / "log").read_text("utf-8")
    assert log.count("error: ") == 1 and "There is no file or folder 'words.txt'" in log, log
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
