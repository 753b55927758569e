"""The figure that `lm plot` draws: one that is comparable between the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cli.output import say
from lm.runs.run_folder import find_run

PER_TOKEN = ("loss", "perplexity", "accuracy")
"""Figures that depend on the tokenizer."""


def chosen_metric(metric: str | None, runs: Sequence[str] | None, runs_dir: Path) -> str:
    """The metric to draw: loss, or bits per byte with the spelling cost if the tokenizers differ.

    Args:
        metric: that the user chose; None: by the runs.
        runs: their names; none: the newest run.
        runs_dir: folder of the runs.
    """
    tokenizers = {find_run(name, runs_dir)[0].read_record()["tokenizer_sha256"] for name in runs or []}
    if len(tokenizers) < 2:
        return metric or "loss"
    if metric is None:
        say("The tokenizers differ: bits per byte, with the spelling of unknown words.")
    elif metric in PER_TOKEN:
        say(f"The tokenizers differ: {metric} is per token, and does not compare them. Use --metric bits_per_byte.")
    return metric or "bits_per_byte"
