"""lm chat and lm sample with a model that has a chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.tokenizers.tiny_pretrained import CHAT_TEMPLATE, CONFIG, byte_level, make_run

Lm = Callable[..., Any]
FLAGS = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos")


def run(folder: Path, template: str = CHAT_TEMPLATE) -> PretrainedTokenizer:
    tokenizer = PretrainedTokenizer.from_json(byte_level(), {**CONFIG, "chat_template": template})
    make_run(folder / "checkpoints" / "tiny", tokenizer)
    return tokenizer


def test_a_line_is_answered_by_the_template(lm: Lm, tmp_path: Path) -> None:
    tokenizer = run(tmp_path)
    done = lm("chat", "tiny", *FLAGS, text="The cat\n/undo\nThe cat\n/help\n")
    assert done.code == 0
    assert "The model answers your line; its chat template" in done.err and "Removed." in done.err
    first, second, _ = done.out.split("\n\n")
    assert first == second
    # The template after its start, in which text is text, is another prompt.
    sampled = lm("sample", "tiny", "--prompt", tokenizer.render_chat([{"role": "user", "content": "The cat"}]),
                 "--no-echo", *FLAGS)  # fmt: skip
    assert sampled.out != f"{first}\n"


def test_sampling_options_of_the_source_count_where_no_flag_is_given(lm: Lm, tmp_path: Path) -> None:
    tokenizer = PretrainedTokenizer.from_json(byte_level(), CONFIG)
    made = make_run(tmp_path / "checkpoints" / "cold", tokenizer, sampling={"temperature": 0.0})
    rest = ("--max-tokens", "8", "--ignore-eos", "--seed", "5")
    chat = [lm("chat", "cold", *rest, *flags, text="The cat\n").out for flags in ((), FLAGS, ("--temperature", "9"))]
    text = [lm("sample", "cold", *rest, *flags).out for flags in ((), FLAGS, ("--temperature", "9"))]
    assert chat[0] == chat[1] != chat[2] and text[0] == text[1] != text[2]
    assert made.sample(max_tokens=8, ignore_eos=True) == made.sample(max_tokens=8, ignore_eos=True, temperature=0)
    assert "temperature 0: of the source, if no flags are given" in " ".join(lm("show", "cold").out.split())
    assert "Sampling options, if a request gives no others: temperature 0." in made.card()


def test_a_snapshot_of_a_chat_is_continued(lm: Lm, tmp_path: Path) -> None:
    run(tmp_path)
    assert "Saved snapshot 'x'" in lm("chat", "tiny", *FLAGS, text="The cat\n/state x\n").err
    lines = "The cat\nsat\n"
    whole = lm("chat", "tiny", *FLAGS, text=lines).out.split("\n\n")
    assert lm("chat", "tiny", "--state", "x", *FLAGS, text="sat\n").out.split("\n\n")[0] == whole[1]


def test_the_end_token_ends_a_reply_and_is_not_shown(lm: Lm, tmp_path: Path) -> None:
    tokenizer = run(tmp_path)
    (end,) = tokenizer.end_ids[:1]
    bias = ("--logit-bias", f'{{"{end}": 100}}')
    assert lm("chat", "tiny", *bias, text="The cat\nsat\n").out == "\n\n\n\n"
    sampled = lm("sample", "tiny", "--prompt", "The cat", *bias)
    assert sampled.out == "The cat\n"
    ignored = lm("sample", "tiny", "--prompt", "The cat", *bias, "--ignore-eos", "--max-tokens", "3")
    assert (ignored.out, "3 tokens" in ignored.err) == ("The cat\n", True)


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('Only users speak.') }}"])
def test_a_template_that_fails_is_one_sentence_and_the_next_line_is_read(lm: Lm, tmp_path: Path, template: str) -> None:
    run(tmp_path, template)
    done = lm("chat", "tiny", *FLAGS, text="The cat\n/help\n")
    assert done.code == 0 and done.out == ""
    assert "error: The chat template of the model" in done.err and "/quit" in done.err


def test_a_pretrained_tokenizer_is_not_trained(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat\n" * 200, "utf-8")
    done = lm("train", "text.txt", "--set", "tokenizer.type=pretrained", "--name", "b")
    assert done.code != 0 and "is imported with its model (lm import), not trained" in done.err
    assert not (tmp_path / "checkpoints" / "b").exists()
