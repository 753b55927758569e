"""Where the cache folder is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lm.corpora.cache import cache_folder


def test_inkling_cache_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKLING_CACHE", "~/of-inkling")
    assert cache_folder() == Path.home() / "of-inkling"


@pytest.mark.skipif(sys.platform != "linux", reason="the XDG folders are those of Linux")
@pytest.mark.parametrize(("xdg", "folder"), [(None, "home/.cache/inkling"), ("xdg", "xdg/inkling")])
def test_without_it_the_cache_is_in_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xdg: str | None, folder: str
) -> None:
    monkeypatch.delenv("INKLING_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg))
    assert cache_folder() == tmp_path / folder
    assert not (tmp_path / folder).exists()
