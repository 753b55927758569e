"""A run opens in ONNX Runtime and computes the same there, in Python and in JavaScript."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lm
from lm.config import Section
from lm.errors import MissingExtraError, RunError
from lm.interop.onnx import PYTHON, Opened, export, rows_in_int8, traced
from lm.models.base import LanguageModel, build_model

pytestmark = pytest.mark.slow

JAVASCRIPT = Path(__file__).parents[2] / "docs" / "how-to" / "sample.mjs"
VOCAB_SIZE = 11
SMALL = {"embedding_size": 6, "hidden_size": 8}
HYBRID = {"type": "hybrid", "cell": "lstm", "order": 3, **SMALL}
MODELS: dict[str, dict[str, Any]] = {
    "rnn, tied": {"type": "rnn", "nonlinearity": "relu", "tie_weights": True, **SMALL},
    "gru, hashed tables": {"type": "gru", "num_layers": 2, "table_orders": [2, 4], "table_buckets": 90, **SMALL},
    "lstm, adaptive softmax": {"type": "lstm", "adaptive_cutoffs": [4, 8], **SMALL},
    "transformer": {
        "type": "transformer", "hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1,
        "context_length": 12, "table_orders": [3],
    },
    "n-gram": {"type": "ngram", "order": 3},
    "ensemble of hybrids": {"type": "ensemble", "member": HYBRID},
}  # fmt: skip


def made(options: dict[str, Any]) -> LanguageModel:
    """A model with weights and counts that are not those of the start."""
    model = build_model(Section(**options), VOCAB_SIZE, seed=1).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.5)
    if model.trained_by != "gradient":
        text = np.random.default_rng(1).integers(0, 4, 300) * np.random.default_rng(2).integers(0, 3, 300)
        model.fit(text)
    return model


# The exported run below is a Transformer of more layers than are traced.
SOAKED = {"rnn, tied", "transformer", "n-gram"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.soak if kind in SOAKED else ()) for kind in MODELS]
)
def test_logits_of_a_text_in_any_pieces_are_those_of_the_model(kind: str, tmp_path: Path):
    import onnx

    model = made(MODELS[kind])
    onnx.save(traced(model, model.first_state()), str(tmp_path / "model.onnx"))
    opened = Opened(tmp_path / "model.onnx", model, model.first_state())
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, VOCAB_SIZE, (3, 25)))
    with torch.inference_mode():
        expected, _ = model(ids)
    for sizes in ([25], [1] * 25, [7, 1, 17]):
        state, parts = None, []
        for piece in ids.split(sizes, dim=1):
            logits, state = opened(piece, state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [MODELS["transformer"], HYBRID], ids=["transformer", "hybrid"])
def test_the_first_state_gives_the_logits_of_no_state(options: dict[str, Any]):
    model, ids = made(options), torch.arange(6)[None] + 1
    with torch.inference_mode(), model.traceable():
        torch.testing.assert_close(model(ids, model.first_state())[0], model(ids)[0], atol=1e-5, rtol=0)


def test_int8_has_a_scale_for_each_row_and_keeps_a_row_of_zeros():
    codes, scales = rows_in_int8(np.array([[0.0, 0.0], [1.0, -2.0], [127.0, 63.0]], np.float32))
    assert codes.tolist() == [[0, 0], [64, -127], [127, 63]]
    np.testing.assert_allclose(scales[:, 0], [1, 2 / 127, 1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run "book", whose context window is short."""
    folder = tmp_path_factory.mktemp("runs")
    source = random.Random(3)
    words = ("The", "cat", "sat", "on", "a", "café", "mat", "and", ".")
    text = folder / "text.txt"
    text.write_text("".join(" ".join(source.choices(words, k=9)) + "\n" for _ in range(150)), "utf-8")
    options = {
        "model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 3, "model.context_length": 24,
        "training.batch_size": 4, "training.warmup_steps": 0, "training.max_steps": 30,
    }  # fmt: skip
    config = lm.compose(str(text), preset="transformer-char", overrides=options)
    lm.train(text, config, name="book", runs_dir=folder)
    return folder


@pytest.fixture(scope="module")
def folder(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported run, "book-onnx"."""
    folder = tmp_path_factory.mktemp("exported")
    done = export(lm.load("book", runs_dir=runs), folder / "book-onnx")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5)
    assert done.bits_per_byte_there == pytest.approx(done.bits_per_byte_here, abs=1e-5)
    return folder


def test_the_python_script_of_the_folder_writes_the_greedy_text_of_the_run(folder: Path, runs: Path):
    card = (folder / "book-onnx" / "README.md").read_text("utf-8")
    assert PYTHON in card
    script = PYTHON.replace("PATH", "book-onnx")
    assert script in (JAVASCRIPT.parent / "export.md").read_text("utf-8")
    # More than a window: it slides as in `lm sample`.
    done = _run([sys.executable, "-c", script.replace("range(200)", "range(500)")], folder)
    assert done == "The " + lm.load("book", runs_dir=runs).sample("The ", temperature=0, max_tokens=500) + "\n"


@pytest.mark.parametrize(
    "kind", ["default", *(pytest.param(name, marks=pytest.mark.soak) for name in ("lstm-word", "shakespeare-gru"))]
)
def test_the_default_model_and_other_families_write_their_greedy_text_there(kind: str, runs: Path, tmp_path: Path):
    small = {"training.max_steps": 20, "training.batch_size": 4}
    if kind == "default":
        run = lm.train(runs / "text.txt", overrides=small, name="default", runs_dir=runs, overwrite=True)
        assert run.config.model.type == "hybrid"
    elif kind == "lstm-word":
        small |= {"model.hidden_size": 16, "model.embedding_size": 16, "model.adaptive_cutoffs": [6, 9]}
        small |= {"training.max_steps": 100, "training.learning_rate": 0.02, "training.warmup_steps": 5}
        run = lm.train(runs / "text.txt", preset=kind, overrides=small, name=kind, runs_dir=runs, overwrite=True)
    else:
        run = lm.load(kind)
    export(run, tmp_path / "out", data_dir=None)
    script = PYTHON.replace("PATH", "out").replace("range(200)", "range(500)")
    done = _run([sys.executable, "-c", script], tmp_path)
    # Words are written without the space at the end.
    prompt = run.tokenizer.decode(run.tokenizer.encode("The "))
    assert done == prompt + run.sample("The ", temperature=0, max_tokens=500) + "\n"


@pytest.mark.soak
def test_the_javascript_of_the_docs_writes_the_greedy_text_of_the_run(folder: Path, runs: Path, tmp_path: Path):
    (tmp_path / "package.json").write_text("{}")
    # Without the install script, which downloads libraries for a GPU.
    _run(["npm", "install", "--ignore-scripts", "onnxruntime-node", "@huggingface/tokenizers"], tmp_path)
    (tmp_path / "book-onnx").symlink_to(folder / "book-onnx")
    (tmp_path / "sample.mjs").write_bytes(JAVASCRIPT.read_bytes())
    done = _run(["node", "sample.mjs"], tmp_path)
    assert done == "The " + lm.load("book", runs_dir=runs).sample("The ", temperature=0, max_tokens=200) + "\n"


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.6), ("int8", 0.4)])
def test_weights_in_fewer_bits_make_a_smaller_file(precision: Any, share: float, folder: Path, runs: Path):
    done = export(lm.load("book", runs_dir=runs), folder / precision, precision)
    sizes = [(folder / name / "model.onnx").stat().st_size for name in ("book-onnx", precision)]
    assert sizes[1] < share * sizes[0]
    assert done.loss_there == pytest.approx(done.loss_here, abs=0.02)


def test_the_folder_says_how_to_use_it(folder: Path):
    card = (folder / "book-onnx" / "README.md").read_text("utf-8")
    described = json.loads((folder / "book-onnx" / "run.json").read_text("utf-8"))
    assert PYTHON in card
    assert described["context_length"] == 24
    assert described["state"]["keys.0"] == {"type": "float32", "shape": [1, 0, 2, 16], "value": 0}
    assert described["state"]["recent"]["value"] == -1


def test_an_existing_folder_stays_as_it_is(runs: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        export(lm.load("book", runs_dir=runs), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_package_is_named(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="onnxruntime"):
        export(lm.load("book", runs_dir=runs), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
