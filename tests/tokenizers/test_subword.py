"""The subword tokenizer."""

import functools
import hashlib
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import TokenizerError
from lm.tokenizers import load_tokenizer, subword
from lm.tokenizers.subword import SubwordOptions, SubwordTokenizer, even_sample

TEXT = (
    "In the beginning the wind was on the water , which was still .\n"
    "Which water the wind was on , nobody knew ; it was the beginning .\n"
) * 20
both = pytest.mark.parametrize("algorithm", ["bpe", "unigram"])


@functools.cache
def trained(algorithm: str) -> SubwordTokenizer:
    return SubwordTokenizer.train([TEXT], SubwordOptions(algorithm=algorithm, size=330))


@both
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   leading, trailing   ",
        "\n",
        "\n\n \n",
        "a\r\nb\tc\x0bd\x0ce\x85f\u2028g",
        "nul \x00 bell \x07",
        "▁", "a▁b ▁▁ c\n▁", "▁\n",
        "<s></s><unk><eos><pad><0x41>",
        "🙂👨‍👩‍👧 e\u0301 ﬁ Å ½ ｆ",
        "▅ ⁇",
        "\ufeff\ufffd",
        "no newline at the end of the water",
    ],
)  # fmt: skip
def test_the_round_trip_is_exact_for(algorithm, text):
    tokenizer = trained(algorithm)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.unknown_id, tokenizer.start_id} & set(ids.tolist())
    assert len(tokenizer.encode(text)) <= len(text.encode())


@both
@settings(max_examples=40, deadline=None, database=None)
@given(text=st.text(st.sampled_from("th we\n\t▁▅\0<>0x41é🙂\u0301"), max_size=40))
def test_the_round_trip_is_exact_for_awkward_text(algorithm, text):
    tokenizer = trained(algorithm)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_newline_and_tab_are_one_token_each(algorithm):
    assert trained(algorithm).pieces(trained(algorithm).encode("\n\t")) == ["\\n", "\\t"]


@both
def test_frequent_words_become_pieces_even_where_a_space_always_follows(algorithm):
    pieces = trained(algorithm).pieces(range(trained(algorithm).vocab_size))
    assert {"▁the", "▁was"} <= set(pieces)


@both
def test_a_space_decodes_to_a_space_though_the_training_text_has_none(algorithm):
    tokenizer = SubwordTokenizer.train(["漢字仮名交じり文\n" * 50], SubwordOptions(algorithm=algorithm))
    assert tokenizer.decode(tokenizer.encode("漢 字  a")) == "漢 字  a"


def test_a_single_token_keeps_its_leading_space():
    tokenizer = trained("bpe")
    token = tokenizer.pieces(range(tokenizer.vocab_size)).index("▁the")
    assert tokenizer.decode([token]) == tokenizer.stream().feed(token) == " the"


def test_an_emoji_is_streamed_with_its_last_byte():
    tokenizer = trained("bpe")
    stream = tokenizer.stream()
    assert [stream.feed(token) for token in tokenizer.encode("🙂").tolist()] == ["", "", "", "🙂"]


@both
def test_a_vocabulary_too_large_for_the_text_is_lowered_with_a_notice(algorithm, caplog, capfd):
    with caplog.at_level(logging.WARNING, "lm.tokenizers"):
        tokenizer = SubwordTokenizer.train([TEXT], SubwordOptions(algorithm=algorithm, size=5000))
    assert 258 < tokenizer.vocab_size < 5000
    (record,) = caplog.records
    assert record.getMessage() == (
        f"The text has pieces for a vocabulary of {tokenizer.vocab_size}, not 5000: the smaller one is used."
    )
    assert capfd.readouterr() == ("", "")


@both
def test_a_vocabulary_too_small_for_the_characters_is_raised_with_a_notice(algorithm, caplog, capfd):
    text = "".join(chr(0x4E00 + i) * 3 for i in range(100)) + "\n"
    with caplog.at_level(logging.WARNING, "lm.tokenizers"):
        tokenizer = SubwordTokenizer.train([text], SubwordOptions(algorithm=algorithm, size=300, character_coverage=1))
    # <unk>, <eos>, 256 bytes, 100 characters and the space need 359; 75 more are a quarter of what was asked for.
    assert caplog.records[0].getMessage() == (
        "A vocabulary of 300 cannot hold the 256 bytes and the characters of this text: 434 tokens are used."
    )
    assert 359 <= tokenizer.vocab_size <= 434
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Each character is one token: none had to be spelled in bytes.
    assert len(tokenizer.encode(text[:-1])) <= len(text) - 1
    assert capfd.readouterr() == ("", "")


@both
@pytest.mark.parametrize("text", ["a", "ab ab", "x" * 50_000, "x y " * 20_000, " a"])
def test_tiny_and_unbroken_texts_can_be_learned(algorithm, text):
    tokenizer = SubwordTokenizer.train([text], SubwordOptions(algorithm=algorithm))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\n\n", "\t\0▁▅\n", "\ud800"])
def test_text_without_anything_to_learn_is_refused(text):
    with pytest.raises(TokenizerError, match="give a text"):
        SubwordTokenizer.train([text], SubwordOptions())


def test_an_interrupt_while_pieces_are_learned_stays_an_interrupt(monkeypatch):
    def interrupted(sample):
        yield "some words"
        raise KeyboardInterrupt

    monkeypatch.setattr(subword, "_sentences", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SubwordTokenizer.train(["some words"], SubwordOptions(size=260))


@both
def test_another_process_learns_the_same_tokenizer(algorithm):
    script = (
        "import sys; from lm.tokenizers.subword import *; print(SubwordTokenizer.train([sys.stdin.read()], "
        f"SubwordOptions(algorithm={algorithm!r}, size=330)).sha256)"
    )
    found = subprocess.run([sys.executable, "-c", script], input=TEXT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == trained(algorithm).sha256
    assert found.stdout.strip() == hashlib.sha256(trained(algorithm).to_json().encode()).hexdigest()


def test_the_file_lists_the_pieces_and_an_edited_list_is_refused(tmp_path):
    path = tmp_path / "t.json"
    content = json.loads(trained("unigram").to_json())
    assert list(content["pieces"])[:3] == ["<unk>", "<eos>", "<0x00>"]
    assert "▁the" in content["pieces"]
    content["pieces"]["▁the"] = -1.0
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(TokenizerError, match="the pieces listed are not those of the model"):
        load_tokenizer(path)


@pytest.mark.parametrize("model", ["", "AAAA", "no base64!", None])
def test_a_damaged_model_is_refused(model, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**json.loads(trained("bpe").to_json()), "model": model}), "utf-8")
    with pytest.raises(TokenizerError, match="is damaged"):
        load_tokenizer(path)


def test_lone_surrogates_become_replacement_characters():
    tokenizer = trained("bpe")
    assert tokenizer.decode(tokenizer.encode("the \ud83d water")) == "the \ufffd water"


def test_the_encoding_of_a_line_does_not_depend_on_the_lines_before_it():
    tokenizer = trained("unigram")
    line = "the wind which was on nobody ▁ knew\n"
    whole = tokenizer.encode(TEXT * 20 + line)
    np.testing.assert_array_equal(whole[-len(tokenizer.encode(line)) :], tokenizer.encode(line))


def numbered(lines: int) -> str:
    return "".join(f"{number:>9}\n" for number in range(lines))


def test_a_text_that_fits_is_sampled_whole_and_in_order():
    text = numbered(5000)
    assert "".join(even_sample([text], 100_000)) == text


def test_a_sample_keeps_to_its_budget_and_lies_evenly_over_the_text():
    text, budget = numbered(200_000), 200_000
    sample = even_sample([text], budget)
    assert budget - 8192 <= sum(map(len, sample)) <= budget
    places = np.array([int(block.split()[0]) for block in sample])
    assert (np.diff(places) > 0).all()
    tenths = np.bincount(places * 10 // 200_000, minlength=10)
    assert tenths.min() >= len(sample) / 10 - 2
    assert tenths.max() <= len(sample) / 10 + 2


def test_a_sample_does_not_depend_on_how_the_text_is_cut():
    text = numbered(20_000) + "x" * 30_000
    cuts = [text[start : start + 777] for start in range(0, len(text), 777)]
    assert even_sample(cuts, 50_000) == even_sample([text], 50_000)


def test_a_budget_below_one_block_is_kept():
    assert len("".join(even_sample([numbered(5000)], 1000))) == 1000
