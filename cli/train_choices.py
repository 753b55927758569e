"""What `lm train` chose for a text because no option gave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm.jobs.prepared_job import PreparedJob
    from lm.jobs.resolve import ResolvedRequest


def print_choices(resolved: ResolvedRequest, job: PreparedJob, *, explain: bool) -> None:
    """Report the text, and what was chosen because no option gave it."""
    from cli.output import say
    from lm.runs.card import model_name

    given, config = resolved.config.training, job.config
    if job.tokens.notes:
        say(f"Text: {'; '.join(job.tokens.notes)}.", dim=False)
    has_length = given.max_steps is not None or given.epochs is not None or given.minutes is not None
    if not has_length and not job.method.in_one_pass:
        say("No length given: training for 5 minutes (--minutes changes this).", dim=False)
    if job.choice is not None:
        width = config.model.model_dump().get("hidden_size")
        size = "" if width is None else f" of width {width:,}"
        say(f"Model for this text, time and machine: {model_name(config)}{size}.", dim=False)
        if config.training.epochs != given.epochs:
            say(f"Short text: training stops after {config.training.epochs:g} epochs to avoid overfitting", dim=False)
            say("(--epochs changes this).", dim=False)
    if explain:
        _print_explanation(job)


def _print_explanation(job: PreparedJob) -> None:
    """The inputs and outputs of the rule for the default model, on stderr."""
    from rich.table import Table

    from cli.output import console, say

    if job.choice is None:
        say("--explain: the options were given by a preset or a run; there was nothing to choose.", dim=False)
        return
    table = Table("what", "value", "why", box=None, pad_edge=False)
    for row in job.choice.explain():
        table.add_row(*row)
    console(stderr=True).print(table)
