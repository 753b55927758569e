"""Training by counting: one pass over the text, without steps."""

from __future__ import annotations

import time

import numpy as np

from lm.errors import ConfigError
from lm.jobs.prepared_job import PreparedJob
from lm.jobs.report import report_run
from lm.jobs.resolve import ResumeRequest, TrainRequest
from lm.models.base import build_model
from lm.runs.record import run_record
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import End, Start
from lm.training.plan import Plan


def train_by_counting(job: PreparedJob, folder: RunFolder, request: TrainRequest | ResumeRequest) -> Run:
    """Count the training text and save the run with its report.

    Raises:
        ConfigError: the job starts from another run's weights.
    """
    config, corpus, init, callbacks = job.config, job.tokens, job.init, request.callbacks
    if init is not None:
        raise ConfigError(f"--init {init.name}: {config.model.type} models are trained by counting and start empty.")
    started_at = time.perf_counter()
    model = build_model(config.model, corpus.tokenizer.vocab_size, seed=config.training.seed)
    model.fit(np.asarray(corpus.splits["train"].ids))
    seconds = time.perf_counter() - started_at
    record = {**run_record(config, corpus, model, None), "plan": Plan(1, 1).to_json()}
    folder.create(record, corpus.tokenizer, overwrite=job.overwrite)
    tokens = model.counted_tokens
    start = Start(
        run=folder.name, model=config.model.type, parameters=model.num_parameters(), counts=model.num_counts(),
        corpus=corpus.name, step=0, plan_steps=1, tokens_per_step=tokens, steps_per_epoch=1, device="cpu",
        precision="fp32",
    )  # fmt: skip
    try:
        for callback in callbacks:
            callback.on_start(start)
        folder.write_best(model.arrays(), step=1, valid_loss=None)
        run = report_run(folder, "cpu", callbacks)
        report = run.reports()["valid"]
        loss = report["loss"]
        row = {
            "step": 1, "epoch": 1.0, "train_loss": None, "valid_loss": loss, "best_step": 1,
            "valid_bits_per_byte": report["bits_per_byte"],
            "tokens_per_second": tokens / max(seconds, 1e-9), "seconds": round(seconds, 3),
        }  # fmt: skip
        folder.append_metrics(row)
        for callback in callbacks:
            callback.on_log(row)
            callback.on_end(End("finished", 1, 1, seconds, loss, 1))
    finally:
        for callback in callbacks:
            callback.close()
    return run
