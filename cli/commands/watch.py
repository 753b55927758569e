"""lm watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.options import DEFAULT_RUNS, Json, RunName, RunsDir, named

if TYPE_CHECKING:
    from lm.training.callbacks import Callback

POSITION = 13


def command(run: RunName = None, runs_dir: RunsDir = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Follow a training run from another terminal, until it ends."""
    from cli.output import say
    from cli.progress import TrainingView
    from lm.errors import RunError
    from lm.jobs.follow import Follower
    from lm.runs.run_folder import find_run

    folder, _ = find_run(run, runs_dir)
    if folder.read_record().get("imported"):
        raise RunError(f"Run {folder.name!r} was imported, so there is no training to watch.")
    if folder.is_training and not folder.read_metrics():
        say(f"{folder.name} has not written any metrics yet.", dim=False)
    if Follower(folder, _json_lines() if as_json else TrainingView(runs_dir)).follow() is None:
        say(f"{folder.name} is not finished, and no process trains it.", dim=False)
        say(f"Continue with: lm train --resume {named(folder.name, runs_dir)}", dim=False)


def _json_lines() -> Callback:
    """Prints one line of JSON for each event."""
    import sys
    from dataclasses import asdict

    from cli.output import print_json
    from lm.training.callbacks import Callback

    class Lines(Callback):
        def on_start(self, start: Any) -> None:
            emit("start", asdict(start))

        def on_log(self, row: Any) -> None:
            emit("row", row)

        def on_end(self, end: Any) -> None:
            emit("end", asdict(end))

    def emit(event: str, facts: dict[str, Any]) -> None:
        print_json({"event": event, **facts})
        sys.stdout.flush()

    return Lines()
