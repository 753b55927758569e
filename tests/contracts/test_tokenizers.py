"""What every registered tokenizer promises; a new one is held to it by being registered."""

import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.config import Section, validate
from lm.errors import ConfigError, FormatVersionError, TokenizerError, UnknownSymbolError, UnsupportedExportError
from lm.registry import TOKENIZERS
from lm.tokenizers import Tokenizer, load_tokenizer
from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.tokenizers.tiny_pretrained import CONFIG, byte_level

TEXT = "The cat sat on the mat .\nThe café – naïve ☕ – was\tshut .\n\n \n" * 5 + "No newline at the end"
ODD = "Zx9 ☃ 🙂\nthe \x00 cat\n"

every = pytest.mark.parametrize("name", TOKENIZERS.names())
# A pretrained tokenizer is imported, not trained.
trainable = pytest.mark.parametrize("name", [name for name in TOKENIZERS.names() if name != "pretrained"])
modest = settings(
    max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@functools.cache
def trained(name: str, unknown: str = "replace") -> Tokenizer:
    extra = {"size": 320} if name == "subword" else {}
    options = Section(type=name, unknown=unknown, **extra).resolve("tokenizer")
    if name == "pretrained":
        imported = PretrainedTokenizer.from_json(byte_level(TEXT), CONFIG)
        return PretrainedTokenizer.from_payload(options, imported.payload())
    return TOKENIZERS.resolve(name).train([TEXT[:50], TEXT[50:]], options)


def covered(tokenizer: Tokenizer, text: str) -> str:
    """`text` without what lies outside the vocabulary."""
    unknown_counts: Counter[str] = Counter()
    tokenizer.encode(text, unknown_counts=unknown_counts)
    return "".join(char for char in text if char not in unknown_counts)


@every
@modest
@given(text=st.text(st.characters(), max_size=60) | st.text(st.sampled_from("Thecat \n\t▁é☕<>0x41us"), max_size=60))
def test_decoding_gives_back_the_text_that_the_vocabulary_covers(name, text):
    tokenizer = trained(name)
    if tokenizer.lossless:
        text = covered(tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@every
def test_the_training_text_comes_back_and_holds_nothing_unknown(name):
    tokenizer, unknown_counts = trained(name), Counter()
    ids = tokenizer.encode(TEXT, unknown_counts=unknown_counts)
    assert not unknown_counts
    if tokenizer.lossless:
        assert tokenizer.decode(ids) == TEXT


HARD = (
    "", "\n", "\n\n a  b\n", " a", "a ", "<eos> <unk> a<eos>b x<0x41>y", "▁a ▁▁ b\n▁", "a\u00a0b\x1cc\u3000d\r\nx\ty",
    "Ċ Ġ é", "🙂🙂\u200d🙂", " " * 7 + "x   ", "".join(map(chr, range(1, 0x250))), ODD, TEXT,
)  # fmt: skip


@every
@pytest.mark.parametrize("unknown", ["replace", "skip"])
def test_its_counterpart_in_the_library_tokenizers_gives_the_same_ids_and_texts(name, unknown):
    ours = trained(name, unknown)
    if type(ours).to_huggingface is Tokenizer.to_huggingface:
        with pytest.raises(UnsupportedExportError):
            ours.to_huggingface()
        return
    theirs = ours.to_huggingface()
    for text in HARD:
        if name == "word":
            text = text if unknown == "replace" else " ".join(w for w in text.split() if w in ours.words)
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids), text


@modest
@given(
    text=st.text(st.sampled_from("Thecat \n\t▁é☕<>0x41us"), max_size=60), algorithm=st.sampled_from(["bpe", "unigram"])
)
def test_subwords_have_the_same_ids_in_the_library_tokenizers(text, algorithm):
    ours, theirs = subwords(algorithm)
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()


@functools.cache
def subwords(algorithm: str):
    options = Section(type="subword", size=320, algorithm=algorithm).resolve("tokenizer")
    tokenizer = TOKENIZERS.resolve("subword").train([TEXT], options)
    return tokenizer, tokenizer.to_huggingface()


@every
def test_a_saved_tokenizer_loads_with_the_same_ids_and_hash(name, tmp_path):
    tokenizer, path = trained(name), tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.options == tokenizer.options
    np.testing.assert_array_equal(loaded.encode(TEXT + ODD), tokenizer.encode(TEXT + ODD))


@trainable
def test_training_again_gives_the_same_hash_however_the_text_is_cut(name):
    tokenizer = trained(name)
    again = type(tokenizer).train(list(TEXT), tokenizer.options)
    assert again.sha256 == tokenizer.sha256


@trainable
def test_pieces_of_text_cut_after_a_newline_give_the_ids_of_the_whole(name):
    tokenizer = trained(name)
    parts = [tokenizer.encode(line) for line in (TEXT + ODD).splitlines(keepends=True)]
    np.testing.assert_array_equal(np.concatenate(parts), tokenizer.encode(TEXT + ODD))


@every
def test_ids_are_a_writable_array_of_the_smallest_type_that_holds_the_vocabulary(name):
    tokenizer = trained(name)
    assert np.iinfo(tokenizer.dtype).max >= tokenizer.vocab_size - 1
    for text in ("", "The cat", TEXT, ODD):
        ids = tokenizer.encode(text)
        assert ids.dtype == tokenizer.dtype
        assert ids.ndim == 1
        assert ids.flags.writeable
        assert ids.size == 0 or int(ids.max()) < tokenizer.vocab_size


@every
@modest
@given(data=st.data())
def test_a_stream_joined_equals_decode(name, data):
    tokenizer = trained(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    cut = data.draw(st.integers(0, len(ids)))
    stream, twins = tokenizer.stream(), []
    pieces = []
    for token in ids:
        twins.append(stream.copy())
        pieces.append(stream.feed(token))
    pieces.append(stream.end())
    assert "".join(pieces) == tokenizer.decode(ids)
    for place, twin in enumerate(twins):
        # A copy continues as the stream did, whatever the stream was fed since.
        assert [twin.feed(token) for token in ids[place:]] + [twin.end()] == pieces[place:]
    if tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:]) == tokenizer.decode(ids) or name == "word":
        stream = tokenizer.stream(after=ids[:cut])
        rest = "".join([stream.feed(token) for token in ids[cut:]] + [stream.end()])
        assert tokenizer.decode(ids[:cut]) + rest == tokenizer.decode(ids)


@every
def test_a_stream_of_real_text_never_gives_half_a_character(name):
    tokenizer = trained(name)
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in tokenizer.encode("The café – ☕\nThe mat .").tolist()] + [stream.end()]
    assert "\ufffd" not in "".join(pieces)


@every
def test_every_piece_is_printable_and_not_empty(name):
    tokenizer = trained(name)
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    assert len(pieces) == tokenizer.vocab_size
    assert all(piece and piece.isprintable() and not piece.isspace() for piece in pieces)


@every
def test_the_start_token_is_in_the_vocabulary(name):
    tokenizer = trained(name)
    assert 0 <= tokenizer.start_id < tokenizer.vocab_size
    assert tokenizer.unknown_id is None or 0 <= tokenizer.unknown_id < tokenizer.vocab_size
    assert tokenizer.start_id != tokenizer.unknown_id


@every
@pytest.mark.parametrize("policy", ["replace", "skip"])
@modest
@given(prompt=st.text(st.characters(exclude_categories=()), max_size=40))
def test_a_prompt_of_any_characters_never_crashes(name, policy, prompt):
    tokenizer, unknown_counts = trained(name), Counter()
    ids = tokenizer.encode(prompt, unknown=policy, unknown_counts=unknown_counts)
    tokenizer.decode(ids)
    assert all(symbol in prompt for symbol in unknown_counts)
    if policy == "skip":
        assert tokenizer.unknown_id is None or "<unk>" in prompt or tokenizer.unknown_id not in ids


@every
def test_an_unknown_symbol_is_replaced_skipped_or_refused_and_counted_each_time(name):
    tokenizer, text = trained(name), "The cat\nThe \ud800 cat"
    for policy in ("replace", "skip"):
        unknown_counts: Counter[str] = Counter()
        tokenizer.encode(text, unknown=policy, unknown_counts=unknown_counts)
        assert unknown_counts == {"\ud800": 1}
    unknown_counts = Counter()
    with pytest.raises(UnknownSymbolError, match=r"Line 2, column 5: '\\ud800' \(U\+D800\)"):
        tokenizer.encode(text, unknown="error", unknown_counts=unknown_counts)
    assert unknown_counts["\ud800"] == 1
    replaced, skipped = (len(tokenizer.encode(text, unknown=policy)) for policy in ("replace", "skip"))
    assert skipped < replaced


@every
def test_the_policy_of_the_options_holds_where_the_call_names_none(name):
    with pytest.raises(UnknownSymbolError):
        trained(name, "error").encode("\udfff")
    assert len(trained(name, "skip").encode("\udfff")) == 0


@every
def test_the_policy_byte_is_taken_where_bytes_exist_and_else_refused_in_a_sentence(name):
    tokenizer = trained(name)
    try:
        ids = tokenizer.encode("☃", unknown="byte")
    except ConfigError as error:
        assert "holds no bytes" in str(error)
        with pytest.raises(ConfigError, match="holds no bytes; choose replace, skip or error"):
            Section(type=name, unknown="byte").resolve("tokenizer")
    else:
        assert tokenizer.decode(ids) == "☃"


@trainable
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_training_on_empty_text_is_refused(name, texts):
    with pytest.raises(TokenizerError, match="give a text"):
        TOKENIZERS.resolve(name).train(texts, Section(type=name).resolve("tokenizer"))


@every
def test_an_id_outside_the_vocabulary_is_refused(name):
    tokenizer = trained(name)
    for token in (-1, tokenizer.vocab_size):
        for use in (tokenizer.decode, tokenizer.pieces, lambda ids, t=tokenizer: t.stream().feed(ids[0])):
            with pytest.raises(TokenizerError, match=f"Token {token} is outside the vocabulary"):
                use([token])


@every
def test_options_survive_the_configuration_file(name):
    options = Section(type=name).resolve("tokenizer")
    section = Section.model_validate(options.model_dump(mode="json"))
    assert section.resolve("tokenizer") == options
    assert options.type == name == TOKENIZERS.resolve(name).type
    assert all(field.description for field in type(options).model_fields.values() if field.default != name)
    with pytest.raises(ConfigError, match="Unknown option"):
        validate(type(options), {"unknwon": "skip"})


@every
def test_a_file_cut_short_is_refused(name, tmp_path):
    path = tmp_path / "tokenizer.json"
    whole = trained(name).to_json()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_text(whole[:length], "utf-8")
        with pytest.raises(TokenizerError, match="tokenizer.json is not a tokenizer file, or was cut short"):
            load_tokenizer(path)


@every
def test_an_edited_file_is_refused(name, tmp_path):
    path = tmp_path / "tokenizer.json"
    content = json.loads(trained(name).to_json())

    def refused(message: str, **changes: object) -> None:
        changed = {key: value for key, value in {**content, **changes}.items() if value is not None}
        path.write_text(json.dumps(changed), "utf-8")
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(path)

    refused("says 7 tokens but holds", vocab_size=7)
    refused("'vocab_size' is missing", vocab_size=None)
    refused("'options' is missing", options=None)
    refused("damaged: Unknown option options.colour", options={"colour": 3})
    refused("Unknown tokenizer 'wird'. Did you mean", type="wird")
    refused("not a tokenizer file", type=None)
    refused("not a tokenizer file", format_version="1")
    for key in set(content) - {"format_version", "type", "options", "vocab_size"}:
        refused("is damaged", **{key: None})
        refused("is damaged", **{key: 3})


@every
def test_a_file_of_a_newer_format_is_refused_as_such(name, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(trained(name).to_json()), "format_version": 99}), "utf-8")
    with pytest.raises(FormatVersionError, match="has tokenizer format 99"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'{"model": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_foreign_file_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="not a tokenizer file"):
        load_tokenizer(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(TokenizerError, match="is missing"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_importing_the_tokenizers_loads_neither_torch_nor_sentencepiece():
    script = (
        "import sys; from lm.registry import TOKENIZERS; [TOKENIZERS.resolve(name) for name in TOKENIZERS.names()]; "
        "print({'torch', 'sentencepiece'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
