"""Instruction data: rows that are conversations, their tokens and marks, and their batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.config import CorpusConfig, Section
from lm.corpora import PreparedCorpus, TokenSplit, load_prepared, open_corpus, prepare
from lm.corpora.answers import ANSWER, CONTEXT, START, beginning
from lm.corpora.batches import ConversationBatches, conversation_bounds, make_batches
from lm.corpora.shards import learn_tokenizer
from lm.errors import CorpusError

BYTES = Section(type="byte")


def asked(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(folder: Path, rows: Sequence[Any], name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def ready(path: Path, **options: Any) -> PreparedCorpus:
    return prepare(open_corpus(CorpusConfig(source=str(path), split_fractions=(0.5, 0.5), **options)), BYTES)


def marked(split: TokenSplit) -> list[tuple[int, str]]:
    """Runs of tokens with one mark, as (mark, text)."""
    assert split.marks is not None
    found: list[tuple[int, str]] = []
    for token, mark in zip(split.ids.tolist(), split.marks.tolist(), strict=True):
        if found and found[-1][0] == mark != START:
            found[-1] = mark, found[-1][1] + chr(token)
        else:
            found.append((mark, chr(token)))
    return found


TWO = [asked("1+1?", "two"), asked("2+2?", "four\n\nor 4 ")]
EXPECTED = [
    {(START, "\n"), (CONTEXT, "1+1?\n"), (ANSWER, "two\n\n")},
    # A blank line would end the answer.
    {(START, "\n"), (CONTEXT, "2+2?\n"), (ANSWER, "four\nor 4\n\n")},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_messages_and_prompts_with_completions_are_the_same_conversations_in_every_format(
    tmp_path: Path, name: str
) -> None:
    pairs = [{"prompt": question, "completion": answer} for question, answer in (("1+1?", "two"), ("2+2?", "four"))]
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(pairs), path)
    elif name.endswith(".csv"):
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in pairs))
    elif name.endswith(".json"):
        path.write_text(json.dumps(pairs))
    else:
        write(tmp_path, pairs, name)
    same = write(tmp_path, [asked("1+1?", "two"), asked("2+2?", "four")], "messages.jsonl")
    first, second = ready(path), ready(same)
    assert first.sha256 == second.sha256
    for split, other in zip(first.splits.values(), second.splits.values(), strict=True):
        assert marked(split) == marked(other)


def test_only_answers_and_their_ends_are_marked_and_counted(tmp_path: Path) -> None:
    corpus = ready(write(tmp_path, TWO))
    assert [set(marked(split)) for split in corpus.splits.values()] in (EXPECTED, EXPECTED[::-1])
    counts = {split.counts.tokens: split.counts for split in corpus.splits.values()}
    # "four\n\nor 4": 10 bytes, 3 words; with the blank line in one and the end, 11 tokens; "2+2?\n" is context.
    assert (counts[11].bytes, counts[11].words, counts[11].context_tokens) == (10, 3, 5)
    assert counts[11].bits_per_byte(1.0) == pytest.approx(11 / 10 / np.log(2))
    again = load_prepared(corpus.key)
    assert again is not None
    assert all(marked(again.splits[name]) == marked(corpus.splits[name]) for name in corpus.splits)
    assert any("answers only:" in note for note in corpus.notes)


def test_system_messages_and_answers_in_a_prompt_are_context_and_what_follows_the_last_answer_is_dropped(
    tmp_path: Path,
) -> None:
    prompt = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
    ]  # fmt: skip
    messages = [*prompt[:3], {"role": "user", "content": "unanswered"}]
    corpus = ready(write(tmp_path, [{"prompt": prompt, "completion": "d"}, {"messages": messages}]))
    found = [marked(split) for split in corpus.splits.values()]
    assert sorted(found, key=lambda each: len(each[1][1])) == [
        [(START, "\n"), (CONTEXT, "Be brief.\n\na\n"), (ANSWER, "b\n\n")],
        [(START, "\n"), (CONTEXT, "Be brief.\n\na\nb\n\nc\n"), (ANSWER, "d\n\n")],
    ]


def test_a_table_with_a_text_column_is_text_as_before(tmp_path: Path) -> None:
    corpus = ready(write(tmp_path, [{"text": "some words", **row} for row in TWO]))
    assert all(split.marks is None for split in corpus.splits.values())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "it has no completion"),
        ({"other": 1}, "it has neither messages nor prompt and completion"),
        ({"messages": "a"}, "messages is no list of messages with role and content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "it has no message of the assistant"),
        (asked("a", "  \n"), "message 2 of messages is an empty answer"),
        ({"prompt": "a", "completion": ""}, "the message of completion is an empty answer"),
        ({"messages": [{"role": "tool", "content": "a"}, *TWO[0]["messages"]]},
         "message 1 of messages has the role 'tool', which is none of system, user, assistant"),
        ({"messages": [{"role": "user"}, *TWO[0]["messages"]]}, "message 1 of messages has no content"),
        ({"messages": [{"role": "user", "content": ["a"]}, *TWO[0]["messages"]]},
         "the content of message 1 of messages is no text"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_left_out_and_named(
    tmp_path: Path, row: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [TWO[0], row, TWO[1]])
    with caplog.at_level(logging.WARNING):
        corpus = ready(path)
    warnings = [record.message for record in caplog.records if "left out" in record.message]
    assert warnings == [f"{path}: 1 row is no conversation and was left out (line 2: {reason})."]
    assert "2 conversations" in corpus.notes[1]


def test_rows_that_are_mostly_wrong_are_an_error_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, [asked("a", ""), TWO[0], asked("b", "")])
    with pytest.raises(CorpusError, match=r"chats\.jsonl: 2 of 3 rows are no conv.* \(line 1: message 2 .*line 3"):
        ready(path)


def test_a_truncated_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, [*TWO, json.dumps(TWO[0])[:-9]])
    with pytest.raises(CorpusError, match=r"chats\.jsonl, line 3, is not JSON"):
        ready(path)


def test_what_is_for_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, TWO)
    with pytest.raises(CorpusError, match="conversations, which are split whole: leave 'line' out"):
        ready(path, split_by="line")
    with pytest.raises(CorpusError, match="--dedupe is for text"):
        ready(path, dedupe=True)
    with pytest.raises(CorpusError, match="shards hold text"):
        learn_tokenizer(CorpusConfig(source=str(path)), tmp_path / "out", BYTES, characters=10)
    (tmp_path / "b.txt").write_text("words\n")
    with pytest.raises(CorpusError, match="both conversations .* and text"):
        ready(tmp_path)


def test_equal_conversations_are_in_one_split_and_the_splits_do_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = [asked(f"{number}?", str(number)) for number in range(40)]
    first = ready(write(tmp_path, rows))
    texts = {name: {text for mark, text in marked(split) if mark == CONTEXT} for name, split in first.splits.items()}
    assert not texts["train"] & texts["valid"]
    again = ready(write(tmp_path, [*rows[::-1], *rows[:9]], "again.jsonl"))
    seen = {name: {text for mark, text in marked(split) if mark == CONTEXT} for name, split in again.splits.items()}
    assert not seen["train"] & seen["valid"]


def test_the_same_text_with_other_answers_is_another_corpus(tmp_path: Path) -> None:
    rows = [asked("x", "y"), asked("a\nb", "c")], [asked("x", "y"), asked("a", "b\nc")]
    first, second = (ready(write(tmp_path, each, f"{number}.jsonl")) for number, each in enumerate(rows))
    assert first.key != second.key


def test_a_system_message_that_all_share_is_no_leak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    system = {"role": "system", "content": "You are a patient teacher of arithmetic who answers in whole sentences."}
    rows = [
        {"messages": [system, *asked(f"What is {number}?", f"It is {number**3}.")["messages"]]} for number in range(60)
    ]
    with caplog.at_level(logging.WARNING):
        ready(write(tmp_path, rows))
    assert not [record for record in caplog.records if "training text" in record.message]


# -- batches ------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    rows = [asked("q" * (1 + number % 7), "a" * (1 + number**2 % 23) + str(number)) for number in range(80)]
    return ready(write(tmp_path, rows)).splits["train"]


def batches(split: TokenSplit, *, seed: int = 1, **options: Any) -> ConversationBatches:
    found = make_batches("streams", split, 4, 32, seed, **options)
    assert isinstance(found, ConversationBatches)
    return found


def test_an_epoch_learns_each_answer_once_in_rows_of_one_conversation(split: TokenSplit) -> None:
    made = batches(split)
    learned: list[int] = []
    for number in range(made.per_epoch):
        batch = made.batch(number)
        assert batch.fresh
        assert batch.inputs.size <= 4 * 32
        assert batch.learned is not None
        learned += batch.targets.ravel()[batch.learned].tolist()
        for row in batch.inputs:
            # The start token, a newline, stands for padding as well: the text of a row has one end.
            assert chr(row[0]) == "\n"
            assert bytes(row[1:].tolist()).rstrip(b"\n").count(b"q\n") == 1
    assert split.marks is not None
    assert sorted(learned) == sorted(split.ids[split.marks == ANSWER].tolist())


def test_the_order_is_new_in_each_epoch_and_depends_on_the_seed_and_number_alone(split: TokenSplit) -> None:
    made, again = batches(split), batches(split)
    count = made.per_epoch
    first, second = ([made.batch(epoch * count + n).targets.tolist() for n in range(count)] for epoch in (0, 1))
    assert first != second
    assert again.batch(count + 1).targets.tolist() == second[1]
    assert batches(split, seed=2).batch(0).targets.tolist() != first[0]


def test_shares_are_the_rows_of_a_batch_weighted_by_their_answers(split: TokenSplit) -> None:
    whole, shares = batches(split), [batches(split, share=(number, 2)) for number in range(2)]
    for index in range(whole.per_epoch):
        batch, parts = whole.batch(index), [share.batch(index) for share in shares]
        assert batch.learned is not None
        sizes = [0 if part.learned is None or part.weight == 0 else len(part.learned) for part in parts]
        assert sum(sizes) == len(batch.learned)
        assert [part.weight for part in parts] == pytest.approx([2 * size / len(batch.learned) for size in sizes])


def test_a_conversation_longer_than_a_row_is_cut_and_parts_without_answers_are_left_out(tmp_path: Path) -> None:
    rows = [asked("q" * 30, "a" * 12), asked("q" * 31, "b" * 12)]
    split = ready(write(tmp_path, rows)).splits["train"]
    made = batches(split, longest=10)
    parts = [made.batch(number) for number in range(made.per_epoch)]
    assert max(part.inputs.shape[1] for part in parts) <= 10
    assert sum(0 if part.learned is None else len(part.learned) for part in parts) == 14
    assert sum(len(part.inputs) for part in parts) == 2


def test_the_beginning_of_a_split_is_whole_conversations(split: TokenSplit) -> None:
    assert split.marks is not None
    bounds = conversation_bounds(split.marks)[1]
    for tokens in (1, 40, 200):
        ids, marks = beginning(split, tokens)
        assert len(ids) in bounds
        assert len(ids) <= tokens + 1 or len(ids) == bounds[0]
        assert marks is not None
        assert len(marks) == len(ids)
