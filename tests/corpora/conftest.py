"""Every test has a cache of its own and sees no corpora of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INKLING_CACHE", str(folder))
    monkeypatch.delenv("INKLING_DATA", raising=False)
    return folder
