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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.files import write_file
from lm.version import __version__

RESULTS = Path(__file__).parent / "results"
Spread = dict[str, float]
"""The median, least and most of several turns."""


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


def commit(root: Path | None = None) -> str | None:
    """The commit of a checkout, with a + where files had changed; default: of this one."""
    root = root or Path(__file__).parents[1]
    asked = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: int = 1) -> dict[str, Spread]:
    """Figures of contenders that take turns, so that a change of the machine's mood meets all of them.

    Args:
        contenders: each measures itself once and returns its figure.
        rounds: turns of each that count.
        warm_up: turns of each before those, which do not.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warm_up, rounds):
        for name, run in contenders.items():
            figure = run()
            if turn >= 0:
                figures[name].append(figure)
    return {name: spread(each) for name, each in figures.items()}


def spread(figures: Sequence[float]) -> Spread:
    """Median, least and most."""
    return {"median": statistics.median(figures), "least": min(figures), "most": max(figures)}


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Spread]:
    """Work a second of contenders that take turns.

    Args:
        contenders: each runs a fixed amount of work and returns how much it was.
        rounds: turns of each, after one that does not count.
    """

    def rate(run: Callable[[], float]) -> Callable[[], float]:
        def timed() -> float:
            begun = time.perf_counter()
            return run() / (time.perf_counter() - begun)

        return timed

    return take_turns({name: rate(run) for name, run in contenders.items()}, rounds)


def save(name: str, record: dict[str, Any], out: Path | None = None, *, folder: Path = RESULTS) -> Path:
    """Write a benchmark's record, with date, machine and commit, in `folder` or as `out`."""
    date = datetime.datetime.now(datetime.UTC)
    head = {"benchmark": name, "date": date.isoformat(timespec="seconds"), "commit": commit(), "machine": machine()}
    path = out or folder / f"{name}-{date:%Y%m%dT%H%M%SZ}.json"
    write_file(path, json.dumps({**head, **record}, indent=1) + "\n")
    return path
