"""Strict skips: what CI allows to be skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CONFTEST = Path(__file__).parents[1] / "conftest.py"
SKIPS = """
import pytest

def test_a(): pytest.skip("no time")
@pytest.mark.skipif(True, reason="needs the real corpora (INKLING_DATA)")
def test_b(): pass
def test_c(): pytest.xfail("known")
def test_d(): pass
"""


def outcomes(tmp_path: Path, tests: str, **environment: str) -> str:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST.read_text("utf-8"), "utf-8")
    (tmp_path / "tests" / "test_it.py").write_text(tests, "utf-8")
    inherited = {key: value for key, value in os.environ.items() if key not in ("CI", "INKLING_STRICT_SKIPS")}
    # Plugins have no part in it, and take seconds to load.
    inherited["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return ran.stdout


def test_a_skip_is_a_failure_in_ci_unless_its_reason_is_allowed_and_true(tmp_path):
    last = outcomes(tmp_path, SKIPS, CI="true", INKLING_DATA=str(tmp_path)).splitlines()[-1]
    assert last.startswith("1 failed, 1 passed, 1 skipped, 1 xfailed")


def test_an_allowed_reason_does_not_excuse_a_skip_where_the_corpora_are_there(tmp_path):
    (tmp_path / "data" / "wikitext-2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext-2" / "train.txt").touch()
    last = outcomes(tmp_path, SKIPS, INKLING_STRICT_SKIPS="1", INKLING_DATA=str(tmp_path / "data")).splitlines()[-1]
    assert last.startswith("1 failed, 1 passed, 1 xfailed, 1 error")


def test_a_module_that_skips_itself_is_a_failure_in_ci(tmp_path):
    printed = outcomes(tmp_path, "import pytest\npytest.importorskip('no_such_module')\n", CI="true")
    assert "not allowed here" in printed
    assert "1 error" in printed


def test_elsewhere_skips_are_skips(tmp_path):
    last = outcomes(tmp_path, SKIPS).splitlines()[-1]
    assert last.startswith("1 passed, 2 skipped, 1 xfailed")
