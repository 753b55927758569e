"""Conversations are compared by their answers, whatever renders the turns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lm
from lm.comparison.compared_text import _moved, of_conversations
from lm.comparison.texts import split_text
from lm.corpora import open_text
from lm.errors import CorpusError
from lm.runs.run import Run
from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.cli import conftest as cli_conftest
from tests.cli.conftest import Lm
from tests.test_jobs import SMALL, make_text
from tests.tokenizers.tiny_pretrained import CONFIG, byte_level, make_run, sentencepiece_like

pytestmark = pytest.mark.slow

program = cli_conftest.lm
"""The fixture, under a name that leaves `lm` to the library."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, and under checkpoints/ runs that read them in four ways."""
    folder = tmp_path_factory.mktemp("answers")
    runs, chats = folder / "checkpoints", folder / "chats.jsonl"
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"It is\n\n{a + b}."},
            {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": f" Yes – zug{a} it is. "},
        ]}
        for a in range(8) for b in range(6)
    ]  # fmt: skip
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for preset in ("gru-char", "gru-word"):
        lm.train(chats, preset=preset, overrides={**SMALL, "training.max_steps": 2}, name=preset, runs_dir=runs)
    text = folder / "text.txt"
    text.write_text(make_text(6_000), "utf-8")
    lm.train(text, preset="gru-char", overrides={**SMALL, "training.max_steps": 2}, name="prose", runs_dir=runs)
    make_run(runs / "chat", PretrainedTokenizer.from_json(byte_level(), CONFIG))
    make_run(runs / "plain", PretrainedTokenizer.from_json(sentencepiece_like()))
    return folder


def test_the_figures_are_those_of_the_answers_for_every_run(folder: Path) -> None:
    names, runs = ["gru-char", "gru-word", "chat", "plain", "prose"], folder / "checkpoints"
    found = lm.compare(names, text=open_text(str(folder / "chats.jsonl")), name="chats", runs_dir=runs, resamples=100)
    for candidate in found.candidates:
        report = lm.load(candidate.name, runs_dir=runs).evaluate(text=open_text(str(folder / "chats.jsonl")))
        assert candidate.bits_per_byte == pytest.approx(report.bits_per_byte, rel=1e-9), candidate.name
        assert (candidate.tokens, found.bytes) == (report.tokens, report.bytes)
    assert found.answers == 96 and "the answers alone count" in found.figure
    for difference in found.differences:
        parts = [place for place in difference.places if place.group == "part of a word"]
        assert sum(place.bytes for place in parts) == found.bytes
        total = sum(place.bytes * place.difference for place in parts) / found.bytes
        assert total == pytest.approx(difference.bits_per_byte)
        assert "What" not in "".join(passage.text for passage in difference.passages_a)
    kinds = {caution.kind: caution for caution in found.verdict.cautions}
    assert kinds["conversations"].runs == ("prose",)
    assert "answers alone count" in kinds["conversations"].sentence
    assert "by its chat template: chat" in kinds["context"].sentence


def test_a_split_of_conversations_is_read_again_and_other_text_is_a_caution(folder: Path, program: Lm) -> None:
    runs = "--runs-dir", str(folder / "checkpoints")
    done = program("compare", "gru-char", "prose", "--split", "valid", "--resamples", "100", *runs)
    assert done.code == 0 and "answers" in done.out and "prose learned text, not conversations" in done.out
    assert max(len(line.rstrip()) for line in done.out.splitlines()) <= 80
    done = program("compare", "gru-char", "prose", "--text", str(folder / "text.txt"), "--resamples", "100", *runs)
    assert done.code == 0 and "gru-char learned the answers of conversations alone." in done.out
    (folder / "short.txt").write_text("one line\n", "utf-8")
    done = program("compare", "gru-char", "prose", "--text", str(folder / "short.txt"), *runs)
    assert "1 block of about 9 bytes" in done.out.replace("\n", " ")


def test_conversations_whose_source_is_plain_text_now_have_to_be_given(folder: Path) -> None:
    run = lm.load("gru-char", runs_dir=folder / "checkpoints")
    sha256 = run.record["corpus"]["splits"]["valid"]["sha256"]
    source = folder / "chats.jsonl"
    chats = source.read_text("utf-8")
    source.write_text(json.dumps({"text": make_text(6_000)}) + "\n", "utf-8")
    try:
        # Its tokens are in the cache.
        with pytest.raises(CorpusError, match="It learned conversations, and .* is plain text now: restore them"):
            split_text([run], sha256, "valid")
    finally:
        source.write_text(chats, "utf-8")


def test_a_report_of_conversations_answers_their_questions(folder: Path, program: Lm) -> None:
    done = program(
        "report", "gru-char", "--html", "r.html", "--samples", "2", "--runs-dir", str(folder / "checkpoints")
    )
    assert done.code == 0, done.err
    page = Path("r.html").read_text("utf-8")
    assert "answers to the first held-out questions" in page and "What is" in page and "not measured" in page
    assert page.count('class="sample"') == 2 and "Learned or copied?" not in page


def test_an_imported_run_has_a_report_on_a_given_text(folder: Path, program: Lm) -> None:
    runs = "--runs-dir", str(folder / "checkpoints")
    done = program("report", "chat", "--text", str(folder / "text.txt"), "--html", "c.html", "--samples", "1", *runs)
    assert done.code == 0 and done.err == "Wrote c.html.\n"
    report = Run(lm.load("chat", runs_dir=folder / "checkpoints").folder).evaluate(text=make_text(6_000))
    assert f"{report.bits_per_byte:.3f} bits for each byte" in Path("c.html").read_text("utf-8")
    done = program("report", "chat", *runs)
    assert done.code == 1 and "give a text (--text FILE)" in done.err


def test_bytes_move_to_a_text_that_differs_in_white_space(folder: Path) -> None:
    nats = np.arange(1.0, 9.0)
    # "a", "b", then what follows "b" goes to its last byte; white space inside keeps its place.
    assert _moved(nats, "a\n\nb c\n\n", "a\n\nb c").tolist() == [1, 2, 3, 4, 5, 6 + 7 + 8]
    assert _moved(nats[:3], "a\nb", "a\n\n\nb").tolist() == [1, 2, 0, 0, 3]
    assert _moved(nats[:5], "a \n b", "a b").tolist() == [1, 2 + 3 + 4, 5]
    assert _moved(nats[:4], " éx", "éx").tolist() == [1 + 2, 3, 4]
    text = of_conversations(open_text(str(folder / "chats.jsonl")).conversations() or ())  # type: ignore[misc]
    assert text.sizes.sum() == sum(len(a.encode()) for each in text.conversations or () for a in each.answers)
