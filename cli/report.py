"""How a perplexity report looks on a terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from cli.output import console, facts_table, print_json
from lm.errors import DeviceError

if TYPE_CHECKING:
    from lm.evaluation.report import Report
    from lm.profiling.memory_estimate import Fit
    from lm.runs.run import Run

FEW_EPOCHS = 2.0
"""Readings of a text that are too few to have learned all that it has to teach."""
RISEN = 1.02
"""A last validation loss that is so many times the lowest one is no chance."""


def print_report(screen: Console, report: Report) -> None:
    """The figures, each with its denominator, and what they were measured under."""
    from lm.runs.card import figure, figures_of

    step = f", step {report.step:,}" if report.step is not None else ""
    where = f"({report.state}{step}) on {report.corpus}"
    if report.split != "text":
        where += f", split {report.split}"
    if report.kind is not None:
        where += f" – {report.kind}"
    screen.print(f"[bold]{escape(report.run)}[/bold] {escape(where)}", soft_wrap=True)
    known, without, alone, floor = figures_of([report.model_dump()]), [], [], []
    if "perplexity_without_unknown" in known:
        without = [
            (
                "  without unknown",
                figure(report.perplexity_without_unknown, ",.3f"),
                f"over {report.tokens - report.unknown_tokens:,} tokens that are in the vocabulary (KenLM's excluding "
                "OOVs; above: including)",
            )
        ]
    if "token_bits_per_byte" in known:
        alone = [
            (
                "  tokens alone",
                figure(report.token_bits_per_byte, ".4f"),
                "customary: what the tokens do not say (unknown words, white space) costs nothing",
            )
        ]
    if report.floor_loss is not None:
        floor = [
            (
                "  floor",
                figure(report.floor_bits_per_byte, ".4f"),
                f"{report.floor}: {report.floor_loss:.4f} nats per token",
            )
        ]
    screen.print(
        facts_table(
            [
                (
                    "loss",
                    f"{report.loss:.4f} ± {report.standard_error:.4f}",
                    f"nats per token, over {report.tokens:,} tokens",
                ),
                ("perplexity", figure(report.perplexity, ",.3f"), "of a token: compare only with the same tokenizer"),
                *without,
                (
                    "word perplexity",
                    figure(report.word_perplexity, ",.2f"),
                    f"over {report.words:,} words (white space)",
                ),
                (
                    "  with line ends",
                    figure(report.word_eos_perplexity, ",.2f"),
                    f"over {report.words + report.lines:,} words and line ends, as WikiText figures are given",
                ),
                (
                    "  as lm-eval counts",
                    figure(report.lm_eval_word_perplexity, ",.2f"),
                    f"over {report.lm_eval_words:,} parts of re.split(r'\\s+')",
                ),
                ("bits per character", figure(report.bits_per_char, ".4f"), f"over {report.characters:,} characters"),
                (
                    "bits per byte",
                    figure(report.bits_per_byte, ".4f"),
                    f"over {report.bytes:,} UTF-8 bytes: compare across tokenizers",
                ),
                *alone,
                *floor,
                (
                    "accuracy",
                    f"{report.accuracy:.2%}",
                    f"first choice right; {report.top5_accuracy:.2%} among the first five",
                ),
                ("unknown", f"{report.unknown_rate:.2%}", f"{report.unknown_tokens:,} tokens outside the vocabulary"),
                ("context", "", report.context),
                ("speed", f"{report.tokens_per_second:,.0f}", f"tokens/s on {report.device}, {report.precision}"),
                ("text", "", f"sha256 {report.text_sha256}"),
            ]
        )
    )
    for note in report.notes:
        screen.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)


def ways_to_beat_floor(run: Run) -> str:
    """What would help a run that counting beats, by what its metrics say of its training."""
    from lm.evaluation.floor import floor_order
    from lm.registry import MODELS

    if MODELS.resolve(run.config.model.type).trained_by == "counting":
        order = floor_order(run.record["vocab_size"])
        return f"count {order}-grams, as it does: --set model.order={order}"
    rows = [row for row in run.folder.read_metrics() if row.get("valid_loss") is not None]
    epochs = rows[-1]["epoch"] if rows else 0.0
    read = f"the text was read {epochs:.1f} times" if epochs >= 1 else f"{epochs:.1%} of the text was read"
    best = min(rows, key=lambda row: row["valid_loss"]) if rows else None
    ways = []
    if run.config.model.type != "hybrid" and run.config.tokenizer.type == "char":
        ways = ["take --preset hybrid-char, which begins with such counts"]
    if best is None or best["step"] == rows[-1]["step"]:
        falling = ", and the validation loss was still falling" if len(rows) > 1 else ""
        ways.insert(0, f"train longer ({read}{falling})")
    elif epochs < FEW_EPOCHS and rows[-1]["valid_loss"] > RISEN * best["valid_loss"]:
        ways.insert(0, f"set a lower training.learning_rate ({read}, and the validation loss rose)")
    elif epochs < FEW_EPOCHS:
        ways.insert(0, f"train longer ({read})")
    else:
        ways.insert(0, f"train on more text ({read}, and the validation loss was lowest after {best['epoch']:.1f})")
    return ", or ".join(ways)


def print_memory_estimate(fit: Fit, as_json: bool) -> None:
    """The estimate, and whether it fits.

    Raises:
        DeviceError: it does not, with what to lower.
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
        ("whatever the batch", size(fit.state_bytes), "weights, gradients, moments"),
    ]
    if fit.step_bytes is not None:
        tried = "measured" if fit.tried_rows == fit.batch_size else f"estimated from up to {fit.tried_rows} rows"
        rows += [
            ("a row", size(fit.row_bytes), f"of {fit.bptt:,} tokens, kept for backward"),
            ("a step", size(fit.step_bytes), f"at most, with {fit.batch_size:,} rows; {tried}"),
            ("validation", size(fit.evaluation_bytes), "at most"),
            ("saving", size(fit.saving_bytes), f"for copies beside it{'' if fit.device == 'cpu' else ', on the host'}"),
            ("together", size(fit.needed_bytes), f"on {fit.device}, at most"),
        ]
    rows.append(("free", size(fit.available_bytes), f"on {fit.device}, of which {USABLE_SHARE:.0%} is counted on"))
    if fit.fits:
        largest = (
            "" if fit.largest_batch is None else f"; up to {fit.largest_batch:,} rows would, as far as a step goes"
        )
        rows.append(("it fits", "", f"said in {fit.seconds:.1f} seconds{largest}"))
    return rows
