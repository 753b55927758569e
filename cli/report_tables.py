"""Perplexity reports and memory estimates as tables of at most 80 columns."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from cli.output import console, facts_table, print_json, print_sentence
from lm.errors import DeviceError

if TYPE_CHECKING:
    from lm.evaluation.report import FineTuning, Report
    from lm.profiling.memory_estimate import Fit
    from lm.runs.run import Run

FEW_EPOCHS = 2.0
"""With fewer epochs, more training on the same text still helps."""
RISEN = 1.02
"""A last validation loss this many times the lowest one is no chance."""


def print_report(screen: Console, report: Report) -> None:
    """Print the figures, each with what it is divided by, and how they were measured."""
    from lm.runs.card import figure, figures_of

    step = f", step {report.step:,}" if report.step is not None else ""
    where = f"({report.state}{step}) on {report.corpus}"
    if report.split != "text":
        where += f", split {report.split}"
    if report.kind is not None:
        where += f" – {report.kind}"
    screen.print(f"[bold]{escape(report.run)}[/bold] {escape(where)}", soft_wrap=not screen.is_terminal)
    known = figures_of([report.model_dump()])
    rows = [
        ("loss", f"{report.loss:.4f}", f"± {report.standard_error:.4f} nats per token, over {report.tokens:,} tokens"),
        ("perplexity", figure(report.perplexity, ",.3f"), "per token; depends on the tokenizer"),
    ]
    if "perplexity_without_unknown" in known:
        known_tokens = report.tokens - report.unknown_tokens
        rows.append(
            ("  without unknown", figure(report.perplexity_without_unknown, ",.3f"),
             f"over {known_tokens:,} tokens in the vocabulary")
        )  # fmt: skip
    rows += [
        ("word perplexity", figure(report.word_perplexity, ",.2f"), f"over {report.words:,} words"),
        ("  with line ends", figure(report.word_eos_perplexity, ",.2f"),
         f"over {report.words + report.lines:,} words and line ends (WikiText)"),
        ("  as lm-eval", figure(report.lm_eval_word_perplexity, ",.2f"),
         f"over {report.lm_eval_words:,} parts of re.split(r'\\s+')"),
        ("bits per character", figure(report.bits_per_char, ".4f"), f"over {report.characters:,} characters"),
        ("bits per byte", figure(report.bits_per_byte, ".4f"),
         f"over {report.bytes:,} bytes; compare across tokenizers"),
    ]  # fmt: skip
    if "token_bits_per_byte" in known:
        rows.append(
            ("  tokens alone", figure(report.token_bits_per_byte, ".4f"), "without the spelling of unknown words")
        )
    if report.floor_loss is not None:
        rows.append(
            ("  floor", figure(report.floor_bits_per_byte, ".4f"),
             f"{(report.floor or '').partition(' of ')[0]} alone: {report.floor_loss:.4f} nats per token")
        )  # fmt: skip
    rows += [
        ("accuracy", f"{report.accuracy:.2%}", f"first choice; {report.top5_accuracy:.2%} among the first five"),
        ("unknown", f"{report.unknown_rate:.2%}", f"{report.unknown_tokens:,} tokens outside the vocabulary"),
        ("context", "", report.context),
        ("speed", f"{report.tokens_per_second:,.0f}", f"tokens/s on {report.device}, {report.precision}"),
        ("text", "", f"sha256 {report.text_sha256[:12]}…"),
    ]
    screen.print(facts_table(rows))
    for note in report.notes:
        print_sentence(screen, f"note: {note}", "yellow")
    if report.fine_tuning is not None:
        _print_fine_tuning(screen, report.fine_tuning)


def _print_fine_tuning(screen: Console, found: FineTuning) -> None:
    """Print the fine-tuned run, its base, the best run from scratch and the floor."""
    from lm.runs.card import figure

    screen.print("[bold]fine-tuning[/bold], bits per byte of the same text")
    screen.print(facts_table([(name, figure(bits, ".4f"), remark) for name, bits, remark in found.rows()]))
    if found.warning is not None:
        print_sentence(screen, f"warning: {found.warning}", "yellow")
    if found.note is not None:
        print_sentence(screen, f"note: {found.note}", "yellow")


def ways_to_beat_floor(run: Run) -> list[str]:
    """What would help a run that n-gram counts beat, best first, by its metrics."""
    from lm.evaluation.floor import floor_order
    from lm.jobs.ensemble_config import unwrapped
    from lm.models.training_method import training_method

    if training_method(run.config).in_one_pass:
        return [f"count n-grams of the same order: --set model.order={floor_order(run.record['vocab_size'])}"]
    rows = [row for row in run.folder.read_metrics() if row.get("valid_loss") is not None]
    config = unwrapped(run.config)
    # The rows of an ensemble have the sums over its members.
    members = 1 if config is run.config else config.training.ensemble or 1
    epochs = rows[-1]["epoch"] / members if rows else 0.0
    done = f"{epochs:.1f} epochs" if epochs >= 1 else f"{epochs:.1%} of an epoch"
    best = min(rows, key=lambda row: row["valid_loss"]) if rows else None
    if best is None or best["step"] == rows[-1]["step"]:
        falling = ", and the validation loss was still falling" if len(rows) > 1 else ""
        ways = [f"train longer ({done}{falling})"]
    elif epochs < FEW_EPOCHS and rows[-1]["valid_loss"] > RISEN * best["valid_loss"]:
        ways = [f"lower training.learning_rate ({done}, and the validation loss rose)"]
    elif epochs < FEW_EPOCHS:
        ways = [f"train longer ({done})"]
    else:
        ways = [f"use more text ({done}; the validation loss was lowest after {best['epoch']:.1f})"]
    if config.model.type != "hybrid" and config.tokenizer.type == "char":
        ways.append("use the default model (without --preset and --neural), which starts from such counts")
    return ways


def print_memory_estimate(fit: Fit, as_json: bool) -> None:
    """Print an estimate of memory.

    Raises:
        DeviceError: the training does not fit; the error names what to lower.
    """
    if as_json:
        print_json({**asdict(fit), "fits": fit.fits, "largest_batch": fit.largest_batch})
    else:
        console().print(facts_table(_memory_facts(fit)))
    if not fit.fits:
        raise DeviceError(fit.advice())


def _memory_facts(fit: Fit) -> list[tuple[str, str, str]]:
    from lm.profiling.memory_estimate import USABLE_SHARE, gigabytes

    def size(count: int | None) -> str:
        return "unknown" if count is None else gigabytes(count)

    rows: list[tuple[str, str, str]] = [
        ("model", f"{fit.parameters:,}", "parameters"),
        ("fixed", size(fit.state_bytes), "weights, gradients and moments"),
    ]
    if fit.step_bytes is not None:
        tried = f"up to {fit.tried_rows} rows" if fit.tried_rows else "a part of a row"
        source = "measured" if fit.tried_rows == fit.batch_size else f"estimated from {tried}"
        on_host = "" if fit.device == "cpu" else ", on the host"
        rows += [
            ("one row", size(fit.row_bytes), f"{fit.bptt:,} tokens, saved for backward"),
            ("one step", size(fit.step_bytes), f"maximum, with {fit.batch_size:,} rows; {source}"),
            ("validation", size(fit.evaluation_bytes), "maximum"),
            ("saving", size(fit.saving_bytes), f"copies of weights and moments{on_host}"),
            ("counting", size(fit.counting_bytes), "counts of the text, on the host"),
            ("total", size(fit.needed_bytes), f"maximum, on {fit.device}"),
        ]
        rows = [row for row in rows if row[0] != "counting" or fit.counting_bytes]
    rows.append(("free", size(fit.available_bytes), f"on {fit.device}; up to {USABLE_SHARE:.0%} is used"))
    if fit.fits:
        largest = "" if fit.largest_batch is None else f"; steps of up to {fit.largest_batch:,} rows fit"
        rows.append(("it fits", "", f"estimated in {fit.seconds:.1f} s{largest}"))
    return rows
