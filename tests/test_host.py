"""What this computer has: read from the system, and from control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm import host


def test_threads_are_those_that_this_process_may_use() -> None:
    code = (
        "import os; from lm import host; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "print(host.usable_threads())"
    )
    assert host.usable_threads() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "1\n"


def test_a_containers_limit_is_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = host.memory()
    assert 0 < whole["available"] <= whole["total"]
    monkeypatch.setattr(host, "_container", lambda: (1 << 28, 1 << 20))
    assert host.memory() == {"total": 1 << 28, "available": (1 << 28) - (1 << 20)}
    monkeypatch.setattr(host, "_container", lambda: (1 << 60, 0))
    assert host.memory()["total"] == whole["total"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_the_peak_of_memory_can_be_reset() -> None:
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    before = host.peak_resident_bytes()
    del block
    host.reset_peak_resident()
    after = host.peak_resident_bytes()
    assert before is not None and after is not None and before - after > 32 << 20
