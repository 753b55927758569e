"""Runs that differ by their seed alone are one candidate: the spread across seeds is shown with a difference."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lm.comparison.bootstrap import t_quantile
from lm.config import RunConfig
from lm.runs.run import Run

_END = re.compile(r"[-_.@ ]*(?:(?<![a-zA-Z])(?:seed|s))?[-_.@ ]*$")


def configuration(config: RunConfig, record: Mapping[str, Any], checkpoint: str) -> str:
    """A text that is equal for runs that differ by their seed alone.

    Args:
        config: all options of the run.
        record: the content of its `config.json`.
        checkpoint: best, last or step-N.
    """
    options = config.model_dump(mode="json", exclude={"corpus": True, "preset": True, "training": {"seed"}})
    facts = {
        "options": options,
        "corpus": record["corpus"]["sha256"],
        "init": record.get("init"),
        # Imported models may have equal options, no corpus, and other weights.
        "imported": (record.get("imported") or {}).get("sha256"),
        "tokenizer": record.get("tokenizer_sha256"),
        "teacher": (record.get("teacher") or {}).get("run"),
        "checkpoint": checkpoint,
    }
    return json.dumps(facts, sort_keys=True)


def grouped(keys: Sequence[str]) -> list[list[int]]:
    """The indices of the runs of each configuration, in order of their first run.

    If all runs have one configuration, each is a group: they are compared with each other.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [[index] for index in range(len(keys))] if len(groups) == 1 else list(groups.values())


def group_name(names: Sequence[str]) -> str:
    """A name for runs: what their names have in common, and how many seeds there are."""
    if len(names) == 1:
        return names[0]
    common = names[0]
    for name in names[1:]:
        while not name.startswith(common):
            common = common[:-1]
    # A number is not cut in two: of "run-10" and "run-11" the common part is "run-".
    common = _END.sub(
        "", common.rstrip("0123456789") if any(name[len(common) :][:1].isdigit() for name in names) else common
    )
    return f"{common or names[0]} ({len(names)} seeds)"


def seed_groups(runs: Sequence[Run]) -> dict[str, str]:
    """Run → name of its group; runs that differ by their seed alone are one."""
    members: dict[str, list[str]] = {}
    for run in runs:
        members.setdefault(configuration(run.config, run.record, run.checkpoint), []).append(run.name)
    groups: dict[str, str] = {}
    for group in members.values():
        name = group_name(group)
        # Two groups whose names have the same start.
        groups |= dict.fromkeys(group, ", ".join(group) if name in groups.values() else name)
    return groups


def spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation across runs; None for one run, or if a value is unknown."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def seed_margin(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Standard error of the difference of two means across seeds, and the 95 % margin around it (Welch 1947).

    Where one side has a single run, its variance is taken to be that of the other side. None if both have one run.
    """
    known = [values for values in (a, b) if len(values) > 1]
    if not known:
        return None
    variances = [statistics.variance(values if len(values) > 1 else known[0]) for values in (a, b)]
    terms = [variance / len(values) for variance, values in zip(variances, (a, b), strict=True)]
    total = sum(terms)
    if not total:
        return 0.0, 0.0
    if len(known) == 2:
        freedom = total**2 / sum(term**2 / (len(values) - 1) for term, values in zip(terms, (a, b), strict=True))
    else:
        freedom = len(known[0]) - 1
    return math.sqrt(total), t_quantile(freedom) * math.sqrt(total)
