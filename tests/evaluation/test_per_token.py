"""One row for each token: the same pass, the same sums."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lm.config import Section
from lm.corpora import encode_text
from lm.errors import ConfigError, RunError
from lm.evaluation import per_token
from lm.evaluation.per_token import Scored, check_token_file, token_file
from lm.evaluation.perplexity import score
from lm.models.base import build_model
from lm.tokenizers.byte import ByteTokenizer
from lm.tokenizers.char import CharTokenizer
from lm.tokenizers.word import WordTokenizer

TEXT = "the cat sät on the mat.\n\na dog, too\n" * 3


def rows_of(path: Path) -> list[dict[str, object]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("kind", [ByteTokenizer, CharTokenizer, WordTokenizer])
def test_the_rows_add_up_to_the_report_and_their_texts_to_the_text(
    kind: type, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_token, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr("lm.evaluation.perplexity.MAX_TOKENS_AT_ONCE", 5)
    tokenizer = kind.train([TEXT], kind.Options())
    model = build_model(Section(type="gru", hidden_size=8, embedding_size=4), tokenizer.vocab_size, seed=1)
    text = TEXT + "é"
    ids = encode_text("t", text, tokenizer).ids
    path = tmp_path / f"tokens{suffix}"
    with token_file(path, tokenizer) as watcher:
        scores = score(model, ids, watchers=[watcher])
    rows = rows_of(path)
    assert list(rows[0]) == ["token", "text", "bytes", "nats", "rank", "entropy"]
    assert [row["token"] for row in rows] == ids[1:].tolist()
    decoded = "".join(row["text"] for row in rows)
    # Words: the last one stands after a newline, so that no space is between.
    assert decoded == tokenizer.decode(ids[1:])
    assert sum(row["bytes"] for row in rows) == len(decoded.encode())
    assert math.fsum(row["nats"] for row in rows) == pytest.approx(scores.nats, rel=1e-12)
    assert sum(row["rank"] == 0 for row in rows) == scores.top1
    assert sum(row["rank"] < 5 for row in rows) == scores.top5


def test_ranks_and_entropies_are_those_worked_out_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    scored = Scored(logits, torch.tensor([0, 2, 0]), torch.zeros(3))
    # Of two equal ones, the lower id comes first.
    assert scored.rank.tolist() == [0, 2, 0]
    assert scored.entropy.tolist() == pytest.approx([1.5 * math.log(2), 1.5 * math.log(2), 0.0])
    assert scored.confidence.tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert scored.hit.tolist() == [True, False, True]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_after_an_error_the_old_file_is_unchanged_and_nothing_is_left(suffix: str, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer.train(["a"], ByteTokenizer.Options())
    path = tmp_path / f"tokens{suffix}"
    path.write_bytes(b"old")
    scored = Scored(torch.zeros(1, 256), torch.tensor([97]), torch.zeros(1))
    with pytest.raises(KeyboardInterrupt), token_file(path, tokenizer) as watcher:
        watcher(scored)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends with \.parquet or \.jsonl"):
        check_token_file(tmp_path / "tokens.csv")
    (tmp_path / "tokens.jsonl").mkdir()
    with pytest.raises(RunError, match="it is no file"):
        check_token_file(tmp_path / "tokens.jsonl")


def test_windows_give_the_tokens_in_the_order_of_the_text() -> None:
    section = Section(type="transformer", hidden_size=16, num_heads=2, num_layers=1, context_length=8)
    model = build_model(section, 7, seed=3)
    ids = np.random.default_rng(0).integers(7, size=45).astype(np.uint8)
    targets: list[int] = []
    score(model, ids, watchers=[lambda scored: targets.extend(scored.targets.tolist())])
    assert targets == ids[1:].tolist()
