"""What figures were measured on, and how: shared by the benchmarks."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm.version import __version__

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on; nothing that would name one machine, since results are kept in git."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text("utf-8").splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    return {"cpu": model, "cores": os.cpu_count()}


def versions(*libraries: str) -> dict[str, str]:
    """Of everything that the figures depend on; what is not installed is left out."""
    found = {"inkling": __version__, "python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that was measured, with a + where files had changed."""
    root = Path(__file__).parents[1]
    asked = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Rates of contenders that take turns, so that a change of the machine's mood meets all of them.

    Args:
        contenders: each runs a fixed amount of work and returns how much it was.
        rounds: turns of each, after one that does not count.

    Returns:
        median, least and most of each, in work a second.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            begun = time.perf_counter()
            work = run()
            if turn:
                rates[name].append(work / (time.perf_counter() - begun))
    return {
        name: {"median": statistics.median(each), "least": min(each), "most": max(each)} for name, each in rates.items()
    }


def save(name: str, record: dict[str, Any], out: Path | None = None) -> Path:
    """Write a benchmark's record, with date, machine and commit, under benchmarks/results/."""
    date = datetime.datetime.now(datetime.UTC)
    head = {"benchmark": name, "date": date.isoformat(timespec="seconds"), "commit": commit(), "machine": machine()}
    path = out or RESULTS / f"{name}-{date:%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **record}, indent=1) + "\n", encoding="utf-8")
    return path
