"""lm prepare: tokens in shards, on the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import forked


def lm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(arguments, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_shards_made_one_by_one_are_a_corpus_to_train_on(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(2):
        (texts / f"{number}.txt").write_text("".join(f"{row} and {row * number}\n" for row in range(12_000)), "utf-8")
    refused = lm(tmp_path, "prepare", "texts", "out", "--shards", "2", "--shard", "0")
    assert refused.returncode == 1 and "out has no tokenizer.json yet" in refused.stderr
    char = "--set", "tokenizer.type=char"
    assert lm(tmp_path, "prepare", "texts", "out", "--tokenizer-only", *char).returncode == 0
    for shard in ("1", "0"):
        made = lm(
            tmp_path, "prepare", "texts", "out", "--shards", "2", "--shard", shard, "--valid-every", "2", "--json"
        )
        assert made.returncode == 0, made.stderr
        (facts,) = json.loads(made.stdout)
        assert facts["shard"] == f"shard-0000{shard}-of-00002" and facts["train"] > 0 and facts["valid"] > 0
    train = (
        "train", "out", "--preset", "gru-char-small", "--max-steps", "2", "--set", "model.hidden_size=8", "--set",
        "model.table_orders=[]", "--set", "training.bptt=16", "--runs-dir", "runs", "--name", "a",
    )  # fmt: skip
    wrong = lm(tmp_path, *train, "--set", "tokenizer.type=byte")
    assert wrong.returncode == 1 and "out was prepared with its tokenizer" in wrong.stderr
    ran = lm(tmp_path, *train, "--json")
    assert ran.returncode == 0, ran.stderr
    record = json.loads((tmp_path / "runs" / "a" / "config.json").read_text("utf-8"))
    assert record["config"]["tokenizer"]["type"] == "char"
    assert "prepared in 2 shards" in record["corpus"]["notes"]
