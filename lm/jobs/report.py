"""Step 5 of a training job: measure the best weights and save report, card and a sample."""

from __future__ import annotations

from collections.abc import Sequence

from lm.generation.options import SamplingOptions
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import Callback

SAMPLE = SamplingOptions(max_tokens=300)


def report_run(folder: RunFolder, device: str, callbacks: Sequence[Callback]) -> Run:
    """Measure the best weights on the whole validation split, and save the report, the card and a sample."""

    def progress(done: int, total: int) -> None:
        for callback in callbacks:
            callback.on_report(done, total)

    run = Run(folder, device=device)
    run.save_report(run.evaluate("valid", progress=progress))
    run.save_sample("", [run.sample(**SAMPLE.model_dump())], SAMPLE)
    return run
