"""A disk that is full, and a folder that becomes read-only, while `lm train` saves: a sentence, and nothing is lost."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import lm
from lm.runs.run_folder import RunFolder
from tests import forked
from tests.training.conftest import make_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts are those of Linux"),
]
ROOT = Path(__file__).parents[2]
STEPS = 120
DISK_BYTES = 600_000
FILE_BYTES = 60_000
"""Weights and optimizer fit in, a metrics.jsonl of all lines does not."""
TIMEOUT_SECONDS = 120
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


def train(folder: Path, *arguments: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    special = {} if before is None else {"preexec_fn": before}
    return forked.Popen(
        ["train", *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", **special,
    )  # fmt: skip


def a_run(*more: str) -> list[str]:
    options = {
        "model.hidden_size": 32, "model.embedding_size": 8, "model.table_orders": "[]", "model.dropout": 0.2,
        "training.batch_size": 4, "training.bptt": 16, "training.evaluate_every": 4, "training.warmup_steps": 0,
        "training.validation_tokens": 50, "training.sample_tokens": "none",
    }  # fmt: skip
    sets = [part for path, value in options.items() for part in ("--set", f"{path}={value}")]
    return ["words.txt", "--preset", "gru-char", "--name", "a", "--max-steps", str(STEPS), *sets, *more]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "words.txt"
    path.write_text(make_text(9000), "utf-8")
    return path


@pytest.fixture(scope="module")
def straight(text: Path) -> RunFolder:
    """The run that met no obstacle."""
    done = train(text.parent, *a_run())
    _, said = done.communicate(timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, said
    return RunFolder(text.parent / "checkpoints" / "a")


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[tuple[Callable[[], None] | None, Callable[[], None]]]:
    """A disk of `DISK_BYTES` at `place`; where this process may not mount one, a limit on the length of any file.

    Gives what the process that writes has to do first, and what makes room.
    """
    place.mkdir()

    def mount(options: str) -> bool:
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        except OSError:
            return False
        return done.returncode == 0

    if not mount(f"size={DISK_BYTES}"):
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.RLIM_INFINITY)), lambda: None
        return
    try:
        yield None, lambda: None if mount("remount,size=100M") else pytest.fail("no room could be made")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def assert_ends_like(run: RunFolder, straight: RunFolder, folder: Path) -> None:
    """It goes on from what it has, to the same bits."""
    lm.resume("a", runs_dir=folder / "checkpoints")
    for state in ("best", "last"):
        for name, array in straight.read_weights(state)[0].items():
            np.testing.assert_array_equal(run.read_weights(state)[0][name], array)


def test_a_disk_that_fills_up_ends_training_with_a_sentence_and_the_saved_state_whole(
    tmp_path: Path, text: Path, straight: RunFolder
) -> None:
    (tmp_path / "words.txt").write_bytes(text.read_bytes())
    with small_disk(tmp_path / "checkpoints") as (before, make_room):
        # Weights are kept every 4 steps, until there is no room for more; under a limit, metrics.jsonl grows too long.
        writer = train(tmp_path, *a_run("--set", "training.checkpoint_every=4", "--set", "training.log_every=1"),
                       before=before)  # fmt: skip
        _, said = writer.communicate(timeout=TIMEOUT_SECONDS)
        assert writer.returncode == 1
        last = said.strip().splitlines()[-1]
        assert re.match(r"error: Cannot write .*(No space left on device|File too large)", last), said
        assert "Traceback" not in said
        run = RunFolder(tmp_path / "checkpoints" / "a")
        step = run.read_last()[0]["train_state"]["step"]
        assert 4 <= step < STEPS
        run.read_weights()
        make_room()
        assert_ends_like(run, straight, tmp_path)


def without_rights_of_root() -> None:
    """Root writes wherever it likes; this process, and what it becomes, no more."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError("this root cannot give up its rights")


def test_a_folder_that_becomes_read_only_ends_training_with_a_sentence_and_the_saved_state_whole(
    tmp_path: Path, text: Path, straight: RunFolder
) -> None:
    (tmp_path / "words.txt").write_bytes(text.read_bytes())
    path = tmp_path / "checkpoints" / "a"
    writer = train(tmp_path, *a_run(), before=without_rights_of_root)
    while not (path / "metrics.jsonl").exists() and writer.poll() is None:
        time.sleep(0.002)
    path.chmod(0o555)
    _, said = writer.communicate(timeout=TIMEOUT_SECONDS)
    path.chmod(0o755)
    assert writer.returncode == 1, said
    assert re.match(r"error: Cannot write .*: Permission denied\..*untouched", said.strip().splitlines()[-1]), said
    run = RunFolder(path)
    assert run.read_last()[0]["train_state"]["step"] < STEPS
    assert_ends_like(run, straight, tmp_path)
