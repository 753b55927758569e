"""`make gpu` without a GPU: its parts run tiny on the pretended one, so that no mistake costs time on a real one.

`make soak` runs every part, and so does `make gpu-dry`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import __main__ as script
from tests.pretended_gpu import shim

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [["words"], pytest.param([*script.SHARES], marks=pytest.mark.soak)], ids=len)
def test_parts_run_dry(parts: list[str], tmp_path: Path) -> None:
    if reason := shim.missing():
        pytest.skip(f"the pretended GPU {reason}")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--dry-run", "--out", str(tmp_path), "--only", *parts], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600, check=False,
    )  # fmt: skip
    record = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(parts, "done")
    assert ran.returncode == 0, ran.stderr
    for part in record["parts"].values():
        assert part["tables"] and all(table["rows"] for table in part["tables"])
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert page.startswith("# Results on a GPU: Pretended GPU") and "no figure here means anything" in page
    assert "| wikitext-2, perplexity per word on valid | at most 65 |" in page


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(out=folder, nanogpt=None, data=None, dry_run=False)


def test_a_part_that_fails_is_named_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROOT", _fake(tmp_path, "print('one'); raise SystemExit('no device')"))
    outcome = script.start_part("levels", 20.0, options(tmp_path))
    assert outcome["status"] == "failed: no device"


def test_a_part_that_is_too_slow_keeps_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import pathlib, time; pathlib.Path(r'{tmp_path}/part-levels.json').write_text('{{\"tables\": [1]}}')"
    monkeypatch.setattr(script, "ROOT", _fake(tmp_path, f"{code}; time.sleep(60)"))
    monkeypatch.setattr(script, "GRACE_SECONDS", 0.5)
    outcome = script.start_part("levels", 0.5, options(tmp_path))
    assert outcome["status"].startswith("ended after") and outcome["tables"] == [1]


def _fake(folder: Path, code: str) -> Path:
    """A folder whose tests/gpu is this code."""
    (folder / "tests" / "gpu").mkdir(parents=True)
    (folder / "tests" / "gpu" / "__main__.py").write_text(code, "utf-8")
    return folder
