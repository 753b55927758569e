"""Promises that the source text itself keeps."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import lm
from lm.config import RunConfig, compose, preset_names, read_preset
from lm.registry import MODELS, TOKENIZERS
from tests.conftest import SHIPPED

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("lm", "cli", "serve") for path in (ROOT / folder).rglob("*.py"))
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PROMISED_PRESETS = {
    "gru-char", "lstm-char", "transformer-char", "gru-word", "lstm-word", "transformer-word",
    "transformer-subword", "gru-subword",
}  # fmt: skip


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_nothing_is_pickled():
    words = re.compile(rf"\b({'|'.join(PICKLERS)}|torch|allow_pickle)\b")
    for path in SOURCES:
        text = path.read_text("utf-8")
        if words.search(text):
            assert_no_pickle(path, ast.parse(text))


def assert_no_pickle(path, tree):
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = {alias.name.partition(".")[0] for alias in names} & PICKLERS
            case ast.ImportFrom(module=str(module), names=names):
                found = {module.partition(".")[0]} & PICKLERS
                found |= {alias.name for alias in names if module == "torch" and alias.name in ("load", "save")}
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as attribute):
                found = {f"torch.{attribute}"}
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found = {"allow_pickle"}
            case _:
                continue
        assert not found, f"{path}, line {node.lineno}"


def test_how_a_model_is_trained_depends_on_its_method_alone():
    readers = [path for path in SOURCES if re.search(r"\.trained_by\b(?!`)", path.read_text("utf-8"))]
    assert readers == [ROOT / "lm" / "models" / "base.py"]


def test_the_search_for_pickles_sees_the_whole_library():
    assert {ROOT / "lm" / "runs" / "run_folder.py", ROOT / "cli" / "main.py"} <= set(SOURCES)


def test_the_version_is_the_same_everywhere():
    assert importlib.metadata.version("inkling-lm") == lm.__version__
    news = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert news[0] == lm.__version__


def test_the_promised_presets_exist():
    assert set(preset_names()) >= PROMISED_PRESETS


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_valid_and_is_what_its_name_says(name):
    config = compose("input.txt", preset=name)
    model, tokenizer, *_ = name.split("-")
    assert (config.preset, config.model.type, config.tokenizer.type) == (name, model, tokenizer)
    assert config.model.type in MODELS.names()
    assert config.tokenizer.type in TOKENIZERS.names()
    assert RunConfig.model_validate_json(config.model_dump_json()).resolved() == config


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_names_no_corpus(name):
    assert "corpus" not in read_preset(name)


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["plot"],
        *project["optional-dependencies"]["bench"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["dev"],
    ]
    names = {re.match(r"[\w.-]+", line)[0] for line in wanted} - {"inkling-lm"}
    assert {name.lower() for name in names} <= pinned().keys()


def test_the_tested_torch_is_pinned_without_a_machine():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pinned()["torch"])


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "Makefile", ".ci/run"])
def test_what_installs_names_no_package_host_and_no_path_of_a_machine(name):
    text = (ROOT / name).read_text("utf-8")
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links|/opt/|/home/|/work/", text)


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_shipped_runs_are_small():
    files = [path for name in SHIPPED for path in (ROOT / "checkpoints" / name).rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 12_000_000
