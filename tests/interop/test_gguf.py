"""A run opens in llama.cpp and computes the same there."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lm
from lm.errors import RunError, UnsupportedExportError
from lm.interop import gguf as exporting
from lm.interop.gguf import MAX_DIFFERENCE, add_vocabulary, export, permuted
from lm.interop.gguf_file import GGUFFile, sampling_of
from lm.tokenizers import Tokenizer
from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.contracts.test_tokenizers import HARD, TEXT, subwords, trained
from tests.tokenizers import tiny_pretrained

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

SMALL = {
    "model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 2, "model.context_length": 256,
    "model.table_orders": [], "training.batch_size": 2, "training.warmup_steps": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "byte": {"tokenizer.type": "byte", "model.tie_weights": True},
    "char": {"tokenizer.type": "char", "model.qk_norm": False, "model.num_heads": 4, "model.num_kv_heads": 2},
    "subword": {"tokenizer.type": "subword", "tokenizer.size": 320, "model.context_length": 24},
    "narrow": {"tokenizer.type": "char", "model.hidden_size": 24},
    "word": {"tokenizer.type": "word"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    source = random.Random(3)
    words = ("the", "cat", "sat", "on", "a", "café", "mat", "and", "☕", ".")
    text = folder / "text.txt"
    lines = [" ".join(source.choices(words, k=9)) + "\n" for _ in range(150)]
    # The characters "§" and "▁" are in the validation text alone.
    text.write_text("".join(lines[:138]) + "a § cat §§ ▁ the\n" + "".join(lines[138:]), "utf-8")
    for name, extra in KINDS.items():
        config = lm.compose(str(text), preset="transformer-char", overrides={**SMALL, **extra, "training.max_steps": 4})
        lm.train(text, config, name=name, runs_dir=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8_0"])
@pytest.mark.parametrize("name", ["byte", "char", "subword"])
def test_losses_in_llama_cpp_are_those_of_the_run(name: str, precision: Any, runs: Path, tmp_path: Path):
    done = export(lm.load(name, runs_dir=runs), tmp_path / "out", precision)
    assert done.program.startswith("llama-cpp-python ")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5 if precision == "fp32" else 1e-3)
    size = {"fp32": 4, "fp16": 2, "q8_0": 1.0625}[precision]
    matrices = lm.load(name, runs_dir=runs).record["parameters"] * size
    assert matrices < (tmp_path / "out" / "model.gguf").stat().st_size < 1.2 * matrices + 20_000


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), [("byte", "qwen3"), ("char", "llama")])
def test_greedy_text_in_llama_cpp_is_that_of_the_run(name: str, architecture: str, runs: Path, tmp_path: Path):
    run = lm.load(name, runs_dir=runs)
    export(run, tmp_path / "out")
    model = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=256, verbose=False)
    assert model.metadata["general.architecture"] == architecture
    # The start token is put before the prompt.
    text = model.create_completion("the cat ", max_tokens=200, temperature=0)["choices"][0]["text"]
    assert text == run.sample("the cat ", temperature=0, max_tokens=200)


@pytest.mark.slow
def test_the_folder_says_how_to_use_it(runs: Path, tmp_path: Path):
    done = export(lm.load("narrow", runs_dir=runs), tmp_path / "out", "q8_0")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Llama(" in card and all(note in card for note in done.notes)
    # 24 is no multiple of 32.
    assert any("rows are no multiples of 32 are fp16" in note for note in done.notes)
    assert any("q8_0 costs" in note for note in done.notes)
    assert (tmp_path / "out" / "Modelfile").read_text("utf-8").splitlines()[:3] == [
        "FROM ./model.gguf", 'TEMPLATE "{{ .Prompt }}"', "PARAMETER num_ctx 256",
    ]  # fmt: skip


@pytest.mark.slow
def test_without_llama_cpp_the_file_is_written_and_said_to_be_unproved(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = export(lm.load("byte", runs_dir=runs), tmp_path / "out")
    assert done.loss_there is None and done.bits_per_byte_there is None
    assert any("was not proved: llama-cpp-python is not installed" in note for note in done.notes)
    assert (tmp_path / "out" / "model.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("change", "sentence"), [
    ((exporting, "permuted", lambda array, heads: array), "does not compute what run 'char' computes"),
    ((exporting, "_readable", str), "does not read a text as run 'char' does"),
])  # fmt: skip
def test_a_file_that_computes_something_else_is_not_kept(
    change: tuple[Any, str, Any], sentence: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(*change)
    monkeypatch.setitem(MAX_DIFFERENCE, "fp32", 1e-6)
    with pytest.raises(RunError, match=sentence):
        export(lm.load("char", runs_dir=runs), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_llama_cpp_cannot_hold_is_refused_with_what_to_train(runs: Path, tmp_path: Path):
    with pytest.raises(UnsupportedExportError, match="no counterpart of word tokens: train with .*subword"):
        export(lm.load("word", runs_dir=runs), tmp_path / "out")
    with pytest.raises(UnsupportedExportError, match="gru models have no class in transformers"):
        export(lm.load("shakespeare-gru"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_of_a_head_are_interleaved():
    assert permuted(np.arange(8.0)[:, None], 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# -- tokenizers -------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Tokenizer], Any]:
    """A function that opens a tokenizer in llama.cpp."""

    def open_(tokenizer: Tokenizer) -> Any:
        from gguf import GGUFWriter

        writer = GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
        for add in (writer.add_block_count, writer.add_embedding_length, writer.add_head_count):
            add(1)
        writer.add_context_length(512)
        writer.add_layer_norm_rms_eps(1e-6)
        add_vocabulary(writer, tokenizer.to_gguf(), tokenizer.start_id)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)

    return open_


@pytest.mark.parametrize("kind", ["byte", "char", "char of Latin", "subword", "subword of names"])
def test_ids_and_texts_in_llama_cpp_are_those_of_the_tokenizer(kind: str, opened: Callable[[Tokenizer], Any]):
    ours = subwords("bpe")[0] if kind.startswith("subword") else trained(kind.split()[0])
    if kind == "subword of names":
        ours = type(ours).train(["a <0x41> b <unk> <eos> <eos>unk\n" * 50], ours.options)
    if kind == "char of Latin":
        ours = type(ours).train(["".join(map(chr, range(1, 0x250))) + "🙂é☕ĊĠ\U0010ffff"], ours.options)
    theirs, source = opened(ours), random.Random(2)
    texts = ["".join(source.choices("Thecat \n\t▁é☕<>0x41us🙂", k=60)) for _ in range(100)]
    for text in [*HARD, TEXT, *texts]:
        if not text:
            continue
        raw = text.encode("utf-8")
        expected = ours.encode(text if kind == "byte" else text.replace("▁", " ")).tolist()
        if kind.startswith("char"):
            expected = [
                token for token, run in groupby(expected) for _ in (run if token != ours.unknown_id else "1")
            ]  # fmt: skip
        assert theirs.tokenize(raw, add_bos=True, special=False) == [ours.start_id, *expected], text
        whole = [token for token in expected if token != ours.unknown_id]
        assert theirs.detokenize(whole).decode("utf-8", "replace") == ours.decode(whole)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like", "sentencepiece_like without prefix"])
def test_a_pretrained_tokenizer_has_the_same_ids_in_llama_cpp(kind: str, opened: Callable[[Tokenizer], Any]):
    content = tiny_pretrained.byte_level() if kind == "byte_level" else tiny_pretrained.sentencepiece_like(
        prefix=not kind.endswith("without prefix")
    )  # fmt: skip
    ours = PretrainedTokenizer.from_json(content, tiny_pretrained.CONFIG if kind == "byte_level" else {})
    theirs, source = opened(ours), random.Random(2)
    texts = ["".join(source.choices("Thecat \n\té☕<>0x41us9🙂", k=60)) for _ in range(100)]
    assert ours.to_gguf().chat_template == ours.chat_template
    for text in [*HARD[1:], TEXT, "<s> a</s> <unk>", "12345 don't <|im_end|>", *texts]:
        text = text if kind == "byte_level" else text.replace("▁", " ")
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text).tolist(), text


def test_words_that_llama_cpp_cannot_name_are_refused():
    ours = PretrainedTokenizer.from_json(tiny_pretrained.qwen_like(), tiny_pretrained.CONFIG)
    with pytest.raises(UnsupportedExportError, match="no name for the way in which this tokenizer cuts text"):
        ours.to_gguf()


@pytest.mark.slow
def test_an_imported_run_exports_with_its_chat_template(tmp_path: Path):
    tokenizer = PretrainedTokenizer.from_json(tiny_pretrained.byte_level(), tiny_pretrained.CONFIG)
    sampling = {"temperature": 0.3, "top_k": 20, "repetition_penalty": 1.1}
    done = export(tiny_pretrained.make_run(tmp_path / "imported", tokenizer, sampling=sampling), tmp_path / "out")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-4)
    model = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=64, verbose=False)
    assert model.metadata["tokenizer.chat_template"] == tiny_pretrained.CHAT_TEMPLATE
    assert sampling_of(GGUFFile(tmp_path / "out" / "model.gguf").fields) == sampling
    modelfile = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    assert "TEMPLATE" not in modelfile
    assert modelfile.endswith("PARAMETER temperature 0.3\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.1\n")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "max_tokens=100, temperature=0.3, top_k=20, repeat_penalty=1.1)" in card


@pytest.mark.parametrize(("kind", "text", "options", "sentence"), [
    ("char", "a\0b", {}, "cannot hold the character U\\+0000"),
    ("char", "a▁b", {}, "cannot hold the character U\\+2581"),
    ("subword", TEXT, {"algorithm": "unigram", "size": 320}, "train with --set tokenizer.algorithm=bpe"),
    ("word", "a b", {}, "no counterpart of word tokens"),
])  # fmt: skip
def test_a_vocabulary_without_a_counterpart_is_refused(kind: str, text: str, options: Any, sentence: str):
    from lm.config import Section
    from lm.registry import TOKENIZERS

    made = TOKENIZERS.resolve(kind).train([text], Section(type=kind, **options).resolve("tokenizer"))
    with pytest.raises(UnsupportedExportError, match=sentence):
        made.to_gguf()
