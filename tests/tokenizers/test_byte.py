"""The byte tokenizer."""

import numpy as np
import pytest

from lm.errors import UnknownSymbolError
from lm.tokenizers.byte import ByteOptions, ByteTokenizer


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer(ByteOptions())


def test_ids_are_the_utf8_bytes(tokenizer):
    np.testing.assert_array_equal(tokenizer.encode("é\n"), np.array([0xC3, 0xA9, 10], dtype=np.uint8))


def test_there_are_256_tokens_and_none_is_unknown(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.unknown_id) == (256, 10, None)
    assert tokenizer.dtype == np.uint8


def test_bytes_that_are_not_utf8_decode_to_replacement_characters(tokenizer):
    assert tokenizer.decode([0xFF, 0x41, 0xE2, 0x98]) == "\ufffdA\ufffd"


def test_an_emoji_is_streamed_with_its_fourth_byte(tokenizer):
    stream = tokenizer.stream()
    assert [stream.feed(value) for value in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.end() == ""


def test_a_broken_run_of_bytes_is_streamed_as_it_decodes(tokenizer):
    stream = tokenizer.stream()
    assert [stream.feed(value) for value in [0xF0, 0x9F, 0x41]] == ["", "", "\ufffdA"]
    assert stream.feed(0xE2) == ""
    assert stream.end() == "\ufffd"


def test_pieces_show_ascii_and_hexadecimal(tokenizer):
    assert tokenizer.pieces([0x41, 0x20, 0x0A, 0x00, 0x7F, 0xE2]) == ["A", "▁", "\\n", "\\x00", "\\x7f", "<0xE2>"]


def test_a_lone_surrogate_becomes_the_replacement_character_or_is_skipped_or_refused(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\ud83db", unknown="byte")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\ud83db", unknown="skip")) == "ab"
    with pytest.raises(UnknownSymbolError, match="lone surrogate"):
        tokenizer.encode("a\ud83db", unknown="error")
