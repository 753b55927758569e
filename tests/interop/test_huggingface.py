"""A run opens in transformers unchanged and computes the same there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lm
from lm.errors import RunError, UnsupportedExportError
from lm.interop.exported import MAX_DIFFERENCE, new_folder
from lm.interop.huggingface import TOKENIZER_CLASSES, export
from tests.serve.test_harness import PERPLEXITY, run_harness

pytestmark = pytest.mark.slow

SMALL = {
    "model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 2, "model.context_length": 24,
    "model.table_orders": [], "training.batch_size": 4, "training.warmup_steps": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "byte": {"tokenizer.type": "byte"},
    "char": {"tokenizer.type": "char", "model.qk_norm": False},
    "word": {"tokenizer.type": "word", "model.tie_weights": True, "model.num_kv_heads": 1},
    "subword": {"tokenizer.type": "subword", "tokenizer.size": 320},
    "biases": {"tokenizer.type": "char", "model.qk_norm": False, "model.qkv_bias": True},
    "heads": {"tokenizer.type": "char", "model.head_size": 8, "model.num_heads": 3},
    "tables": {"tokenizer.type": "char", "model.table_orders": [2]},
    "adaptive": {"tokenizer.type": "word", "model.adaptive_cutoffs": [4]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    source = random.Random(3)
    words = ("the", "cat", "sat", "on", "a", "café", "mat", "and", "☕", ".")
    text = folder / "text.txt"
    text.write_text("".join(" ".join(source.choices(words, k=9)) + "\n" for _ in range(150)), "utf-8")
    for name, extra in KINDS.items():
        config = lm.compose(str(text), preset="transformer-char", overrides={**SMALL, **extra, "training.max_steps": 3})
        lm.train(text, config, name=name, runs_dir=folder)
    return folder


@pytest.mark.parametrize(("name", "architecture"), [
    ("byte", "Qwen3ForCausalLM"), ("char", "LlamaForCausalLM"), ("word", "Qwen3ForCausalLM"),
    ("subword", "Qwen3ForCausalLM"), ("biases", "Qwen2ForCausalLM"), ("heads", "Qwen3ForCausalLM"),
])  # fmt: skip
def test_logits_and_ids_in_transformers_are_those_of_the_run(name: str, architecture: str, runs: Path, tmp_path: Path):
    import transformers
    from transformers import AutoModelForCausalLM

    run = lm.load(name, runs_dir=runs)
    done = export(run, tmp_path / "out")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5)
    assert done.bits_per_byte_there == pytest.approx(done.bits_per_byte_here, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == architecture
    opener = TOKENIZER_CLASSES.get(architecture, "AutoTokenizer")
    tokenizer = getattr(transformers, opener).from_pretrained(tmp_path / "out")
    prompt = "the cat sat\non a "
    ids = [run.tokenizer.start_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    assert ids[1:] == run.tokenizer.encode(prompt).tolist()
    with torch.inference_mode():
        there = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(there, run.logits(prompt), atol=1e-4)
    # Greedy text, inside the window.
    more = 24 - len(ids)
    text = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=more, eos_token_id=None)
    # By our tokenizer: theirs gives one U+FFFD for each byte of a broken character.
    assert run.tokenizer.decode(text[0].numpy())[len(run.tokenizer.decode(ids)) :] == run.sample(
        prompt, temperature=0, max_tokens=more
    )


@pytest.mark.soak
@pytest.mark.parametrize("name", ["byte", "subword"])
def test_the_harness_finds_in_transformers_what_lm_eval_finds(name: str, runs: Path, tmp_path: Path):
    run = lm.load(name, runs_dir=runs)
    export(run, tmp_path / "out")
    texts = ["the cat sat on a mat . " * 5, "a café and ☕ on the mat"]
    given = {"pretrained": tmp_path / "out", "prefix_token_id": run.tokenizer.start_id, "dtype": "float32"}
    found = run_harness(tmp_path, "perplexity", [{"text": text} for text in texts], PERPLEXITY, "hf", given)
    reports = [run.evaluate(text=text, stride=24) for text in texts]
    bits = sum(report.bits_per_byte * report.bytes for report in reports) / sum(report.bytes for report in reports)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=5e-5)


def test_half_precision_halves_the_file(runs: Path, tmp_path: Path):
    run = lm.load("char", runs_dir=runs)
    whole, half = (export(run, tmp_path / name, name) for name in ("fp32", "fp16"))  # type: ignore[arg-type]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "fp16")]
    assert sizes[1] < 0.6 * sizes[0]
    assert half.loss_there == pytest.approx(whole.loss_there, abs=1e-2)


@pytest.mark.parametrize(("name", "remedy"), [("tables", "model.table_orders"), ("adaptive", "model.adaptive_cutoffs")])
def test_a_model_that_transformers_lacks_is_refused_with_what_to_train(
    name: str, remedy: str, runs: Path, tmp_path: Path
):
    with pytest.raises(UnsupportedExportError, match=f"{remedy}=\\[\\]"):
        export(lm.load(name, runs_dir=runs), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_kinds_of_model_are_refused(tmp_path: Path):
    with pytest.raises(UnsupportedExportError, match="gru models have no class in transformers"):
        export(lm.load("shakespeare-gru"), tmp_path / "out")


def test_an_existing_folder_stays_as_it_is(runs: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        export(lm.load("char", runs_dir=runs), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_error_leaves_no_half_written_folder(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_folder_that_computes_something_else_is_not_kept(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MAX_DIFFERENCE, "fp32", -1.0)
    with pytest.raises(RunError, match="does not compute what run 'char' computes"):
        export(lm.load("char", runs_dir=runs), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_folder_says_how_to_use_it(runs: Path, tmp_path: Path):
    done = export(lm.load("word", runs_dir=runs), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "prefix_token_id=0" in card and all(note in card for note in done.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["bos_token_id"] == 0
