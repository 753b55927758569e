"""Training an ensemble: its members one after another, then their mean as one run.

    NAME/                      the run: metrics of all members, at last its weights, report and card
    NAME/members/1/, 2/, …     an ordinary run for each member; removed when the ensemble is complete

A kill leaves the members as they are. `lm train --resume NAME` continues the one that was interrupted, then the others.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace

from lm.errors import ConfigError
from lm.jobs.ensemble_config import member_config
from lm.jobs.prepare import PreparedJob
from lm.jobs.report import report_run
from lm.jobs.resolve import ResumeRequest, TrainRequest, training_method
from lm.jobs.resume import reopen
from lm.models.base import build_model
from lm.models.ensemble import Ensemble
from lm.runs.record import run_record
from lm.runs.run import Run
from lm.runs.run_folder import EVENTS, MEMBERS, MODEL, RunFolder
from lm.training import distributed
from lm.training.callbacks import Callback, End, Row, Start, Tick
from lm.training.plan import Plan
from lm.training.tensorboard import TensorBoard

TrainSteps = Callable[[PreparedJob, RunFolder, Sequence[Callback], int | None], End]
"""Trains the steps of one run: job, folder, callbacks, step to stop after."""
STOPPED = "interrupted", "stop_after"
"""Reasons of an end that leave the ensemble incomplete."""


def train_members(
    job: PreparedJob, folder: RunFolder, request: TrainRequest | ResumeRequest, train_steps: TrainSteps
) -> Run:
    """Train the members that are not trained, and join them.

    Args:
        job: of the ensemble.
        folder: of the run.
        request: with callbacks and `stop_after`, which counts the steps of all members.
        train_steps: trains one member.

    Returns:
        The run, with its report; without weights and report if it was interrupted.
    """
    model = build_model(job.config.model, job.tokens.tokenizer.vocab_size)
    assert isinstance(model, Ensemble)
    if job.resume is None:
        record = {**run_record(job.config, job.tokens, model, job.init), "plan": Plan(1, 1).to_json()}
        folder.create(record, job.tokens.tokenizer, overwrite=job.overwrite)
    callbacks, members = request.callbacks, _Members(folder, model.options.size)
    try:
        if not (folder.path / MODEL).exists():
            for number in range(members.size):
                end = _train_member(job, members, number, request, train_steps)
                if end is not None and end.reason in STOPPED:
                    for callback in callbacks:
                        callback.on_end(end)
                    return Run(folder)
            _join(members, model)
        device = str(distributed.current().pick_device(job.config.training.device))
        run = report_run(folder, device, [_ReportAsValidation(each) for each in callbacks])
        _finish(members, run, callbacks)
    finally:
        # Each of them, even if one fails: a terminal must be restored.
        with contextlib.ExitStack() as closing:
            for callback in reversed(callbacks):
                closing.callback(callback.close)
    return run


@dataclass(frozen=True)
class _Done:
    """What the members before one have trained."""

    step: int = 0
    tokens: int = 0
    epoch: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, rows: list[Row]) -> _Done:
        """What the lines of an ensemble's metrics.jsonl say."""
        return cls(**{field.name: rows[-1][field.name] for field in fields(cls)}) if rows else cls()

    def add(self, row: Row) -> Row:
        """A line of a member's metrics.jsonl as one of the ensemble's."""
        sums = {name: row[name] + value for name, value in asdict(self).items()}
        best = row.get("best_step")
        return {**row, **sums, **({} if best is None else {"best_step": best + self.step})}


@dataclass(frozen=True)
class _Members:
    """The run folders of the members."""

    folder: RunFolder
    size: int

    def run(self, number: int) -> RunFolder:
        """The run folder of a member, from 0."""
        return RunFolder(self.folder.path / MEMBERS / str(number + 1))

    def rows(self, number: int) -> list[Row]:
        """The lines of a member and of those before it, as lines of the ensemble."""
        before = self.rows(number - 1) if number else []
        done = _Done.of(before)
        own = self.run(number).read_metrics()
        return before + [{**done.add(row), "member": number + 1} for row in own]

    def done(self, number: int) -> _Done:
        """What the first `number` members have trained."""
        return _Done.of(self.rows(number - 1)) if number else _Done()


def _train_member(
    job: PreparedJob, members: _Members, number: int, request: TrainRequest | ResumeRequest, train_steps: TrainSteps
) -> End | None:
    """Train a member, if it is not trained; its end, or None."""
    folder, done = members.run(number), members.done(number)
    config = member_config(job.config, number)
    own = replace(job, config=config, method=training_method(config), path=folder.path, overwrite=True, resume=None)
    with contextlib.ExitStack() as locks:
        # Without a saved state it starts again.
        if folder.has_last():
            changes = request.changes if isinstance(request, ResumeRequest) else {}
            again = ResumeRequest(run=str(folder.path), changes=changes, data_dir=request.data_dir, is_restart=True)
            own = reopen(again, distributed.current(), locks)
        if own.corpus is None:
            return None
        stop_after = None
        if request.stop_after is not None:
            own_step = folder.read_state()["train_state"]["step"] if folder.has_last() else 0
            stop_after = request.stop_after - done.step
            if stop_after <= own_step:
                raise ConfigError(
                    f"--stop-after {request.stop_after}: run {members.folder.name!r} is at step "
                    f"{done.step + own_step} already."
                )
        board = TensorBoard(members.folder.path / EVENTS / f"member-{number + 1}")
        view = _MemberEvents(members, number, done, request.callbacks)
        end = view.end_of_all(train_steps(own, folder, [board, view], stop_after))
    if request.stop_after is not None and end.step >= request.stop_after and number + 1 < members.size:
        end = replace(end, reason="stop_after")
    return end


class _MemberEvents(Callback):
    """Passes the events of a member on as events of the ensemble, and writes the ensemble's metrics.jsonl."""

    def __init__(self, members: _Members, number: int, done: _Done, callbacks: Sequence[Callback]) -> None:
        self._members, self._number, self._done, self._callbacks = members, number, done, callbacks
        self._plan_steps = 0

    def on_start(self, start: Start) -> None:
        """See `Callback.on_start`; also brings metrics.jsonl and the plan up to date."""
        run, size, done = self._members.folder, self._members.size, self._done
        # The member's own lines were cut if it was resumed.
        run.write_metrics(self._members.rows(self._number))
        self._plan_steps = done.step + start.plan_steps * (size - self._number)
        plan = self._members.run(self._number).read_record()["plan"]
        run.write_record({**run.read_record(), "plan": {**plan, "steps": self._plan_steps, "seconds": None}})
        shifted = replace(
            start, run=run.name, step=done.step + start.step, seconds=done.seconds + start.seconds,
            plan_steps=self._plan_steps, plan_seconds=None, validations=start.validations * size,
            member=(self._number + 1, size),
        )  # fmt: skip
        for callback in self._callbacks:
            callback.on_start(shifted)

    def on_step(self, tick: Tick) -> None:
        """See `Callback.on_step`."""
        shifted = replace(tick, step=tick.step + self._done.step, seconds=tick.seconds + self._done.seconds)
        for callback in self._callbacks:
            callback.on_step(shifted)

    def on_log(self, row: Row) -> None:
        """See `Callback.on_log`."""
        row = {**self._done.add(row), "member": self._number + 1}
        self._members.folder.append_metrics(row)
        for callback in self._callbacks:
            callback.on_log(row)

    def on_validation(self, done: int, total: int) -> None:
        """See `Callback.on_validation`."""
        for callback in self._callbacks:
            callback.on_validation(done, total)

    def on_save(self, step: int) -> None:
        """See `Callback.on_save`."""
        for callback in self._callbacks:
            callback.on_save(step + self._done.step)

    def end_of_all(self, end: End) -> End:
        """A member's end as that of the ensemble."""
        best = None if end.best_step is None else end.best_step + self._done.step
        return replace(
            end, step=end.step + self._done.step, plan_steps=self._plan_steps, best_step=best,
            seconds=end.seconds + self._done.seconds,
        )  # fmt: skip


class _ReportAsValidation(Callback):
    """Passes the progress of the report on as that of a validation, while the bar of the training is shown."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def on_report(self, done: int, total: int) -> None:
        """See `Callback.on_report`."""
        self._callback.on_validation(done, total)


def _join(members: _Members, model: Ensemble) -> None:
    """Write the weights of all members as those of the run."""
    folder, steps = members.folder, members.done(members.size).step
    runs = [members.run(number) for number in range(members.size)]
    model.load_members([run.read_weights("best")[0] for run in runs])
    record, first = folder.read_record(), runs[0].read_record()
    # The notes of counts; and the steps that the members really made.
    record["corpus"]["notes"] = first["corpus"]["notes"]
    record |= {"counts": model.num_counts(), "plan": {**record["plan"], "steps": steps}}
    folder.write_record(record)
    folder.write_best(model.arrays(), step=steps, valid_loss=None)


def _finish(members: _Members, run: Run, callbacks: Sequence[Callback]) -> None:
    """Write the last line of metrics.jsonl, and remove the folders of the members."""
    folder = members.folder
    rows = folder.read_metrics()
    done = _Done.of(rows)
    loss = run.reports()["valid"]["loss"]
    if not rows or rows[-1]["member"] is not None:
        row: Row = {
            **asdict(done), "member": None, "train_loss": None, "valid_loss": loss, "best_step": done.step,
            "tokens_per_second": done.tokens / max(done.seconds, 1e-9),
        }  # fmt: skip
        folder.append_metrics(row)
        for callback in callbacks:
            callback.on_log(row)
    end = End("finished", done.step, done.step, done.seconds, loss, done.step)
    for callback in callbacks:
        callback.on_end(end)
    shutil.rmtree(folder.path / MEMBERS, ignore_errors=True)
