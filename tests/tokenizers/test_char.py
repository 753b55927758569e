"""The character tokenizer."""

import json
from collections import Counter

import numpy as np
import pytest

from lm.errors import TokenizerError, UnknownSymbolError
from lm.tokenizers import load_tokenizer
from lm.tokenizers.char import CharOptions, CharTokenizer


def train(*texts: str, **options: object) -> CharTokenizer:
    return CharTokenizer.train(texts, CharOptions(**options))


def test_characters_are_sorted_by_code_point_with_unk_last():
    tokenizer = train("bé\na☕", "🙂b")
    assert tokenizer.vocabulary == "\nabé☕🙂"
    assert tokenizer.encode("ab\n🙂?☕").tolist() == [1, 2, 0, 5, 6, 4]
    assert (tokenizer.unknown_id, tokenizer.vocab_size, tokenizer.start_id) == (6, 7, 0)


def test_a_newline_is_added_where_the_text_has_none():
    tokenizer = train("ab", min_count=1)
    assert tokenizer.vocabulary == "\nab"
    assert train("aab\n", min_count=2).vocabulary == "\na"


def test_an_unknown_character_decodes_to_the_replacement_character():
    tokenizer = train("ab\n")
    assert tokenizer.decode(tokenizer.encode("a€b")) == "a\ufffdb"
    assert tokenizer.pieces(tokenizer.encode("a€\n")) == ["a", "<unk>", "\\n"]


def test_skip_drops_unknown_characters_and_counts_them():
    tokenizer, unknown_counts = train("ab\n"), Counter()
    assert tokenizer.decode(tokenizer.encode("xaxyb", unknown="skip", unknown_counts=unknown_counts)) == "ab"
    assert unknown_counts == {"x": 2, "y": 1}


def test_error_names_character_code_point_line_and_column():
    with pytest.raises(UnknownSymbolError, match=r"^Line 3, column 2: 'é' \(U\+00E9\) is outside the vocabulary"):
        train("ab\n").encode("a\nb\naé", unknown="error")


@pytest.mark.parametrize("alphabet", ["ab\n", "ab\né☕", "\n" + "".join(chr(0x4E00 + i) for i in range(400))])
def test_latin_and_other_text_beyond_one_block_gives_the_same_ids_as_one_by_one(alphabet):
    tokenizer = train(alphabet)
    text = (alphabet * (600_000 // len(alphabet)))[:600_000] + "é☕🙂Ω"
    expected = [
        alphabet_id if (alphabet_id := tokenizer.vocabulary.find(c)) >= 0 else tokenizer.unknown_id for c in text
    ]
    np.testing.assert_array_equal(tokenizer.encode(text), expected)


def test_the_type_grows_with_the_vocabulary():
    assert train("".join(chr(0x4E00 + i) for i in range(254))).dtype == np.uint8  # and a newline, and <unk>: 256
    assert train("".join(chr(0x4E00 + i) for i in range(255))).dtype == np.uint16


def test_long_and_short_pieces_are_counted_alike():
    text = "ab☕" * 30_000 + "z"
    assert train(text, min_count=2).vocabulary == train(*text, min_count=2).vocabulary == "\nab☕"


def test_lone_surrogates_in_the_training_text_are_not_learned():
    tokenizer = train("a\ud800b\n")
    assert tokenizer.vocabulary == "\nab"
    assert tokenizer.decode(tokenizer.encode("a\ud800")) == "a\ufffd"


def test_the_file_shows_the_characters(tmp_path):
    train("hé\n").save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text("utf-8"))["vocabulary"] == "\nhé"


@pytest.mark.parametrize("vocabulary", ["", "ab", "b\na", "\naab", "\n\ud800", ["\n", "a"]])
def test_an_edited_vocabulary_is_refused(vocabulary, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**json.loads(train("ab\n").to_json()), "vocabulary": vocabulary}), "utf-8")
    with pytest.raises(TokenizerError, match="the vocabulary is not a string"):
        load_tokenizer(path)
