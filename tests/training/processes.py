"""What test_distributed.py trains in one process and, started by torchrun, in two: the same cases, in the same code.

torchrun --nproc-per-node 2 processes.py TEXT FOLDER CASE…

leaves a run FOLDER/CASE-2 for each CASE. CASE@half makes the first steps alone, CASE@halves all in two parts, and
CASE@end goes on with the run that is there; CASE@clock has a plan by time. Their runs are FOLDER/CASE-half and so on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lm.config import CorpusConfig, compose
from lm.corpora import open_corpus, prepare
from lm.models.base import build_model, whole
from lm.models.context_tables import ContextTable
from lm.runs.record import run_record
from lm.runs.run_folder import RunFolder
from lm.training import distributed
from lm.training.plan import Plan
from lm.training.trainer import Trainer

SMALL: dict[str, Any] = {
    "model.dropout": 0,
    "model.hidden_size": 16,
    "model.table_orders": [],
    "model.table_dropout": 0,
    "training.batch_size": 6,
    "training.bptt": 16,
    "training.warmup_steps": 0,
    "training.log_every": 1,
    "training.grad_clip": 0.5,
    "training.timeout_seconds": 60,
}
TRANSFORMER = {
    "model.type": "transformer",
    "model.context_length": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "gru": {},
    "gru-tables": {"model.table_orders": [2, 3], "model.table_buckets": 300, "training.gradient_accumulation": 3},
    "gru-tables-dense": {"model.table_orders": [2, 3], "training.gradient_accumulation": 2},
    # An epoch's last batch has three rows, then one: a process has fewer than the other, or none.
    "gru-shuffled": {"training.batching": "shuffled", "training.bptt": 90, "training.batch_size": 4},
    "lstm-adaptive": {
        "model.type": "lstm",
        "model.adaptive_cutoffs": [5, 12],
        "model.tie_weights": True,
        "model.activation_penalty": 1.0,
        "model.change_penalty": 1.0,
        "training.average_share": 0.5,
    },
    "hybrid": {"model.type": "hybrid", "model.order": 3},
    "gru-masters": {"training.precision": "bf16", "training.amp": "O2", "training.gradient_accumulation": 3},
    "transformer": TRANSFORMER,
    "transformer-muon": {**TRANSFORMER, "training.optimizer": "muon", "training.gradient_accumulation": 2},
    "transformer-shard": {**TRANSFORMER, "training.shard": True, "training.gradient_accumulation": 2},
    "lstm-shard": {
        "model.type": "lstm",
        "model.num_layers": 2,
        "training.shard": True,
        "training.average_share": 0.5,
    },
    "gru-dropout": {"model.dropout": 0.3, "training.gradient_accumulation": 2},
}
PLAN = Plan(8, 4)
BY_TIME = Plan(8, 4, seconds=1.5, measured_step_seconds=0.2, validations=4)
STOP = 3


def open_trainer(
    text: Path, path: Path, case: str, *, resumes: bool = False, more: dict[str, Any] | None = None
) -> Trainer:
    """The trainer of a case, in as many processes as have joined."""
    config = compose(
        str(text), preset="gru-char", overrides={"training.precision": "fp32", **SMALL, **CASES[case], **(more or {})}
    )
    prepared = prepare(open_corpus(CorpusConfig(source=str(text))), config.tokenizer)
    model = build_model(config.model, prepared.tokenizer.vocab_size, seed=config.training.seed)
    if model.trained_by == "both":
        model.fit(prepared.splits["train"].ids)
    if case == "gru-tables-dense":
        # Gradients as on a GPU.
        for module in model.modules():
            if isinstance(module, ContextTable):
                module.sparse = False
    world = distributed.current()
    folder: RunFolder = distributed.folder_of(world, path)
    if not resumes:
        folder.create(run_record(config, prepared, model, None), prepared.tokenizer)
    trainer = Trainer(folder, config.training, model, prepared)
    if resumes:
        trainer.load()
    return trainer


def train(
    text: Path, path: Path, case: str, *, plan: Plan = PLAN, stop_after: int | None = None, resumes: bool = False
) -> None:
    """All of a case's steps, or those up to one, or those after it."""
    trainer = open_trainer(text, path, case, resumes=resumes)
    trainer.train(plan, stop_after=stop_after)
    sums = [float(whole(weight.detach()).double().sum()) for weight in trainer.step.mixed.trained]
    assert all(other == sums for other in trainer.world.all_gather(sums)), "processes ended with different weights"


def main() -> None:
    """Train the cases in the processes that torchrun started; CASE@stop and CASE@resume train a part."""
    text, folder, *cases = sys.argv[1:]
    with distributed.joined() as world:
        for named in cases:
            case, _, part = named.partition("@")
            path = Path(folder) / (f"{case}-{part}" if part else f"{case}-{world.size}")
            if part == "clock":
                train(Path(text), path, case, plan=BY_TIME)
            elif part != "end":
                train(Path(text), path, case, stop_after=STOP if part else None)
                world.barrier()
            if part in ("end", "halves"):
                train(Path(text), path, case, resumes=True)
                world.barrier()


if __name__ == "__main__":
    main()
