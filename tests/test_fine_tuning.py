"""The end report of a fine-tuning, and the warning that the base has seen the text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lm
from lm.config import CorpusConfig, Section
from lm.corpora import PreparedCorpus, open_corpus, prepare
from lm.errors import ConfigError
from lm.evaluation.seen import Signs, signs_of_seen_text
from lm.jobs.fine_tuning import _signs
from lm.models.base import LanguageModel, State, build_model
from lm.runs.run import Run

SMALL: dict[str, Any] = {
    "model.embedding_size": 8,
    "model.hidden_size": 16,
    "model.table_orders": [],
    "training.batch_size": 4,
    "training.bptt": 16,
    "training.max_steps": 8,
    "training.warmup_steps": 0,
}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INKLING_RUNS", str(tmp_path / "runs"))


def words(seed: int, characters: int) -> str:
    """Sentences of made-up words, other ones for each seed."""
    source = random.Random(seed)
    known = ["".join(source.choices("abcdefghij", k=source.randint(2, 7))) for _ in range(400)]
    text = ""
    while len(text) < characters:
        text += " ".join(source.choices(known, k=source.randint(4, 12))) + ".\n"
    return text


def corpus_of(path: Path, text: str) -> PreparedCorpus:
    path.write_text(text, "utf-8")
    return prepare(open_corpus(CorpusConfig(source=str(path))), Section(type="byte"))


def counted(corpus: PreparedCorpus) -> LanguageModel:
    model = build_model(Section(type="ngram", order=6), corpus.tokenizer.vocab_size)
    model.fit(np.asarray(corpus.splits["train"].ids))
    return model


def signs(model: LanguageModel, corpus: PreparedCorpus) -> Signs:
    return signs_of_seen_text(model, corpus)


def test_a_base_of_unknown_text_is_found_to_have_seen_that_very_text_and_no_other(tmp_path: Path) -> None:
    mine, other = (corpus_of(tmp_path / f"{seed}.txt", words(seed, 60_000)) for seed in (1, 2))
    seen, unseen = (signs(counted(text), mine) for text in (mine, other))
    assert seen.advantage is not None and unseen.advantage is not None
    assert seen.advantage.is_seen and seen.advantage.bits_per_byte > 0.3
    assert not unseen.advantage.is_seen
    assert not unseen.has_passages and not unseen.training_passages
    assert _signs(unseen, "base", False)["note"].startswith("No sign that base has seen this text.")
    short = signs(counted(mine), corpus_of(tmp_path / "short.txt", words(3, 4_000)))
    assert short.advantage is None
    for is_conversations in (False, True):
        note = _signs(short, "base", is_conversations)["note"]
        assert note == "Whether base has seen this text was not tested: too few of its tokens were scored."


class Knows(LanguageModel):
    """Gives the next byte of a text that it memorised the highest logit, and else that of a space."""

    options: Any

    def __init__(self, text: str, vocab_size: int) -> None:
        super().__init__(None, vocab_size)
        self.text = text.encode()

    def forward(self, ids: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        logits = torch.zeros(*ids.shape, self.vocab_size)
        before = [] if state is None else state.tensors["ids"][0].tolist()
        read = [*before, *ids[0].tolist()]
        for place in range(len(before), len(read)):
            last = bytes(each for each in read[max(0, place - 15) : place + 1] if each < 256)
            found = self.text.find(last) if len(last) == 16 else -1
            following = self.text[found + 16 : found + 17] if found >= 0 else b""
            logits[0, place - len(before), following[0] if following else 32] = 5.0
        return logits, State({"ids": torch.tensor([read])})


def test_passages_that_the_base_writes_word_for_word_are_found_once_each(tmp_path: Path) -> None:
    text = words(1, 12_000)
    corpus = corpus_of(tmp_path / "mine.txt", text)
    held_out = corpus.tokenizer.decode(corpus.splits["valid"].ids[1:].tolist())
    known = text[200:700] + "\n\n" + text[1000:1150] + "\n\n" + held_out[100:400]
    found = signs(Knows(known, corpus.tokenizer.vocab_size), corpus)
    assert found.has_passages
    assert [len(each) for each in found.training_passages] == pytest.approx([484, 134], abs=2)
    assert [each in text for each in found.training_passages] == [True, True]
    assert len(found.held_out_passages) == 1
    # What the text has twice could be copied from its own beginning, and numbers can be counted on.
    twice = corpus_of(tmp_path / "twice.txt", text[:4000] + text[:4000] + words(2, 8_000))
    assert not signs(Knows(text[:700], twice.tokenizer.vocab_size), twice).training_passages
    numbers = " ".join(map(str, range(100, 3000)))
    counted_on = corpus_of(tmp_path / "numbers.txt", numbers)
    assert not signs(Knows(numbers, counted_on.tokenizer.vocab_size), counted_on).has_passages


@pytest.mark.slow
def test_the_report_compares_base_tuned_scratch_and_floor_and_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text(words(1, 20_000))
    (tmp_path / "new.txt").write_text(words(2, 20_000))
    base = lm.train(tmp_path / "old.txt", preset="gru-char", overrides=SMALL, name="base")
    worse = lm.train(tmp_path / "new.txt", preset="gru-char", overrides=SMALL, name="worse")
    better = lm.train(
        tmp_path / "new.txt", preset="gru-char", overrides={**SMALL, "training.max_steps": 40}, name="better"
    )
    bits = {run.name: run.reports()["valid"]["bits_per_byte"] for run in (worse, better)}
    assert bits["better"] < bits["worse"]
    assert base.reports()["valid"]["fine_tuning"] is None
    tuned = lm.train(tmp_path / "new.txt", init=base, name="tuned", overrides={"training.max_steps": 8})
    report = tuned.reports()["valid"]
    found = report["fine_tuning"]
    own = Run(base.folder).evaluate(text=(tmp_path / "new.txt").read_text()[-1000:])
    assert found["base"] == "base@best"
    assert found["base_bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=0.1)
    assert found["tuned_bits_per_byte"] == report["bits_per_byte"]
    assert (found["scratch"], found["scratch_bits_per_byte"]) == ("better", bits["better"])
    assert found["floor_bits_per_byte"] == report["floor_bits_per_byte"]
    assert (found["base_overlap"], found["warning"]) == (pytest.approx(0, abs=0.01), None)
    assert "| from scratch | " in tuned.card()
    # A second measurement of the same weights keeps the comparison.
    tuned.save_report(tuned.evaluate("valid"))
    assert tuned.reports()["valid"]["fine_tuning"] == found


@pytest.mark.slow
def test_the_report_warns_of_a_base_that_learned_the_same_text_and_says_that_a_base_is_gone(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(words(1, 20_000))
    base = lm.train(tmp_path / "own.txt", preset="gru-char", overrides=SMALL, name="base")
    tuned = lm.train(tmp_path / "own.txt", init=base, name="tuned", overrides={"training.max_steps": 2})
    found = tuned.reports()["valid"]["fine_tuning"]
    assert found["base_training_overlap"] == 1.0
    assert found["warning"].startswith("base@best has seen your training text: 100.0% of it")
    assert found["scratch"] == "base"
    again = lm.train(tmp_path / "own.txt", init=base, name="again", overrides={"training.max_steps": 4}, stop_after=2)
    shutil.rmtree(base.folder.path)
    resumed, _ = lm.resume("again")
    found = resumed.reports()["valid"]["fine_tuning"]
    assert again.name == "again"
    assert found["note"].startswith("The base was not measured: No run 'base'")
    assert found["base_bits_per_byte"] is None
    assert found["tuned_bits_per_byte"] is not None


@pytest.mark.slow
def test_a_model_that_learned_conversations_answers_and_ends_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{a}{b}?", "completion": "yes, sir"} for a in "abcdef" for b in "uvwxyz"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {**SMALL, "model.hidden_size": 32, "training.max_steps": 120, "training.learning_rate": 0.02}
    run = lm.train(path, preset="gru-char", overrides=overrides, name="chats")
    # `lm chat` shows a line and a newline, and stops at a blank line.
    replies = [run.sample(f"{a}w?\n", temperature=0, max_tokens=40, stop=("\n\n",)) for a in "abcdef"]
    assert set(replies) == {"yes, sir"}
    report = run.reports()["valid"]
    assert report["tokens"] + report["context_tokens"] == len(run.own_text().splits["valid"].ids) - 1
    assert run.record["corpus"]["splits"]["valid"]["tokens"] == report["tokens"]
    sample = next((run.folder.path / "samples").iterdir()).read_text()
    assert "?\nyes, " in sample


def test_models_that_learn_all_tokens_alike_refuse_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "completion": str(-n)}) + "\n" for n in range(40)))
    for options, what in (({"preset": "ngram-char"}, "a model that counts"), ({"ensemble": 2}, "an ensemble")):
        with pytest.raises(ConfigError, match=f"only the answers are learned, and {what} learns all tokens"):
            lm.train(path, max_steps=1, **options)  # type: ignore[arg-type]
