"""What a message says would help is done, and helps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lm.runs.run_folder import RunFolder

pytestmark = pytest.mark.slow

Lm = Callable[..., Any]
SMALL = (
    "--max-steps 1 --set model.hidden_size=16 --set model.embedding_size=8 --set training.batch_size=4 "
    "--set training.bptt=16 --set model.table_orders=[]"
)
TRAIN = f"train words.txt {SMALL}"


class Case(NamedTuple):
    """A command that is refused, what its message has to say, and the commands that do what it says.

    `{0}`, `{1}`, … in the remedies are the groups of the pattern.
    """

    command: str
    message: str
    remedies: tuple[str, ...]


CASES = {
    "a taken name": Case(
        f"{TRAIN} --name a",
        r"choose another --name, add --overwrite .* or resume it: lm (train --resume a)$",
        (f"{TRAIN} --name b", "{0}", f"{TRAIN} --name a --overwrite"),
    ),
    "another preset's name": Case(
        f"{TRAIN} --preset lstm", r"Did you mean '(lstm-char)'", (f"{TRAIN} --preset {{0}}",)
    ),
    "another option's name": Case(
        f"{TRAIN} --set training.batchsize=2", r"Did you mean '(\w+)'", (f"{TRAIN} --set training.{{0}}=2",)
    ),
    "a list": Case(
        f"{TRAIN} --set model.table_orders=none", r"such as (\S+), or (\[\])",
        (f"{TRAIN} --set model.table_orders={{0}}", f"{TRAIN} --set model.table_orders={{1}}"),
    ),
    "a device": Case(
        f"{TRAIN} --device tpu", r"use (cpu|cuda).*leave --device out",
        (f"{TRAIN} --device {{0}}", TRAIN),
    ),
    "a scale without low precision": Case(
        f"{TRAIN} --loss-scale 8 --precision fp32", r"leave it out, or choose --precision fp16 or (bf16)",
        (f"{TRAIN} --precision fp32", f"{TRAIN} --loss-scale 8 --precision {{0}}"),
    ),
    "a level that contradicts the format": Case(
        f"{TRAIN} --amp O1 --precision fp32", r"use amp=(O1) with precision=(bf16) or fp16, or amp=(O0) with (fp32)",
        (f"{TRAIN} --amp {{0}} --precision {{1}}", f"{TRAIN} --amp {{2}} --precision {{3}}"),
    ),
    "a module that there is not": Case(
        f"{TRAIN} --precision bf16 --set training.fp32_modules=outputt",
        r"Did you mean '([\w.]+)'.*for the whole model use (--precision fp32)",
        (f"{TRAIN} --precision bf16 --set training.fp32_modules={{0}}", f"{TRAIN} {{1}}"),
    ),
    "tables too large": Case(
        f"{TRAIN} --set model.table_orders=[9] --set model.table_buckets=100000000",
        r"lower (table_buckets), or turn them off with (table_orders=\[\])",
        (
            f"{TRAIN} --set model.table_orders=[9] --set model.{{0}}=1000",
            f"{TRAIN} --set model.table_orders=[9] --set model.table_buckets=100000000 --set model.{{1}}",
        ),
    ),
    "a column": Case(
        f"train rows.jsonl {SMALL}", r"Columns: (\w+); choose one with --text-column",
        (f"train rows.jsonl {SMALL} --text-column {{0}}",),
    ),
    "two checks": Case(
        f"{TRAIN} --dry-run --verify-resume", r"(--dry-run) and --verify-resume .* give one of them",
        (f"{TRAIN} {{0}}",),
    ),
    "a run of another shape": Case(
        f"{TRAIN} --init a --set model.num_layers=2", r"leave options that change the model's shape out",
        ("train words.txt --init a --max-steps 1",),
    ),
    "another tokenizer than the run's": Case(
        f"{TRAIN} --init a --set tokenizer.unknown=skip", r"leave tokenizer options out",
        ("train words.txt --init a --max-steps 1",),
    ),
    "another preset than the run's": Case(
        "train words.txt --init a --max-steps 1 --preset gru-char", r"leave --preset out, and change .* with --set",
        ("train words.txt --init a --max-steps 1 --set training.learning_rate=0.1",),
    ),
    "other options for a resumed run": Case(
        "train --resume a --seed 4", r"To train it differently, start from it with (--init)",
        ("train words.txt {0} a --seed 4 --max-steps 1",),
    ),
    "a kept state is not resumed": Case(
        "train --resume a@step-4", r"To start from step-4, use (--init a@step-4)",
        ("train words.txt {0} --max-steps 1",),
    ),
    "a shipped run is not resumed": Case(
        "train --resume ours", r"shipped and read-only\. To train from its weights, use (--init ours)",
        ("train words.txt {0} --max-steps 1",),
    ),
    "a run without its last state": Case(
        "train --resume lastless", r"(--init) can start from it", ("train words.txt {0} lastless --max-steps 1",)
    ),
    "a length behind the run": Case(
        "train --resume a --max-steps 5", r"run 'a' is at step (\d+) already", ("train --resume a --max-steps 1{0}",)
    ),
    "a new run's corpus": Case(
        f"train --corpus words.txt {SMALL}", r"For a new run: lm (train words.txt)$", (f"{{0}} {SMALL}",)
    ),
    "a text that has moved": Case(
        "train --resume moved",
        r"There is no file or folder .* If the text is elsewhere now: lm (eval moved --corpus )PATH$",
        ("train --resume moved --corpus words.txt", "train --resume moved --max-steps 3"),
    ),
    "a text that has moved, to be scored": Case(
        "eval moved", r"If the text is elsewhere now: lm (eval moved --corpus )PATH$", ("{0}words.txt", "eval moved"),
    ),
    "a run's name": Case("sample aa", r"Did you mean '(a)'", ("sample {0} --max-tokens 2",)),
    "a run's state": Case("sample a@steep-4", r"Did you mean '(step-4)'", ("sample a@{0} --max-tokens 2",)),
    "no run": Case(
        "sample --runs-dir none", r"train one with: lm (train) FILE (--runs-dir none)",
        (f"{{0}} words.txt {{1}} {SMALL}", "sample --runs-dir none --max-tokens 2"),
    ),
    "no such run": Case(
        "sample x --runs-dir none", r"train one with: lm (train) FILE (--runs-dir none)",
        (f"{{0}} words.txt {{1}} {SMALL} --name x", "sample x --runs-dir none --max-tokens 2"),
    ),
    "no such state": Case(
        "sample a --state s", r"It has none yet: lm (state save) makes one",
        ("{0} a s --text short.txt", "sample a --state s --max-tokens 2"),
    ),
    "a state of other weights": Case(
        "sample a --state old", r"Make it again with: lm (state save a --text )FILE old",
        ("{0}short.txt old", "sample a --state old --max-tokens 2"),
    ),
    "a symbol that is refused": Case(
        "sample a --prompt ☃ --unknown error", r"unknown.* (skip)",
        ("sample a --prompt ☃ --unknown {0} --max-tokens 2",),
    ),
    "a prompt without its flag": Case(
        "sample a ROMEO", r"give the prompt with (--prompt)", ("sample a {0} ROMEO --max-tokens 2",)
    ),
    "a split": Case("eval a --split tset", r"its corpus has train, valid, (test)", ("eval a --split {0}",)),
    "a stride without a window": Case("eval a --stride 4", r"leave --stride out", ("eval a",)),
    "a precision": Case("eval a --precision fp8", r"use (fp32), .*(int8) or int4", ("eval a --precision {1}",)),
    "a figure": Case("plot a --metric los", r"Did you mean '(loss)'", ("plot a --metric {0} --output x.svg",)),
    "an axis": Case("plot a --by loss", r"use step, tokens, (time)", ("plot a --by {0} --output x.svg",)),
    "shards without a tokenizer": Case(
        "prepare parts out --shard 0 --shards 2", r"learn it first, with lm (prepare) SOURCE OUT (--tokenizer-only)",
        ("{0} parts out {1} --set tokenizer.size=300", "prepare parts out --shard 0 --shards 2 --valid-every 2"),
    ),
    "a shard that is missing": Case(
        f"train shards {SMALL}", r"Make them with lm (prepare) SOURCE OUT (--shards 2 --shard) N",
        ("{0} parts shards {1} 1 --valid-every 2", f"train shards {SMALL}"),
    ),
}  # fmt: skip


def typed(lm: Lm, command: str) -> Any:
    """What a command leaves that is typed as it stands."""
    return lm(*command.split())


@pytest.fixture
def place(lm: Lm, runs: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs that some cases need, and their texts, in the folder that commands run in."""
    folder = runs.parent
    (folder / "words.txt").write_bytes(text.read_bytes())
    (folder / "short.txt").write_text(text.read_text()[:600])
    (folder / "tiny.txt").write_text(text.read_text()[:100])
    (folder / "rows.jsonl").write_text(
        "".join(f"{json.dumps({'body': line})}\n" for line in text.read_text().splitlines())
    )
    return folder


def _prepared(lm: Lm, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one case alone needs."""
    runs = folder / "checkpoints"
    if "shipped" in name:
        shutil.copytree(runs / "a", folder / "shipped" / "ours")
        record = json.loads((folder / "shipped" / "ours" / "config.json").read_text())
        RunFolder(folder / "shipped" / "ours").write_record({**record, "shipped": True})
    if name == "a run without its last state":
        shutil.copytree(runs / "a", runs / "lastless")
        shutil.rmtree(runs / "lastless" / "last")
    if "moved" in name:
        (folder / "there.txt").write_bytes((folder / "words.txt").read_bytes())
        assert typed(lm, f"train there.txt --name moved {SMALL} --max-steps 2 --stop-after 1").code == 0
        (folder / "there.txt").unlink()
        monkeypatch.setenv("INKLING_CACHE", str(folder / "cache"))
    if name == "a state of other weights":
        assert lm("state", "save", "a", "old", "--text", "tiny.txt").code == 0
        assert lm("train", "--resume", "a", "--max-steps", "40").code == 0
    if "shard" in name:
        (folder / "parts").mkdir()
        for number in range(4):
            (folder / "parts" / f"{number}.txt").write_bytes(40 * (folder / "words.txt").read_bytes())
    if name == "a shard that is missing":
        assert typed(lm, "prepare parts shards --tokenizer-only --set tokenizer.size=300").code == 0
        assert typed(lm, "prepare parts shards --shards 2 --shard 0 --valid-every 2").code == 0


@pytest.mark.parametrize("name", CASES)
def test_what_a_message_says_would_help_helps(lm: Lm, place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepared(lm, place, name, monkeypatch)
    command, message, remedies = CASES[name]
    done = typed(lm, command)
    assert done.code == 1, done.out
    said = re.search(message, done.err.strip().splitlines()[-1])
    assert said is not None, done.err
    for remedy in remedies:
        done = typed(lm, remedy.format(*said.groups()))
        assert done.code == 0, (remedy.format(*said.groups()), done.err)
