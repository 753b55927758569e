"""Step 5 of a training job: measure the best weights and save report, card and a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.corpora.answers import ANSWER
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.jobs.fine_tuning import report_fine_tuning
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder
from lm.tokenizers.turns import BLANK_LINE
from lm.training.callbacks import Callback

SAMPLE = SamplingOptions(max_tokens=300)


def report_run(folder: RunFolder, device: str, callbacks: Sequence[Callback], *, base: Run | None = None) -> Run:
    """Measure the best weights on the whole validation split, and save the report, the card and a sample.

    Args:
        folder: of the run.
        device: of the measurement.
        callbacks: receive its progress.
        base: the run that this one started from, if it is open; a report of fine-tuning compares the two.
    """

    def progress(done: int, total: int) -> None:
        for callback in callbacks:
            callback.on_report(done, total)

    run = Run(folder, device=device)
    report = run.evaluate("valid", progress=progress)
    if run.record.get("init"):
        tuning = report_fine_tuning(run, report, base=base, device=device, progress=progress)
        report = report.model_copy(update={"fine_tuning": tuning})
    run.save_report(report)
    valid = run.own_text(split="valid").splits["valid"]
    if valid.marks is None:
        run.save_sample("", [run.sample(**SAMPLE.model_dump())], SAMPLE)
    else:
        # The first question of the held-out conversations.
        asked = valid.ids[: int(np.argmax(valid.marks == ANSWER))].tolist()
        # A chat template has end tokens.
        options = SAMPLE.model_copy(update={"stop": () if run.tokenizer.chat_template else (BLANK_LINE,)})
        answer = "".join(event.text for event in run.events(Request(tuple(asked), options)))
        run.save_sample(run.tokenizer.decode(asked).lstrip(), [answer], options)
    return run
