"""lm watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.options import DEFAULT_RUNS, Json, RunName, RunsDir, named

if TYPE_CHECKING:
    from lm.training.callbacks import Callback

POSITION = 10


def command(run: RunName = None, runs_dir: RunsDir = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Follow a run that is being trained, from another terminal; ends when the training ends."""
    from cli.output import console
    from cli.progress import TrainingView
    from lm.jobs.follow import Follower
    from lm.runs.run_folder import find_run

    folder, _ = find_run(run, runs_dir)
    told = console(stderr=True)
    if folder.is_training and not folder.read_metrics():
        told.print(f"{folder.name} has not written a line yet.", markup=False)
    if Follower(folder, _json_lines() if as_json else TrainingView(runs_dir)).follow() is None:
        told.print(
            f"Nobody trains {folder.name}, and it is not at its end. "
            f"Go on with: lm train --resume {named(folder.name, runs_dir)}",
            markup=False,
            soft_wrap=True,
        )


def _json_lines() -> Callback:
    """One line of JSON an event, as it happens."""
    import sys
    from dataclasses import asdict

    from cli.output import print_json
    from lm.training.callbacks import Callback

    class Lines(Callback):
        def on_start(self, start: Any) -> None:
            tell("start", asdict(start))

        def on_log(self, row: Any) -> None:
            tell("row", row)

        def on_end(self, end: Any) -> None:
            tell("end", asdict(end))

    def tell(event: str, facts: dict[str, Any]) -> None:
        print_json({"event": event, **facts})
        # Whoever reads a pipe wants it now.
        sys.stdout.flush()

    return Lines()
