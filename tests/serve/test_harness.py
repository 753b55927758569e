"""The real lm-evaluation-harness scores a run over HTTP, and finds the figures of `lm eval`."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lm
from lm.generation.request import Request
from tests.serve.conftest import CONTEXT, Serve, Server, make_text

pytestmark = pytest.mark.slow

DOCUMENTS = [make_text(lines, seed=lines) for lines in (1, 3, 4)]
PERPLEXITY = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1
"""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 1
"""
UNTIL = """
task: until
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
metadata:
  version: 1
"""


def harness(
    server: Server, folder: Path, task: str, rows: list[dict], template: str, *, batch: int = 1, **arguments: object
) -> dict:
    """What the harness finds of a served model; it needs no network but the server."""
    given = {
        "model": "transformer", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote",
        "num_concurrent": 1, "max_retries": 1, **arguments,
    }  # fmt: skip
    return run_harness(folder, task, rows, template, "local-completions", given, batch)


def run_harness(
    folder: Path, task: str, rows: list[dict], template: str, kind: str, arguments: dict, batch: int = 1
) -> dict:
    """What the harness finds of a model of one of its kinds."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / f"{task}.yaml").write_text(template.format(task=task, data=data), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", kind,
         "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
         "--batch_size", str(batch),
         "--tasks", task, "--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"],
        cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (results,) = (folder / "out").rglob("results_*.json")
    found = {name.partition(",")[0]: value for name, value in json.loads(results.read_text())["results"][task].items()}
    (samples,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
    found["samples"] = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    return found


@pytest.mark.soak
@pytest.mark.parametrize(
    ("model", "max_length", "batch"),
    [("transformer", CONTEXT + 2, 4), ("pieces", 4000, 2), ("transformer", CONTEXT + 2, 1)],
)
def test_perplexities_are_those_of_lm_eval_under_the_same_windows(
    serve: Serve, runs, tmp_path, model, max_length, batch
):
    with serve(model) as server:
        found = harness(
            server, tmp_path, "perplexity", [{"text": text} for text in DOCUMENTS], PERPLEXITY,
            model=model, max_length=max_length, batch=batch,
        )  # fmt: skip
    run = lm.load(model, runs_dir=runs)
    reports = [run.evaluate(text=text, stride=CONTEXT if model == "transformer" else None) for text in DOCUMENTS]
    nats = sum(report.loss * report.tokens for report in reports)
    size = sum(report.bytes for report in reports)
    words = sum(len(re.split(r"\s+", text)) for text in DOCUMENTS)
    assert sum(report.tokens for report in reports) > 3 * CONTEXT
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=5e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=5e-5)


@pytest.mark.soak
def test_choices_and_free_answers_are_those_of_the_run(serve: Serve, runs, tmp_path):
    (tmp_path / "choices").mkdir()
    (tmp_path / "until").mkdir()
    rows = [
        {"text": "the cat ", "choices": ["sat on", "☂☂☂☂☂☂"], "label": 0},
        {"text": "in f", "choices": ["zzzzzzz", "og ☂"], "label": 1},
    ]
    with serve("gru", "--max-prompt-tokens", "200") as server:
        found = harness(server, tmp_path / "choices", "choices", rows, CHOICES, model="gru")
        assert found["acc"] == 1.0
        rows = [{"text": "the cat ", "answer": ""}, {"text": "a mat ", "answer": ""}]
        found = harness(server, tmp_path / "until", "until", rows, UNTIL, model="gru")
    run = lm.load("gru", runs_dir=runs)
    for sample in found["samples"]:
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        ids = tuple(run.tokenizer.encode(prompt).tolist())
        options = lm.SamplingOptions(temperature=0, max_tokens=12, stop=(".", "\n"))
        expected = "".join(event.text for event in run.engine().run(Request(ids, options)))
        assert sample["resps"] == [[expected]]
