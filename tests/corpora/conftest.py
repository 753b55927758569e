"""Every test has a cache of its own and sees no corpora of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read before the fixture below hides it.
INKLING_DATA = os.environ.get("INKLING_DATA")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INKLING_CACHE", str(folder))
    monkeypatch.delenv("INKLING_DATA", raising=False)
    return folder


@pytest.fixture
def real_data() -> Path:
    """The folder of real corpora; the test is not run where there is none."""
    chosen = INKLING_DATA or str(Path(__file__).parents[3] / "shared" / "data")
    if not (Path(chosen) / "wikitext-2" / "train.txt").is_file():
        pytest.skip("needs the real corpora (INKLING_DATA)")
    return Path(chosen)
