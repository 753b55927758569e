"""A built wheel, away from the checkout, behaves as the checkout does."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from lm.config import preset_names
from tests.conftest import SHIPPED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SHIPPED_FILES = ("README.md", "config.json", "model.safetensors", "report.json", "tokenizer.json")


def program(*command: str, cwd: Path, **environment: str) -> str:
    ran = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from it where no compiler works, of a checkout in which a user has trained."""
    checkout = tmp_path_factory.mktemp("built") / "checkout"
    checkout.mkdir()
    files = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile")
    for name in (*files, ".gitignore"):
        shutil.copy(ROOT / name, checkout)
    for name in ("lm", "cli", "serve", *(f"checkpoints/{name}" for name in SHIPPED)):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    mine = checkout / "checkpoints" / "mine"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    (mine / "model.safetensors").write_bytes(b"secret")
    (checkout / "checkpoints" / SHIPPED[0] / "last").mkdir()
    (checkout / "checkpoints" / SHIPPED[0] / "last" / "state.json").write_text("{}")
    program(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=checkout, CXX="no-compiler")
    return checkout / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    program(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir",
        "--disable-pip-version-check", "--target", str(target), str(wheel), cwd=target,
    )  # fmt: skip
    return target


@pytest.fixture
def lm_away(installed: Path, tmp_path: Path):
    def run(*arguments: str) -> str:
        # -S leaves out .pth files, and with them the checkout where it is installed as editable.
        code = "import lm, cli.main; print(lm.__file__, cli.main.__file__); cli.main.main()"
        folders = [str(installed), *dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
        environment = {
            "PYTHONPATH": os.pathsep.join(folders),
            "INKLING_CACHE": str(tmp_path / "cache"),
            "COLUMNS": "200",
        }
        printed = program(sys.executable, "-S", "-c", code, *arguments, cwd=tmp_path, **environment)
        where, _, printed = printed.partition("\n")
        assert where == f"{installed / 'lm' / '__init__.py'} {installed / 'cli' / 'main.py'}"
        return printed

    return run


def test_the_wheel_holds_packages_presets_and_the_shipped_runs_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    presets = {f"lm/presets/{name}.toml" for name in preset_names()}
    shipped = {f"lm/shipped/{run}/{name}" for run in SHIPPED for name in SHIPPED_FILES}
    sources = {
        str(path.relative_to(ROOT)) for folder in ("lm", "cli", "serve") for path in (ROOT / folder).rglob("*.py")
    }
    folder = ROOT / "serve" / "page" / "assets"
    assets = {str(path.relative_to(ROOT)) for path in folder.iterdir() if path.is_file()}
    assets |= {str(path.relative_to(ROOT)) for path in (ROOT / "lm" / "html_parts").glob("*.css")}
    assets |= {str(path.relative_to(ROOT)) for path in (ROOT / "lm" / "interop" / "html_assets").iterdir()}
    assets.add("serve/security/login.html")
    assert names - {"lm/py.typed"} == presets | shipped | sources | assets


def test_a_users_runs_are_in_neither_wheel_nor_sdist(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = zipfile.ZipFile(wheel).namelist() + archive.getnames()
    assert all(any(f"/{run}/" in name for name in names) for run in SHIPPED)
    assert not [name for name in names if "mine" in name or "/last/" in f"{name}/"]


def test_help_and_presets_are_those_of_the_checkout(lm_away):
    assert "lm train FILE" in lm_away("--help")
    # A long list of names is broken at their hyphens too.
    printed = "".join(lm_away("train", "--help").split())
    assert all(name in printed for name in preset_names())


def test_a_run_is_trained_scored_and_resumed(lm_away, tmp_path):
    # The runs lie below the current folder, which is tmp_path; so does the cache.
    small = ("--preset", "gru-char", "--set", "model.hidden_size=16", "--device", "cpu")
    lm_away("train", "pydoc-topics", *small, "--max-steps", "3", "--name", "tiny")
    folder = tmp_path / "checkpoints" / "tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    scored = json.loads((folder / "report.json").read_text("utf-8"))["valid"]
    assert last_step(folder) == 3
    lm_away("train", "--resume", "tiny", "--max-steps", "5")
    assert last_step(folder) == 5
    assert json.loads(lm_away("eval", "tiny", "--split", "valid", "--device", "cpu", "--json"))["loss"] < scored["loss"]


def last_step(folder: Path) -> int:
    return json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["step"]


@pytest.mark.parametrize("run", SHIPPED)
def test_a_shipped_run_is_listed_shown_and_sampled(lm_away, run):
    assert run in lm_away("list")
    assert "parameters" in lm_away("show", run)
    first = lm_away("sample", run, "--prompt", "The king", "--seed", "7", "--max-tokens", "20", "--device", "cpu")
    assert first.startswith("The king")
    assert len(first) > len("The king") + 10


@pytest.mark.parametrize("native", ["1", "0"])
def test_the_check_of_wheels_with_kernels_passes_with_them_alone(native):
    ran = subprocess.run(
        [sys.executable, "tests/wheel_check.py"], cwd=ROOT, env={**os.environ, "INKLING_NATIVE": native},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed = ran.stdout + ran.stderr
    assert ran.returncode == 1 - int(native), printed
    assert ("a step with plain equals numpy's" if native == "1" else "has no compiled kernels") in printed
