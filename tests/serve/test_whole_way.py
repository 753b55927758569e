"""Models from elsewhere go the whole way: imported, tuned, scored, served and sent on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import lm
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.interop.formats import export
from tests.interop.models_elsewhere import SIZES, save_folder
from tests.interop.test_imported import _smollm, needs_smollm
from tests.serve.conftest import Serve

pytestmark = pytest.mark.slow


def conversations(path: Path) -> Path:
    """Questions about sums, with their answers."""
    source = random.Random(1)
    rows = []
    for _ in range(240):
        a, b = source.randrange(10), source.randrange(10)
        turns = [{"role": "user", "content": f"the sum of {a} and {b}"}, {"role": "assistant", "content": f"{a + b} ."}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows), "utf-8")
    return path


def test_a_llama_of_a_million_parameters_goes_the_whole_way(serve: Serve, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(1)
    sizes = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4, "max_position_embeddings": 128}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes}))
    there = save_folder(model, tmp_path / "there")
    base = lm.import_model(there, name="base", runs_dir=tmp_path)
    assert 1_000_000 < base.facts()["parameters"] < 1_500_000
    steps = {"training.max_steps": 20, "training.learning_rate": 5e-3, "training.lora": 8}
    lm.train(conversations(tmp_path / "sums.jsonl"), init=base, overrides=steps, name="sums", runs_dir=tmp_path)
    run = lm.load("base+sums", runs_dir=tmp_path)
    report = run.reports()["valid"]["fine_tuning"]
    assert report["tuned_bits_per_byte"] < report["base_bits_per_byte"] - 1
    messages = [{"role": "user", "content": "the sum of 2 and 3"}]
    ids = tuple(run.tokenizer.encode_chat(messages).tolist())
    options = SamplingOptions(max_tokens=12, temperature=0.9, top_k=20, seed=5)
    expected = "".join(event.text for event in run.engine().run(Request(ids, options)))
    with serve("base+sums", runs_dir=tmp_path) as server:
        done = server.openai.chat.completions.create(
            model="base+sums", messages=messages, max_tokens=12, temperature=0.9, seed=5, extra_body={"top_k": 20}
        )
    assert done.choices[0].message.content == expected
    for to in ("hf", "html"):
        sent = export(run, tmp_path / to, to)
        assert sent.loss_there == pytest.approx(sent.loss_here, abs=1e-5)


@pytest.mark.soak
@needs_smollm
def test_smollm2_is_tuned_for_a_few_steps(tmp_path: Path) -> None:
    path = _smollm()
    assert path is not None
    steps = {"training.max_steps": 3, "training.learning_rate": 2e-3, "training.lora": 8}
    run = lm.train(conversations(tmp_path / "sums.jsonl"), init=str(path), overrides=steps, runs_dir=tmp_path)
    report = run.reports()["valid"]["fine_tuning"]
    assert report["tuned_bits_per_byte"] < report["base_bits_per_byte"] - 0.05
