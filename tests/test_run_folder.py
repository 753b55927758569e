"""Run folders: a kill or a full disk at any instant leaves a whole state, and nothing damaged is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm import files
from lm.errors import (
    CorruptRunError,
    FormatVersionError,
    LMError,
    RunError,
    RunExistsError,
    RunLockedError,
    RunNotFoundError,
    VocabMismatchError,
)
from lm.files import Arrays, digest, map_arrays, pack_arrays, read_arrays, write_file
from lm.runs import run_folder
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder, find_run, list_runs
from lm.tokenizers.char import CharOptions, CharTokenizer

SHIPPED = run_folder.shipped_folder()
TOKENIZER = CharTokenizer.train(["abc\n"], CharOptions(type="char"))
OTHER_TOKENIZER = CharTokenizer.train(["abcd\n"], CharOptions(type="char"))
WEIGHTS: Arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3, np.int64)}


def record(**changes: Any) -> dict[str, Any]:
    split = {"sha256": "ab", "tokens": 3, "characters": 3}
    return {
        "inkling": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "parameters": 6,
        "corpus": {"name": "abc", "sha256": "cd", "key": "k", "notes": [], "splits": {"train": split, "valid": split}},
        "config": {"model": {"type": "gru"}},
        **changes,
    }


def make_run(path: Path, *, step: int = 5, **changes: Any) -> RunFolder:
    run = RunFolder(path)
    run.create(record(**changes), TOKENIZER)
    run.write_best(WEIGHTS, step=step, valid_loss=1.5)
    save_last(run, step)
    return run


def save_last(run: RunFolder, step: int) -> None:
    tensors: dict[str, Arrays] = {
        "model": {"w": np.full((2, 3), step, np.float32)},
        "random": {"cpu": np.arange(4, dtype=np.uint8)},
    }
    state = {"train_state": {"step": step}, "files": sorted(tensors)}
    files = {f"{name}.safetensors": run.pack_weights(arrays, step=step) for name, arrays in tensors.items()}
    run.write_last({**files, "state.json": run.pack_state(state)})


def last_step(run: RunFolder) -> int:
    state, tensors = run.read_last()
    step = int(state["train_state"]["step"])
    assert (tensors["model"]["w"] == step).all()
    return step


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "checkpoints" / "a")


@pytest.fixture(autouse=True)
def no_shipped_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: tmp_path / "shipped")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- files --------------------------------------------------------------------------------------------


def test_tensors_come_back_as_they_were() -> None:
    arrays: Arrays = {
        "half": np.array([1.5, -2], np.float16), "ids": np.array([[1], [2]], np.uint16),
        "empty": np.zeros((0, 3), np.float32),
        "one": np.array(7.25), "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }  # fmt: skip
    path = Path(os.environ["INKLING_CACHE"]).parent / "x.safetensors"
    path.write_bytes(pack_arrays(arrays, {"step": "3"}))
    back, metadata = read_arrays(path)
    assert metadata["step"] == "3"
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "x.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"Cannot write .*x.json: No space left on device.*untouched"):
        write_file(tmp_path / "x.json", "new")
    assert content(tmp_path) == {"x.json": b"old"}


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="is no file"):
        write_file(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"Cannot write .*file/x.json: (File exists|Not a directory)"):
        write_file(tmp_path / "file" / "x.json", "new")


# -- making a run -------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_by_default(run: RunFolder) -> None:
    before = content(run.path)
    with pytest.raises(RunExistsError, match="exists already.*--overwrite"):
        run.create(record(), TOKENIZER)
    assert content(run.path) == before
    (run.path / "samples").mkdir()
    run.create(record(parameters=7), OTHER_TOKENIZER, overwrite=True)
    assert run.read_record()["parameters"] == 7
    assert sorted(content(run.path)) == ["config.json", "tokenizer.json"]


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(RunExistsError):
        RunFolder(tmp_path / "thesis").create(record(), TOKENIZER, overwrite=True)
    assert content(tmp_path / "thesis") == {"chapter.txt": b"years of work"}


def test_a_shipped_run_is_never_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "s", shipped=True)
    with pytest.raises(RunExistsError, match="shipped with Inkling and read-only"):
        run.create(record(), TOKENIZER, overwrite=True)


def test_a_kill_while_overwriting_leaves_a_folder_that_can_be_overwritten(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def die(path: Path, missing_ok: bool = False) -> None:
        if path.name == "config.json":
            raise SystemExit
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", die)
    with pytest.raises(SystemExit):
        run.create(record(), TOKENIZER, overwrite=True)
    monkeypatch.undo()
    assert list(content(run.path)) == ["config.json"]
    run.create(record(), TOKENIZER, overwrite=True)


# -- deleting -----------------------------------------------------------------------------------------


def test_a_deleted_run_is_gone_with_its_files_and_its_name_is_free(run: RunFolder) -> None:
    other = make_run(run.path.with_name("other"))
    before = content(other.path)
    run.delete()
    assert os.listdir(run.path.parent) == ["other"] and content(other.path) == before
    assert make_run(run.path).read_record()


def test_what_a_kill_leaves_of_a_deleted_run_is_no_run_and_goes_with_the_next(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any, **options: Any) -> None:
        raise SystemExit

    runs_dir = run.path.parent
    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(SystemExit):
        run.delete()
    monkeypatch.undo()
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: runs_dir / "none")
    assert list_runs(runs_dir) == [] and len(os.listdir(runs_dir)) == 1
    make_run(runs_dir / "b").delete()
    assert os.listdir(runs_dir) == []


def test_a_run_that_is_trained_is_not_deleted(run: RunFolder) -> None:
    before = content(run.path)
    with run.lock(), pytest.raises(RunLockedError, match="being trained"):
        RunFolder(run.path).delete()
    assert content(run.path).items() >= before.items()


def test_neither_a_shipped_run_nor_what_is_no_run_is_deleted(tmp_path: Path) -> None:
    shipped = make_run(tmp_path / "s", shipped=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(RunError, match="shipped with Inkling"):
        shipped.delete()
    for name in ("thesis", "missing"):
        with pytest.raises(RunNotFoundError, match="is not a run"):
            RunFolder(tmp_path / name).delete()
    assert content(tmp_path) == before


def test_deleting_follows_no_link(run: RunFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "letter.txt").write_text("dear")
    (run.path / "samples").symlink_to(elsewhere)
    linked = make_run(tmp_path / "real")
    run.path.with_name("link").symlink_to(linked.path)
    with pytest.raises(RunError, match="is a link to another folder"):
        RunFolder(run.path.with_name("link")).delete()
    run.delete()
    assert content(elsewhere) == {"letter.txt": b"dear"} and linked.read_record()


def test_a_run_that_the_disk_does_not_let_go_stays_whole(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(run.path)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match=r"Cannot delete .*Permission denied"):
        run.delete()
    assert content(run.path).items() >= before.items()


# -- the lock -----------------------------------------------------------------------------------------


def test_two_trainers_do_not_share_a_run(run: RunFolder) -> None:
    with (
        run.lock(),
        pytest.raises(RunLockedError, match="being trained by another process"),
        RunFolder(run.path).lock(),
    ):
        pass
    with RunFolder(run.path).lock():
        pass


def test_the_refused_trainer_leaves_the_first_ones_lock_alone(tmp_path: Path) -> None:
    # The first has not made its run yet: the folder holds nothing but the lock.
    run = RunFolder(tmp_path / "new")
    with run.lock():
        for _ in range(2):
            with pytest.raises(RunLockedError), RunFolder(run.path).lock():
                pass
        run.create(record(), TOKENIZER)
    assert run.read_record()


def test_a_job_that_made_no_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "new").lock():
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_the_lock_of_a_killed_job_takes_no_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new")
    run.path.mkdir()
    (run.path / ".lock").touch()
    assert not run.taken
    run.create(record(), TOKENIZER)
    assert run.taken


def test_a_lock_ends_with_its_process(run: RunFolder) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lm.runs.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError), run.lock():
            pass
        holder.kill()
        holder.wait()
    with run.lock():
        pass


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="Cannot write to .*file/a"), RunFolder(tmp_path / "file" / "a").lock():
        pass


# -- last/: every instant ------------------------------------------------------------------------------


def instants(run: RunFolder) -> list[str]:
    """Every system call that `write_last` makes to change the disk, in order."""
    calls: list[str] = []
    watched_calls(run, calls, None)
    return calls


class Dead(BaseException):
    """The process is killed here."""


def watched_calls(run: RunFolder, calls: list[str], die_at: int | None, error: BaseException | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def call(*args: Any, **options: Any) -> Any:
                calls.append(name)
                if len(calls) - 1 == die_at:
                    raise error or Dead
                return original(*args, **options)

            patch.setattr(owner, name, call)

        for owner, name in (
            (Path, "mkdir"), (run_folder, "write_synced"), (run_folder, "sync_folder"), (Path, "rename"),
            (shutil, "rmtree"), (os, "fsync"),
        ):  # fmt: skip
            watch(owner, name)
        save_last(run, 6)


def test_a_kill_between_any_two_calls_leaves_a_whole_state(tmp_path: Path) -> None:
    total = len(instants(make_run(tmp_path / "count")))
    assert total > 10
    seen = set()
    for die_at in range(total):
        run = make_run(tmp_path / f"run-{die_at}")
        with pytest.raises(Dead):
            watched_calls(run, [], die_at)
        seen.add(last_step(run))
        assert run.has_last()
        # Whatever the kill left behind, the next save works.
        save_last(run, 7)
        assert last_step(run) == 7
        assert sorted(path.name for path in run.path.iterdir()) == [
            "config.json", "last", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip
    assert seen == {5, 6}


@pytest.mark.parametrize("errno_text", [(28, "No space left on device"), (30, "Read-only file system")])
def test_an_error_of_the_disk_at_any_call_is_a_sentence_and_leaves_a_whole_state(
    tmp_path: Path, errno_text: tuple[int, str]
) -> None:
    calls = instants(make_run(tmp_path / "count"))
    for die_at in range(len(calls)):
        if calls[die_at] == "rmtree":
            continue  # its errors are ignored by its own option
        run = make_run(tmp_path / f"run-{die_at}")
        with pytest.raises(RunError, match=f"Cannot write .*last: {errno_text[1]}.*untouched"):
            watched_calls(run, [], die_at, OSError(*errno_text))
        assert last_step(run) in (5, 6)


def test_half_a_written_file_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a")

    def half(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise Dead

    monkeypatch.setattr(run_folder, "write_synced", half)
    monkeypatch.setattr(files, "write_synced", half)
    for write in (lambda: save_last(run, 6), lambda: run.write_best({"w": np.zeros(3, np.float32)}, step=6)):
        with pytest.raises(Dead):
            write()
    monkeypatch.undo()
    assert last_step(run) == 5
    arrays, facts = run.read_weights()
    assert facts["step"] == 5
    np.testing.assert_array_equal(arrays["w"], WEIGHTS["w"])


WRITER = """
import sys
from pathlib import Path
import numpy as np
from lm.runs.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
print("ready", flush=True)
for step in range(1, 1_000_000):
    arrays = {"w": np.full((400, 300), step, np.float32)}
    run.write_best(arrays, step=step)
    packed = run.pack_weights(arrays, step=step)
    state = run.pack_state({"train_state": {"step": step}, "files": ["model", "random"]})
    run.write_last({"model.safetensors": packed, "random.safetensors": packed, "state.json": state})
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_whole_states(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    rng = np.random.default_rng(1)
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run.path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            time.sleep(float(rng.uniform(0.02, 0.15)))
            writer.send_signal(signal.SIGKILL)
        assert last_step(run) >= 1
        arrays, facts = run.read_weights()
        assert (arrays["w"] == facts["step"]).all() or facts["step"] == 5


# -- what is damaged is refused ---------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_truncated_weights_are_refused(run: RunFolder, keep: int) -> None:
    path = run.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    before = content(run.path)
    with pytest.raises(CorruptRunError, match=r"model\.safetensors is damaged"):
        run.read_weights()
    assert content(run.path) == before


def test_every_flipped_bit_of_weights_is_noticed(run: RunFolder) -> None:
    path = run.path / "model.safetensors"
    whole = path.read_bytes()
    _, known = run.read_weights()
    for place in range(len(whole)):
        flip(path, place)
        try:
            arrays, facts = run.read_weights()
        except LMError as error:
            assert "model.safetensors" in str(error)
        else:
            # Padding between header and tensors is all that may change unseen.
            assert facts == known
            assert all(np.array_equal(arrays[name], WEIGHTS[name]) for name in WEIGHTS)
        path.write_bytes(whole)
    flip(path, len(whole) - 1)
    with pytest.raises(CorruptRunError, match="fails its hash"):
        run.read_weights()


def test_equal_weights_and_facts_give_equal_bytes() -> None:
    assert len({pack_arrays(WEIGHTS, {"step": 3, "epoch": None, "valid_loss": 1.5}) for _ in range(20)}) == 1


@pytest.mark.parametrize("garbage", [b"", b"\x80\x04K\x01.", b"PK\x03\x04", b"{}", b"\xff" * 64, b"\x00" * 4096])
def test_garbage_in_place_of_weights_is_refused(run: RunFolder, garbage: bytes) -> None:
    (run.path / "model.safetensors").write_bytes(garbage)
    with pytest.raises(CorruptRunError, match=r"model\.safetensors"):
        run.read_weights()


def test_missing_weights_are_named(run: RunFolder) -> None:
    (run.path / "model.safetensors").unlink()
    with pytest.raises(RunNotFoundError, match=r"model\.safetensors is missing"):
        run.read_weights()


def test_weights_of_a_newer_format_are_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FORMAT_VERSION", 2)
    data = pack_arrays(WEIGHTS)
    monkeypatch.undo()
    (run.path / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatVersionError, match=r"model\.safetensors has format version 2.*upgrade Inkling"):
        run.read_weights()


def edit(run: RunFolder, **changes: Any) -> None:
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    for place, value in changes.items():
        *parents, last = place.split("__")
        part = config
        for name in parents:
            part = part[name]
        part[last] = value
    # Signed anew, as one would who knows of the hash: what is refused is refused for another reason.
    if "sha256" in config:
        config["sha256"] = digest({key: value for key, value in config.items() if key != "sha256"})
    path.write_text(json.dumps(config))


def test_an_edit_by_hand_is_refused_whatever_it_changes(run: RunFolder) -> None:
    path = run.path / "config.json"
    whole = path.read_text()
    for edited in (whole.replace('"created": "', '"created": "1'), whole.replace('"vocab_size": ', '"vocab_size": 1')):
        assert edited != whole
        path.write_text(edited)
        with pytest.raises(CorruptRunError, match=r"config\.json fails its hash.*--init"):
            run.read_record()


def test_a_run_of_a_newer_inkling_is_refused(run: RunFolder) -> None:
    edit(run, format_version=99)
    with pytest.raises(FormatVersionError, match=r"config\.json has format version 99, this Inkling reads up to 1"):
        run.read_record()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"format_version": "1"}', "\xff", "{" * 100_000, '{"a":' * 5000]
)
def test_a_damaged_configuration_is_refused(run: RunFolder, text: str) -> None:
    (run.path / "config.json").write_text(text, "latin-1")
    with pytest.raises(CorruptRunError, match=r"config\.json"):
        run.read_record()


@pytest.mark.parametrize(
    "place",
    ["tokenizer_sha256", "vocab_size", "parameters", "created", "inkling", "corpus", "corpus__key", "corpus__splits",
     "corpus__notes", "config", "config__model", "corpus__splits__valid"],
)  # fmt: skip
def test_a_configuration_that_lacks_a_part_names_it(run: RunFolder, place: str) -> None:
    edit(run, **{place: None})
    with pytest.raises(CorruptRunError, match=rf"config\.json has no proper '{place.replace('__', '.')}"):
        run.read_record()


def test_weights_are_refused_where_the_model_options_were_edited(run: RunFolder) -> None:
    edit(run, config__model={"type": "gru", "hidden_size": 3})
    for read in (run.read_weights, run.read_last):
        with pytest.raises(
            VocabMismatchError, match=r"safetensors was not trained with the model options in this folder"
        ):
            read()


def test_a_foreign_tokenizer_is_refused(run: RunFolder) -> None:
    OTHER_TOKENIZER.save(run.path / "tokenizer.json")
    vocabulary = (OTHER_TOKENIZER.vocab_size, TOKENIZER.vocab_size)
    with pytest.raises(
        VocabMismatchError, match=rf"tokenizer\.json \({vocabulary[0]} tokens.*trained with \({vocabulary[1]}"
    ):
        run.read_tokenizer()


def test_a_foreign_tokenizer_with_an_edited_configuration_is_refused_by_the_weights(run: RunFolder) -> None:
    OTHER_TOKENIZER.save(run.path / "tokenizer.json")
    edit(run, tokenizer_sha256=OTHER_TOKENIZER.sha256)
    with pytest.raises(VocabMismatchError, match="not trained with the tokenizer"):
        run.read_weights()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format_version": 1, "type": "char"}'])
def test_a_damaged_tokenizer_is_refused(run: RunFolder, text: str) -> None:
    (run.path / "tokenizer.json").write_text(text)
    with pytest.raises(CorruptRunError, match=r"tokenizer\.json"):
        run.read_tokenizer()


def test_an_edited_state_is_refused(run: RunFolder) -> None:
    path = run.path / "last" / "state.json"
    path.write_text(path.read_text().replace('"step": 5', '"step": 4'))
    with pytest.raises(CorruptRunError, match=r"state\.json fails its hash"):
        run.read_last()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": null}'])
def test_a_damaged_state_is_refused(run: RunFolder, text: str) -> None:
    (run.path / "last" / "state.json").write_text(text)
    with pytest.raises(CorruptRunError, match=r"state\.json"):
        run.read_last()


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "random.safetensors"])
def test_a_missing_part_of_last_is_named(run: RunFolder, name: str) -> None:
    (run.path / "last" / name).unlink()
    with pytest.raises(RunNotFoundError, match=rf"last/{re.escape(name)} is missing"):
        run.read_last()


def test_a_run_without_last_says_what_can_be_done(run: RunFolder) -> None:
    shutil.rmtree(run.path / "last")
    with pytest.raises(RunNotFoundError, match="cannot be resumed; --init can start from it"):
        run.read_last()
    assert not run.has_last()


def test_a_hash_is_of_the_value_not_of_how_it_is_written() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest(json.loads('{"b":[1,  2],"a":1}'))
    assert digest({"a": 1}) != digest({"a": 2})


# -- metrics -----------------------------------------------------------------------------------------------


def test_lines_after_the_resumed_step_are_cut_and_half_a_line_is_no_line(run: RunFolder) -> None:
    for step in range(1, 6):
        run.append_metrics({"step": step, "train_loss": 1 / step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('3\n{"no": "step"}\n{"step": 6, "train_lo')
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4, 5]
    run.cut_metrics(3)
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]
    assert (run.path / "metrics.jsonl").read_text().count("\n") == 3


def test_metrics_on_a_full_disk_are_a_sentence(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"Cannot write .*metrics\.jsonl: Is a directory"):
        run.append_metrics({"step": 1})


# -- finding runs --------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two of the user's, b newer than a, and two shipped, one of them called as a."""
    folder = tmp_path / "runs"
    for age, name in ((100, "b"), (200, "a")):
        run = make_run(folder / name)
        run.write_step("step-2", WEIGHTS, step=2)
        for path in run.path.rglob("*"):
            os.utime(path, (time.time() - age,) * 2)
    for name in ("a", "poet"):
        make_run(tmp_path / "shipped" / name, shipped=True)
    return folder


def test_a_name_finds_the_users_run_before_a_shipped_one(runs: Path, tmp_path: Path) -> None:
    assert find_run("a", runs) == (RunFolder(runs / "a"), "best")
    assert find_run("poet", runs) == (RunFolder(tmp_path / "shipped" / "poet"), "best")


def test_a_path_finds_a_run_anywhere(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run(str(runs / "b"), tmp_path / "elsewhere")[0].path == runs / "b"
    monkeypatch.chdir(tmp_path)
    assert find_run("runs/b@last", Path("elsewhere")) == (RunFolder(Path("runs/b")), "last")


def test_a_state_follows_the_name(runs: Path) -> None:
    assert find_run("a@last", runs) == (RunFolder(runs / "a"), "last")
    assert find_run("a@step-2", runs)[1] == "step-2"
    assert find_run("poet@last", runs)[1] == "last"


def test_a_path_may_hold_an_at_sign(tmp_path: Path) -> None:
    make_run(tmp_path / "me@home" / "a")
    assert find_run(str(tmp_path / "me@home" / "a"), tmp_path) == (RunFolder(tmp_path / "me@home" / "a"), "best")
    assert find_run(f"{tmp_path}/me@home/a@last", tmp_path)[1] == "last"


def test_the_newest_run_is_the_users_last_trained(runs: Path) -> None:
    assert find_run(None, runs)[0].name == "b"
    RunFolder(runs / "a").write_best(WEIGHTS, step=9)
    assert find_run(None, runs)[0].name == "a"


def test_a_shipped_run_is_newest_only_where_the_user_has_none(runs: Path, tmp_path: Path) -> None:
    assert [run.name for run in list_runs(runs)] == ["b", "a", "poet"]
    (tmp_path / "none-yet").mkdir()
    assert find_run(None, tmp_path / "none-yet")[0].path == tmp_path / "shipped" / "a"
    with pytest.raises(RunNotFoundError, match="There is no folder"):
        find_run(None, tmp_path / "nowhere")


def test_in_a_checkout_shipped_runs_lie_among_the_users_and_are_still_last(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(runs / "poem", shipped=True)
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: runs)
    assert [run.name for run in list_runs(runs)] == ["b", "a", "poem"]
    assert find_run(None, runs)[0].name == "b"


def test_an_unknown_run_is_answered_with_the_nearest(runs: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"No run 'poett' in .*runs\. Did you mean 'poet'\? Runs: b, a, poet\."):
        find_run("poett@last", runs)


def test_an_unknown_checkpoint_is_an_error_that_lists_the_others(runs: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"has no checkpoint 'step-3'.*Checkpoints: best, last, step-2"):
        RunFolder(runs / "a").weights_path("step-3")


def test_no_run_at_all_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="There is no run .*lm train FILE"):
        find_run(None, tmp_path)
    with pytest.raises(RunNotFoundError, match="No run 'a' .*There are none yet: train one with: lm train FILE"):
        find_run("a", tmp_path)


def test_a_folder_that_is_no_run_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(RunNotFoundError, match=r"is a folder without config\.json, so it is not a run"):
        find_run(str(tmp_path / "texts"), tmp_path)


def test_a_broken_run_among_others_hides_none(runs: Path) -> None:
    (runs / "b" / "config.json").write_text("{")
    (runs / "empty").mkdir()
    (runs / "note.txt").write_text("x")
    assert {run.name for run in list_runs(runs)} == {"a", "b", "poet"}


def test_kept_states_are_in_the_order_of_training(run: RunFolder) -> None:
    for step in (1000, 20, 3):
        run.write_step(f"step-{step}", WEIGHTS, step=step)
    assert run.kept_checkpoints() == ["step-3", "step-20", "step-1000"]
    run.drop_step("step-20")
    assert run.kept_checkpoints() == ["step-3", "step-1000"]


def test_old_names_of_a_runs_checkpoint_and_snapshots_still_work_with_a_warning(tmp_path: Path) -> None:
    loaded_run = Run(make_run(tmp_path / "a"), "last")
    with pytest.warns(DeprecationWarning, match=r"Run\.state is now Run\.checkpoint"):
        assert loaded_run.state == loaded_run.checkpoint == "last"
    with pytest.warns(DeprecationWarning, match=r"Run\.states is now Run\.snapshots"):
        assert loaded_run.states is loaded_run.snapshots
    assert loaded_run.snapshots.names() == []


def test_the_shipped_runs_are_found() -> None:
    assert {"shakespeare-gru", "wikitext-gru"} <= {path.parent.name for path in SHIPPED.glob("*/config.json")}


def test_mapped_arrays_are_those_of_the_file_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "step": np.array(7.0, np.float32),
        "b": np.array([True]),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack_arrays(arrays, {"step": 3}))
    mapped, facts = map_arrays(path)
    assert facts["step"] == 3 and mapped.keys() == arrays.keys()
    for name, array in arrays.items():
        assert mapped[name].dtype == array.dtype and isinstance(mapped[name], np.memmap)
        np.testing.assert_array_equal(mapped[name], array)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptRunError, match="is damaged"):
        map_arrays(path)


def test_the_folder_of_a_killed_import_is_removed_by_the_next_and_that_of_a_running_one_is_not(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from lm.runs.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).built() as partial:\n"
        "    (partial.path / 'model.safetensors').write_bytes(bytes(1000)); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.") and (left / "model.safetensors").exists()

    def age() -> None:
        for path in tmp_path.glob(".*.partial"):
            os.utime(path, (0, 0))

    with RunFolder(tmp_path / "b").built() as partial:
        # The one that was left is too young: its process might be about to lock it.
        assert {left, partial.path} == set(tmp_path.iterdir())
        partial.create(record(), TOKENIZER)
        age()
        make_run(tmp_path / "c")
        assert {path.name for path in tmp_path.iterdir()} == {"c", partial.path.name}
        partial.write_best(WEIGHTS, step=1)
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
