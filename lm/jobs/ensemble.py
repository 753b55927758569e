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
from lm.jobs.ensemble_config import member_config, teacher_config
from lm.jobs.prepared_job import PreparedJob
from lm.jobs.report import report_run
from lm.jobs.resolve import ResumeRequest, TrainRequest
from lm.jobs.resume import reopen
from lm.models.base import build_model
from lm.models.ensemble import Ensemble
from lm.runs.record import run_record
from lm.runs.run import Run
from lm.runs.run_folder import CONFIG, EVENTS, MEMBERS, MODEL, TEACHER, RunFolder
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

    def precision(self, number: int) -> str | None:
        """The number formats of a member and of those before it, which are one if no resume changed it."""
        formats = (self.run(each).read_record().get("precision") for each in range(number + 1))
        return ", ".join(dict.fromkeys(each for each in formats if each)) or None

    def rows(self, number: int) -> list[Row]:
        """The lines of a member and of those before it, as lines of the ensemble."""
        before = self.rows(number - 1) if number else []
        done = _Done.of(before)
        own = self.run(number).read_metrics()
        return before + [self.row(number, done, row) for row in own]

    def row(self, number: int, done: _Done, row: Row) -> Row:
        """A line of a member as one of the ensemble, after what the members before it have `done`."""
        progress, steps = self.share(number, row["progress"]), self.plan_steps(number, done, row["plan_steps"])
        return {**done.add(row), "progress": round(progress, 6), "plan_steps": steps, "member": number + 1}

    def share(self, number: int, progress: float) -> float:
        """The progress of a member as that of all."""
        return (number + progress) / self.size

    def plan_steps(self, number: int, done: _Done, steps: int) -> int:
        """The steps of all members, where this one and each later one has `steps`."""
        return done.step + steps * (self.size - number)

    def done(self, number: int) -> _Done:
        """What the first `number` members have trained."""
        return _Done.of(self.rows(number - 1)) if number else _Done()


def _train_member(
    job: PreparedJob, members: _Members, number: int, request: TrainRequest | ResumeRequest, train_steps: TrainSteps
) -> End | None:
    """Train a member, if it is not trained; its end, or None."""
    folder, done = members.run(number), members.done(number)
    config = member_config(job.config, number)
    own = replace(job, config=config, path=folder.path, overwrite=True, resume=None)
    with contextlib.ExitStack() as locks:
        # Without a checkpoint it starts again.
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


class _Passing(Callback):
    """Passes the events of a part of the job on to the callbacks of the whole; the whole closes them."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def on_start(self, start: Start) -> None:
        """See `Callback.on_start`."""
        for callback in self._callbacks:
            callback.on_start(start)

    def on_step(self, tick: Tick) -> None:
        """See `Callback.on_step`."""
        for callback in self._callbacks:
            callback.on_step(tick)

    def on_log(self, row: Row) -> None:
        """See `Callback.on_log`."""
        for callback in self._callbacks:
            callback.on_log(row)

    def on_validation(self, done: int, total: int) -> None:
        """See `Callback.on_validation`."""
        for callback in self._callbacks:
            callback.on_validation(done, total)

    def on_save(self, step: int) -> None:
        """See `Callback.on_save`."""
        for callback in self._callbacks:
            callback.on_save(step)


class _MemberEvents(_Passing):
    """Passes the events of a member on as events of the ensemble, and writes the ensemble's metrics.jsonl."""

    def __init__(self, members: _Members, number: int, done: _Done, callbacks: Sequence[Callback]) -> None:
        super().__init__(callbacks)
        self._members, self._number, self._done = members, number, done
        self._plan_steps = 0

    def on_start(self, start: Start) -> None:
        """See `Callback.on_start`; also brings metrics.jsonl and the plan up to date."""
        run, size, done = self._members.folder, self._members.size, self._done
        # The member's own lines were cut if it was resumed.
        run.write_metrics(self._members.rows(self._number))
        self._plan_steps = self._members.plan_steps(self._number, done, start.plan_steps)
        plan, seconds = self._members.run(self._number).read_record()["plan"], start.plan_seconds
        seconds = None if seconds is None else seconds * size
        plan = {**plan, "steps": self._plan_steps, "seconds": seconds}
        precision = self._members.precision(self._number)
        run.write_record({**run.read_record(), "plan": plan, "precision": precision})
        shifted = replace(
            start, run=run.name, step=done.step + start.step, seconds=done.seconds + start.seconds,
            plan_steps=self._plan_steps, plan_seconds=seconds, validations=start.validations * size,
            member=(self._number + 1, size),
        )  # fmt: skip
        super().on_start(shifted)

    def on_step(self, tick: Tick) -> None:
        """See `Callback.on_step`."""
        self._plan_steps = self._members.plan_steps(self._number, self._done, tick.plan_steps)
        shifted = replace(
            tick, step=tick.step + self._done.step, seconds=tick.seconds + self._done.seconds,
            progress=self._members.share(self._number, tick.progress), plan_steps=self._plan_steps,
        )  # fmt: skip
        super().on_step(shifted)

    def on_log(self, row: Row) -> None:
        """See `Callback.on_log`."""
        row = self._members.row(self._number, self._done, row)
        self._members.folder.append_metrics(row)
        super().on_log(row)

    def on_save(self, step: int) -> None:
        """See `Callback.on_save`."""
        super().on_save(step + self._done.step)

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
    record |= {"counts": first["counts"], "plan": {**record["plan"], "steps": steps}}
    folder.write_record(record)
    folder.write_best(model.arrays(), step=steps, valid_loss=None)
    folder.write_film(runs[0].read_film())


def _finish(members: _Members, run: Run, callbacks: Sequence[Callback]) -> None:
    """Write the last line of metrics.jsonl, and remove the folders of the members."""
    folder = members.folder
    rows = folder.read_metrics()
    done = _Done.of(rows)
    report = run.reports()["valid"]
    loss = report["loss"]
    if not rows or rows[-1]["member"] is not None:
        row: Row = {
            **asdict(done), "member": None, "train_loss": None, "valid_loss": loss, "best_step": done.step,
            "valid_bits_per_byte": report["bits_per_byte"], "tokens_per_second": done.tokens / max(done.seconds, 1e-9),
        }  # fmt: skip
        folder.append_metrics(row)
        for callback in callbacks:
            callback.on_log(row)
    end = End("finished", done.step, done.step, done.seconds, loss, done.step)
    for callback in callbacks:
        callback.on_end(end)
    shutil.rmtree(folder.path / MEMBERS, ignore_errors=True)


# -- an ensemble as the teacher of one more model ----------------------------------------------------------


class _TeacherEvents(_Passing):
    """Passes the events of a teacher on as those of its student's run, without a finished end."""

    def __init__(self, run: str, callbacks: Sequence[Callback]) -> None:
        super().__init__(callbacks)
        self._run = run
        self.stopped = False

    def on_start(self, start: Start) -> None:
        """See `Callback.on_start`."""
        super().on_start(replace(start, run=self._run))

    def on_end(self, end: End) -> None:
        """See `Callback.on_end`."""
        if end.reason in STOPPED:
            self.stopped = True
            for callback in self._callbacks:
                callback.on_end(end)


def train_teacher(
    job: PreparedJob, folder: RunFolder, request: TrainRequest | ResumeRequest, train_steps: TrainSteps
) -> PreparedJob | None:
    """Train the rest of the ensemble that `training.student` has as its teacher.

    Args:
        job: of the student, which has made no step.
        folder: of the student's run; the teacher's is inside it.
        request: with the callbacks.
        train_steps: trains one model.

    Returns:
        The job of the student, with its teacher; None: it was interrupted.
    """
    teacher = RunFolder(folder.path / TEACHER)
    events = _TeacherEvents(folder.name, request.callbacks)
    own: PreparedJob = replace(job, config=teacher_config(job.config), path=teacher.path, overwrite=True)
    try:
        if job.overwrite or not (folder.path / CONFIG).is_file():
            model = build_model(job.config.model, job.tokens.tokenizer.vocab_size)
            record = {**run_record(job.config, job.tokens, model, job.init), "plan": Plan(1, 1).to_json()}
            folder.create(record, job.tokens.tokenizer, overwrite=job.overwrite)
        with contextlib.ExitStack() as locks:
            if (teacher.path / CONFIG).is_file():
                again = ResumeRequest(run=str(teacher.path), data_dir=request.data_dir, is_restart=True)
                own = reopen(again, distributed.current(), locks)
            if own.corpus is not None:
                train_members(own, teacher, replace(request, callbacks=[events]), train_steps)
    except BaseException:
        events.stopped = True
        raise
    finally:
        if events.stopped:
            with contextlib.ExitStack() as closing:
                for callback in reversed(request.callbacks):
                    closing.callback(callback.close)
    return None if events.stopped else replace(job, teacher=Run(teacher, device="cpu"))


def drop_teacher(folder: RunFolder) -> None:
    """Remove the teacher in the folder of a run that is complete; one that is out of time can still be resumed."""
    if not folder.has_last() or folder.read_state()["train_state"]["stop_reason"] in ("finished", "no_progress"):
        shutil.rmtree(folder.path / TEACHER, ignore_errors=True)
