"""How a perplexity report looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from cli.output import facts_table

if TYPE_CHECKING:
    from lm.evaluation.report import Report


def print_report(screen: Console, report: Report) -> None:
    """The figures, each with its denominator, and what they were measured under."""
    from lm.card import figure

    step = f", step {report.step:,}" if report.step is not None else ""
    where = f"({report.state}{step}) on {report.corpus}"
    if report.split != "text":
        where += f", split {report.split}"
    if report.kind is not None:
        where += f" – {report.kind}"
    screen.print(f"[bold]{escape(report.run)}[/bold] {escape(where)}", soft_wrap=True)
    floor = []
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
                ("bits per character", f"{report.bits_per_char:.4f}", f"over {report.characters:,} characters"),
                (
                    "bits per byte",
                    f"{report.bits_per_byte:.4f}",
                    f"over {report.bytes:,} UTF-8 bytes: compare across tokenizers",
                ),
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
