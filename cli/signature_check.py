"""`lm eval --check SIGNATURE`: measure as a signature says, and compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm.errors import ConfigError
from lm.evaluation.signature import Signature, check

if TYPE_CHECKING:
    from lm.runs.run import Run

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")


def settings_of(
    expected: Signature, run: Run, *, split: str | None, text: str | None, stride: int | None, precision: Any
) -> tuple[str | None, int | None, Any]:
    """Split, stride and precision to measure with: those of the flags, else those of the signature.

    Args:
        expected: the signature.
        run: the run to measure.
        split: None: the run's split with the signature's text, if there is one.
        text: another text, which has no split.
        stride: of a sliding window; None: that of the signature.
        precision: fp32, the default, gives way to that of the signature.

    Raises:
        ConfigError: its precision is unknown.
    """
    if expected.precision not in PRECISIONS:
        raise ConfigError(f"Signature: prec:{expected.precision} is none of {', '.join(PRECISIONS)}.")
    if split is None and text is None:
        splits = run.record["corpus"]["splits"]
        split = next((name for name, part in splits.items() if expected.is_of_text(part["sha256"])), None)
    if stride is None and run.model.context_length is not None:
        stride = expected.stride
    return split, stride, expected.precision if precision == "fp32" else precision


def checked(expected: Signature, measured: Signature, *, quiet: bool) -> dict[str, Any]:
    """Compare a figure with a signature and print the result; its facts for JSON."""
    found = check(expected, measured)
    if not quiet:
        from cli.output import console, print_sentence

        screen = console()
        style = "bold green" if found.reproduces else "bold red"
        print_sentence(screen, found.sentence, style)
        for note in found.notes:
            print_sentence(screen, f"note: {note}", "dim")
    return {
        "reproduces": found.reproduces,
        "sentence": found.sentence,
        "differences": list(found.differences),
        "notes": list(found.notes),
        "expected": str(found.expected),
        "measured": str(found.measured),
    }
