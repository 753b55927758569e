"""An adapter leaves with its base, merged, or alone for peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lm
from lm.errors import UnsupportedExportError
from lm.files import digest
from lm.interop.formats import export
from tests.interop.models_elsewhere import make_model, save_folder

pytestmark = pytest.mark.slow
TEXT = "The cat sat on the mat .\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the imported run "base", and the adapters "tuned" of all its matrices and "few" of some."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text(TEXT * 120, "utf-8")
    lm.import_model(save_folder(make_model("qwen2"), folder / "there"), name="base", context=32, runs_dir=folder)
    steps = {"training.max_steps": 6, "training.learning_rate": 0.02, "training.lora": 4, "training.bptt": 16}
    lm.train(text, init="base", overrides=steps, name="tuned", runs_dir=folder)
    few = {**steps, "training.lora_modules": "q_proj,v_proj"}
    lm.train(text, init="base", overrides=few, name="few", runs_dir=folder)
    return folder


# hf takes the model of the run, as gguf and onnx do; html its arrays.
@pytest.mark.parametrize(
    "to", ["hf", "html", *(pytest.param(name, marks=pytest.mark.soak) for name in ("gguf", "onnx"))]
)
def test_a_base_and_its_adapter_leave_as_one_model(to: str, runs: Path, tmp_path: Path) -> None:
    run = lm.load("base+tuned", runs_dir=runs)
    done = export(run, tmp_path / "out", to)
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5)
    assert done.loss_here < lm.load("base", runs_dir=runs).evaluate(text=TEXT * 20).loss - 1
    if to == "hf":
        again = lm.import_model(tmp_path / "out", name="again", runs_dir=tmp_path)
        np.testing.assert_array_equal(again.logits(TEXT), run.logits(TEXT))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
@pytest.mark.parametrize(("name", "targets"), [
    ("tuned", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ("few", ["q_proj", "v_proj"]),
])  # fmt: skip
def test_peft_opens_an_adapter_over_the_exported_base(
    name: str, targets: list[str], runs: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = lm.load(name, runs_dir=runs)
    done = export(run, tmp_path / "adapter", "peft")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5)
    export(lm.load("base", runs_dir=runs), tmp_path / "base", "hf")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = [run.tokenizer.start_id, *run.tokenizer.encode(TEXT).tolist()]
    with torch.inference_mode():
        np.testing.assert_allclose(opened(torch.tensor([ids])).logits[0].numpy(), run.logits(TEXT), atol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["target_modules"] == targets
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert "lm export base --to hf" in done.notes[0]


def test_the_base_of_an_adapter_is_named_as_the_hub_names_it(runs: Path, tmp_path: Path) -> None:
    copies = shutil.copytree(runs, tmp_path / "runs")
    written = copies / "base" / "config.json"
    record = {**json.loads(written.read_text("utf-8")), "imported": {"source": "hf:org/name@abc"}}
    del record["sha256"]
    written.write_text(json.dumps({**record, "sha256": digest(record)}), "utf-8")
    done = export(lm.load("few", runs_dir=copies), tmp_path / "adapter", "peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "abc")
    card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    assert "base_model: org/name\n" in card and 'from_pretrained("org/name", revision="abc")' in card
    assert done.notes[0].endswith("give peft the model org/name of revision abc.")


def test_a_run_without_an_adapter_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedExportError, match="Run 'base' is no adapter, so there is nothing for peft: export"):
        export(lm.load("base", runs_dir=runs), tmp_path / "out", "peft")
