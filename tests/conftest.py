"""For every test: a cache of its own session, the real corpora where this machine has them, and no silent skips.

With CI or INKLING_STRICT_SKIPS set, a test that is skipped for a reason outside ALLOWED_SKIPS fails.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("shakespeare-gru", "wikitext-gru")
"""The runs that come with Inkling."""
STRICT_SKIPS = any(
    os.environ.get(name, "").lower() not in ("", "0", "false") for name in ("CI", "INKLING_STRICT_SKIPS")
)


def _no_real_corpora() -> bool:
    return not Path(os.environ.get("INKLING_DATA") or "missing", "wikitext-2", "train.txt").is_file()


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _no_build_tools() -> bool:
    return any(shutil.which(tool) is None for tool in ("cmake", "c++", "nm"))


def _no_emulated_arm() -> bool:
    return any(shutil.which(tool) is None for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"))


ALLOWED_SKIPS: dict[str, Callable[[], bool]] = {
    # What the reason must say → whether the machine really lacks it.
    "INKLING_DATA": _no_real_corpora,  # the real corpora are not part of the repository
    "CUDA": _no_gpu,  # CI has no GPU
    "compiler": lambda: not any(map(shutil.which, ("c++", "g++", "clang++"))),  # for the pretended GPU
    "cmake": _no_build_tools,  # pip brings its own to build with
    "aarch64": _no_emulated_arm,  # a cross-compiler and an emulator
}

REAL_DATA = pytest.StashKey[Path]()

hypothesis.settings.register_profile("inkling", deadline=None, derandomize=STRICT_SKIPS)
hypothesis.settings.load_profile("inkling")


def pytest_configure(config: pytest.Config) -> None:
    """Point the program at this session's own folders before any test module is read."""
    folder = Path(tempfile.mkdtemp(prefix="inkling-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    # Models as small as these wait for a second thread longer than it helps them; torch is not loaded yet.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Hundreds of tests start a program: each would compile all modules again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ["INKLING_CACHE"] = str(folder / "cache")
    os.environ["HF_HOME"] = str(folder / "huggingface")
    os.environ.pop("INKLING_RUNS", None)
    if not os.environ.get("INKLING_DATA") and (data := ROOT.parent / "shared" / "data").is_dir():
        os.environ["INKLING_DATA"] = str(data)
    config.stash[REAL_DATA] = Path(os.environ.get("INKLING_DATA") or "missing").resolve()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test with a real server, browser or process gets a second try: another program may take the processor.

    The summary names each such test. One that fails twice fails. A test for the soak is slow too: `-m "not slow"`
    replaces the `-m "not soak"` of pyproject.toml.
    """
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") or (ROOT / "tests" / "serve") in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real corpora, even where a test hides INKLING_DATA; the test is skipped where there is none."""
    folder = request.config.stash[REAL_DATA]
    if not (folder / "wikitext-2" / "train.txt").is_file():
        pytest.skip("needs the real corpora (INKLING_DATA)")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under strict skips, a skip that is not allowed is a failure."""
    report = yield
    return _strict(report) if not hasattr(report, "wasxfail") else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself."""
    return _strict((yield))


def _strict(report: Any) -> Any:
    if STRICT_SKIPS and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(rf"\b{word}\b", reason) and lacking() for word, lacking in ALLOWED_SKIPS.items()):
            report.outcome = "failed"
            report.longrepr = f"{reason}\nThis skip is not allowed here; see ALLOWED_SKIPS in tests/conftest.py."
    return report
