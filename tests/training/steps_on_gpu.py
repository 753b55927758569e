"""Runs on the CPU and on the pretended GPU: prints as JSON what each step waited for, and the lines of metrics.

python -m tests.training.steps_on_gpu FOLDER LOG-EVERY MODEL OPTIONS-AS-JSON [MODEL OPTIONS …]
"""

# ruff: noqa: T201

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.pretended_gpu import gpu  # before torch
from tests.training.conftest import MODELS, SMALL, make_text

STEPS = 12


def main() -> None:
    """Print a line for each case."""
    folder, log_every, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    (folder / "words.txt").write_text(make_text(), "utf-8")
    for number, (model, options) in enumerate(zip(cases[::2], cases[1::2], strict=True)):
        print(json.dumps(compare(model, {**json.loads(options), "training.log_every": log_every}, folder, str(number))))


def compare(model: str, options: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """The same training on both devices."""
    import numpy as np

    from lm.config import CorpusConfig, compose
    from lm.corpora import open_corpus, prepare
    from lm.models.base import build_model
    from lm.runs.record import run_record
    from lm.runs.run_folder import RunFolder
    from lm.training.callbacks import Callback, Tick
    from lm.training.plan import Plan
    from lm.training.trainer import Trainer

    text = folder / "words.txt"

    class Waits(Callback):
        """The waits of each step, by its number."""

        def __init__(self, watch: gpu.Watch) -> None:
            self.watch, self.found = watch, dict[int, dict[str, int]]()

        def on_step(self, tick: Tick) -> None:
            self.found[tick.step] = self.watch.report()["wait_places"]

    def train(device: str, waits: list[Callback]) -> list[dict[str, Any]]:
        over = {**SMALL, **MODELS[model], **options, "training.device": device}
        config = compose(str(text), preset="gru-char", overrides=over)
        corpus = prepare(open_corpus(CorpusConfig(source=str(text))), config.tokenizer)
        built = build_model(config.model, corpus.tokenizer.vocab_size, seed=1)
        if built.trained_by == "both":
            built.fit(np.asarray(corpus.splits["train"].ids))
        run = RunFolder(folder / f"{device}-{name}")
        run.create(run_record(config, corpus, built, None), corpus.tokenizer)
        trainer = Trainer(run, config.training, built, corpus, callbacks=waits)
        trainer.train(Plan(STEPS, STEPS), stop_after=STEPS)
        return run.read_metrics()

    on_cpu = train("cpu", [])
    with gpu.pretended() as watch:
        waits = Waits(watch)

        class Reset(Callback):
            def on_step(self, tick: Tick) -> None:
                watch.reset()

            def on_log(self, row: Any) -> None:
                watch.reset()

        on_gpu = train("cuda", [waits, Reset()])
    return {"cpu": on_cpu, "gpu": on_gpu, "waits": waits.found}


if __name__ == "__main__":
    main()
