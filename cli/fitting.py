"""How an estimate of memory looks on a terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from cli.output import console, facts_table, print_json
from lm.errors import DeviceError

if TYPE_CHECKING:
    from lm.profiling.memory_estimate import Fit


def show(fit: Fit, as_json: bool) -> None:
    """The estimate, and whether it fits.

    Raises:
        DeviceError: it does not, with what to lower.
    """
    if as_json:
        print_json({**asdict(fit), "fits": fit.fits, "largest_batch": fit.largest_batch})
    else:
        console().print(facts_table(_facts(fit)))
    if not fit.fits:
        raise DeviceError(fit.advice())


def _facts(fit: Fit) -> list[tuple[str, str, str]]:
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
