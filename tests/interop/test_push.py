"""A run is uploaded to a local stand-in of the Hugging Face Hub; an error is one sentence and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.errors import ConfigError, ServerError
from lm.interop.push import push, repository_name
from tests.interop.hub_stand_in import TOKEN, Hub, hub

# huggingface_hub uploads large files in a way that its HTTP library wants to drop.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run "tiny"."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("the cat sat on a mat .\n" * 200, "utf-8")
    options = {
        "model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 1, "model.context_length": 32,
        "model.table_orders": [], "training.max_steps": 2,
    }  # fmt: skip
    lm.train(text, preset="transformer-char", overrides=options, name="tiny", runs_dir=folder)
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, which this process takes for the hub."""
    with hub() as state:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", state.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        yield state


@pytest.mark.parametrize(("to", "weights"), [("gguf", "model.gguf"), ("hf", "model.safetensors")])
def test_the_files_of_an_export_are_in_the_repository(to: str, weights: str, runs: Path, server: Hub, tmp_path: Path):
    done = push(lm.load("tiny", runs_dir=runs), "hf:me/tiny", to, private=True)
    made = server.repositories["me/tiny"]
    assert done.url == f"{server.url}/me/tiny" and len(done.commit) == 40
    assert made.private and {weights, "README.md"} <= made.files.keys()
    assert sum(map(len, made.files.values())) == pytest.approx(done.exported.size_bytes, abs=200)
    card = made.files["README.md"].decode()
    assert card.startswith("---\ntags:\n- inkling\nlibrary_name: ") and '"PATH"' not in card
    if to == "hf":
        assert 'from_pretrained("me/tiny")' in card
    assert not [path for path in tmp_path.iterdir() if "inkling" in path.name]


def test_the_command_uploads_to_the_hub_of_the_variables(runs: Path, tmp_path: Path):
    with hub() as state:
        variables = {
            "HF_ENDPOINT": state.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path),
        }  # fmt: skip
        command = [sys.executable, "-m", "cli.main", "push", "tiny", "hf:me/other", "--to", "gguf"]
        command += ["--precision", "q8_0", "--runs-dir", str(runs)]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"{state.url}/me/other" in done.stdout and not state.repositories["me/other"].private


def test_a_second_upload_is_a_commit_of_the_same_repository(runs: Path, server: Hub):
    run = lm.load("tiny", runs_dir=runs)
    first = push(run, "hf:me/tiny", "gguf")
    size = len(server.repositories["me/tiny"].files["model.gguf"])
    second = push(run, "hf:me/tiny", "gguf", "fp16")
    assert second.url == first.url and second.commit != first.commit
    assert len(server.repositories["me/tiny"].files["model.gguf"]) < 0.7 * size
    # Who asks for a private repository must not fill a public one.
    with pytest.raises(ConfigError, match="me/tiny exists and is public, so nothing was uploaded"):
        push(run, "hf:me/tiny", "gguf", private=True)


@pytest.mark.parametrize(
    ("refused", "left"), [("/repos/create", None), ("/objects/batch", None), ("/commit/main", "kept")]
)
def test_without_the_right_to_write_nothing_new_is_left(
    refused: str, left: str | None, runs: Path, server: Hub, tmp_path: Path
):
    run = lm.load("tiny", runs_dir=runs)
    if left is not None:
        push(run, "hf:me/tiny", "gguf")
    server.refused = refused
    with pytest.raises(ServerError, match="refuses to write to me/tiny: the token has no right to"):
        push(run, "hf:me/tiny", "gguf")
    assert ("me/tiny" in server.repositories) == (left is not None)
    assert not [path for path in tmp_path.iterdir() if "inkling" in path.name]


def test_without_a_token_nothing_is_exported(runs: Path, server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="no token for the Hugging Face Hub: .*HF_TOKEN"):
        push(lm.load("tiny", runs_dir=runs), "hf:me/tiny")
    assert not server.repositories


def test_an_unknown_token_is_said_to_be_one(runs: Path, server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(ServerError, match="does not know the token: make another one"):
        push(lm.load("tiny", runs_dir=runs), "hf:me/tiny", "gguf")


def test_without_a_network_the_hub_is_named(runs: Path, server: Hub, monkeypatch: pytest.MonkeyPatch):
    for place in ("constants", "hf_api.constants"):
        monkeypatch.setattr(f"huggingface_hub.{place}.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"127.0.0.1:9 cannot be reached \(.*\): nothing was uploaded"):
        push(lm.load("tiny", runs_dir=runs), "hf:me/tiny", "gguf")


@pytest.mark.parametrize("name", ["me/tiny", "hf:tiny", "hf:me/a b", "hf:a/b/c"])
def test_what_is_no_repository_is_refused(name: str):
    with pytest.raises(ConfigError, match="is no repository of the Hugging Face Hub: write hf:USER/NAME"):
        repository_name(name)
    assert repository_name("hf:me/tiny") == "me/tiny"


def test_a_precision_that_the_format_lacks_is_refused(runs: Path, server: Hub):
    run: Any = lm.load("tiny", runs_dir=runs)
    with pytest.raises(ConfigError, match="--precision q8_0: the format hf has fp32 and fp16"):
        push(run, "hf:me/tiny", "hf", "q8_0")
