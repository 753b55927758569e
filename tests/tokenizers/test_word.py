"""The word tokenizer and the spacing for readers."""

from collections import Counter

import pytest

from lm.errors import TokenizerError, UnknownSymbolError
from lm.tokenizers.word import WordOptions, WordTokenizer, detokenize


def train(*texts: str, **options: object) -> WordTokenizer:
    return WordTokenizer.train(texts, WordOptions(**options))


def test_words_come_by_falling_frequency_and_ties_by_first_appearance():
    tokenizer = train("b a c a\n d\n")
    assert tokenizer.vocabulary == ["<eos>", "<unk>", "a", "b", "c", "d"]
    assert (tokenizer.start_id, tokenizer.unknown_id) == (0, 1)


def test_each_newline_is_an_eos_and_a_last_line_without_one_gets_none():
    tokenizer = train("a b\n")
    assert tokenizer.encode("a b\n\nb").tolist() == [2, 3, 0, 0, 3]


def test_written_eos_and_unk_are_the_tokens_themselves_and_not_unknown():
    tokenizer, counts = train("a <unk> b <eos>\n"), Counter()
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("<unk> a <eos>", unknown="error", unknown_counts=counts).tolist() == [1, 2, 0]
    assert not counts


def test_min_count_and_max_size_bound_the_vocabulary():
    text = "a a a b b c\n"
    assert train(text, min_count=2).vocabulary == ["<eos>", "<unk>", "a", "b"]
    assert train(text, max_size=3).vocabulary == ["<eos>", "<unk>", "a"]


def test_a_word_cut_between_two_pieces_is_learned_whole():
    assert train("he", "llo wor", "ld", "\nhello").vocabulary == ["<eos>", "<unk>", "hello", "world"]


def test_unknown_words_are_replaced_skipped_or_refused():
    tokenizer, counts = train("a b\n"), Counter()
    assert tokenizer.decode(tokenizer.encode("a dog b cat dog", unknown_counts=counts)) == "a <unk> b <unk> <unk>"
    assert counts == {"dog": 2, "cat": 1}
    assert tokenizer.decode(tokenizer.encode("a dog b", unknown="skip")) == "a b"
    with pytest.raises(UnknownSymbolError, match="^Line 2, column 4: 'dog' is outside the vocabulary"):
        tokenizer.encode("a\nb  dog", unknown="error")


def test_the_error_counts_lines_from_the_start_of_a_long_text():
    with pytest.raises(UnknownSymbolError, match="^Line 200001, column 1: 'z'"):
        train("a b\n").encode("a b\n" * 200_000 + "z\n", unknown="error")


def test_decode_puts_no_space_about_a_newline():
    tokenizer = train("a b\n")
    assert tokenizer.decode([2, 3, 0, 0, 3, 2, 0]) == "a b\n\nb a\n"
    assert tokenizer.decode([0, 2]) == "\na"


def test_a_stream_puts_the_space_before_the_word_and_after_the_prompt():
    tokenizer = train("a b\n")
    stream = tokenizer.stream()
    assert [stream.feed(token) for token in [2, 3, 0, 3]] == ["a", " b", "\n", "b"]
    assert tokenizer.stream(after=tokenizer.encode("a")).feed(3) == " b"
    assert tokenizer.stream(after=tokenizer.encode("a\n")).feed(3) == "b"


def test_text_without_words_is_refused():
    with pytest.raises(TokenizerError, match="has no words"):
        train(" \n\n")


def test_words_with_lone_surrogates_are_not_learned():
    assert train("a \ud800b\n").vocabulary == ["<eos>", "<unk>", "a"]


@pytest.mark.slow
def test_wikitext_2_has_its_published_counts(real_data):
    folder = real_data / "wikitext-2"
    train_text = (folder / "train.txt").read_text("utf-8")
    tokenizer = train(train_text)
    assert tokenizer.vocab_size == 33_278
    counts = {}
    for split in ("train", "valid", "test"):
        unknown: Counter[str] = Counter()
        ids = tokenizer.encode((folder / f"{split}.txt").read_text("utf-8"), unknown_counts=unknown)
        counts[split] = len(ids)
        assert not unknown, "the vocabulary of WikiText-2 is closed"
    assert counts == {"train": 2_088_628, "valid": 217_646, "test": 245_569}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("well @-@ known", "well-known"),
        ("1 @,@ 000 @.@ 5 metres", "1,000.5 metres"),
        ("He came , he saw ; he left .", "He came, he saw; he left."),
        ("nearly ( or so ) done !", "nearly (or so) done!"),
        ('He said , " it is . " Then " no " .', 'He said, "it is." Then "no".'),
        ("the cat 's tail , it ca n't be , they 'll", "the cat's tail, it can't be, they'll"),
        ("the boys ' ball", "the boys' ball"),
        ("he said ' yes ' twice", "he said 'yes' twice"),
        ("`` quoted '' $ 5 %", '"quoted" $5%'),
        (" = Title = \n \n Text .\n", "= Title =\n\nText.\n"),
        ('" open\n" open', '"open\n"open'),
        ("", ""),
    ],
)
def test_detokenize_gives_the_spacing_of_print(words, expected):
    assert detokenize(words) == expected
