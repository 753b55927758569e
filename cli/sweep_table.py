"""The result of a sweep as a table and sentences."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from cli.options import runs_dir_flag
from cli.output import wide_table
from lm.runs.card import figure

if TYPE_CHECKING:
    from lm.comparison.result import Difference
    from lm.jobs.sweep import SweepResult
    from lm.jobs.sweep_choice import ConfigurationResult, Spread


def print_result(screen: Console, result: SweepResult, picture: Path | None, runs_dir: Path) -> None:
    """Print the configurations, best first, the choice, the test figure, and the commands to type next."""
    table = wide_table("configuration", "seeds", "bits/byte", "lowest–highest")
    for each in result.configurations:
        table.add_row(Text(f"{each.number}: {each.label}"), _seeds(each), *_figures(each.valid))
    screen.print(table)

    def say(sentence: str) -> None:
        screen.print(sentence, markup=False, soft_wrap=True)

    first = result.folder.record.runs[0]
    say("bits/byte: validation split, mean of the seeds; lower is better.")
    say(f"Runs: {first.run} is configuration {first.configuration} with seed {first.seed}, and so on.")
    for run in result.folder.record.runs:
        if run.status == "failed":
            say(f"{run.run} failed: {run.sentence}")
    if result.best is None:
        say("No configuration has every seed finished, so none is chosen.")
        return
    best, count = result.best, sum(each.is_complete for each in result.configurations)
    assert best.valid is not None
    say(f"Best by validation: {best.label}: {best.valid.mean:.4f} bits per byte.")
    if count > 1:
        say(f"It is the lowest of {count}, so this figure is a little too low by chance.")
    if result.comparison is not None:
        if not result.comparison.verdict.comparable:
            say(result.comparison.verdict.sentence)
        for difference in result.comparison.differences:
            say(f"Against {_other(result, difference)}: {difference.sentence}")
    _print_test(screen, result)
    assert result.best_file is not None
    if picture is not None:
        say(f"Curves: {picture}")
    there = runs_dir_flag(runs_dir)
    source = shlex.quote(result.folder.record.configurations[0].config.corpus.source)
    say(f"Next: lm train {source} --config {shlex.quote(str(result.best_file))}{there}")
    say(f"or:   lm plot --sweep {shlex.quote(result.name)}{there} --terminal")


def _print_test(screen: Console, result: SweepResult) -> None:
    """Print the figure of the test split, and how often it was scored."""
    if result.test is None:
        sentence = "The text has no test split, so no figure is free of the choice."
    else:
        from lm.jobs.sweep_choice import Spread

        figures = Spread(tuple(each for each in result.test.bits_per_byte.values() if each is not None))
        spread = f" ({figures.low:.4f} to {figures.high:.4f})" if len(figures.figures) > 1 else ""
        times = len(result.folder.record.test)
        once = "once, for the best alone" if times == 1 else f"{times} times, for each configuration that was the best"
        sentence = f"Test split, scored {once}: {figures.mean:.4f} bits per byte{spread}."
    screen.print(sentence, markup=False, soft_wrap=True)


def _other(result: SweepResult, difference: Difference) -> str:
    """The configuration that a difference compares with the best one, as in the table."""
    assert result.comparison is not None and result.best is not None
    for candidate in result.comparison.candidates:
        if candidate.name in (difference.a, difference.b) and candidate.runs != result.best.runs:
            for each in result.configurations:
                if each.runs == candidate.runs:
                    return f"{each.number}: {each.label}"
    return difference.b


def _seeds(each: ConfigurationResult) -> str:
    return str(each.seeds) if each.is_complete else f"{len(each.runs)} of {each.seeds}"


def _figures(valid: Spread | None) -> tuple[str, str]:
    if valid is None:
        return "–", "–"
    spread = f"{valid.low:.4f}–{valid.high:.4f}" if len(valid.figures) > 1 else "–"
    return figure(valid.mean, ".4f"), spread
