"""What is imported when, and in which direction."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    # Without coverage, which would be measured along.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_imports_point_one_way():
    checked = subprocess.run(
        [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert " 0 broken" in checked.stdout


HELP = """
import sys
from cli.main import main
sys.argv = ["lm", {arguments}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = {{"torch", "datasets", "sentencepiece", "tensorboard", "pyarrow"}} & set(sys.modules)
print("heavy:", sorted(loaded))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        '"--help"',
        '"train", "--help"',
        '"sample", "--help"',
        '"eval", "--help"',
        '"plot", "--help"',
        '"watch", "--help"',
        '"--version"',
    ],
)
def test_help_loads_no_heavy_library(arguments):
    printed = python(HELP.format(arguments=arguments))
    assert printed.splitlines()[-1] == "heavy: []"


def test_import_lm_loads_no_torch_and_offers_its_names():
    code = "import lm, sys; print('torch' in sys.modules, lm.load.__name__, lm.compose.__name__, 'train' in dir(lm))"
    assert python(code).split() == ["False", "load", "compose", "True"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "lm.config", "lm.registry", "lm.files", "lm.runs.run_folder", "lm.generation.options", "lm.generation.filters",
        "lm.generation.engine", "lm.generation.conversation", "lm.generation.snapshots",
        "lm.tokenizers.byte", "lm.tokenizers.char", "lm.tokenizers.word", "lm.tokenizers.subword",
        "lm.corpora.sources", "lm.corpora.prepared", "lm.corpora.batches", "lm.corpora.hub",
    ],
)  # fmt: skip
def test_works_without_torch(module):
    assert python(f"import sys; sys.modules['torch'] = None; import {module}; print('fine')") == "fine\n"


TRAIN = """
import sys, lm
config = lm.compose("{text}", preset="gru-char-small", overrides={{"training.max_steps": 2, "model.table_orders": []}})
lm.train("{text}", config, name="small", runs_dir="{folder}")
print("compiler:", "torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_training_does_not_import_the_compiler(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200, "utf-8")
    assert python(TRAIN.format(text=text, folder=tmp_path)).splitlines()[-1] == "compiler: False"
