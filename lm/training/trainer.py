"""The trainer of a run: it repeats `TrainStep`, and logs, validates and saves.

    plan ─► step ─► log ─► validate ─► save best ─► save last ─► …

Everything that a later step depends on is in the `last` checkpoint: N steps give the same weights as N/2 steps, a
resume and N/2 steps, bit for bit on one machine's CPU.

On a GPU the result of a step is read after the next step was started, so that the device never waits for the host. Loss
and skipped steps are known one step later. All results are read before a line of metrics, a validation and a save.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from lm.config import TrainingConfig
from lm.corpora import PreparedCorpus
from lm.corpora.answers import beginning
from lm.device import deterministic
from lm.errors import DivergedError
from lm.files import Arrays
from lm.models.base import LanguageModel
from lm.runs.run_folder import MODEL, RunFolder
from lm.torch_private import keep_freed_memory
from lm.training import last_checkpoint
from lm.training.async_writer import Writer
from lm.training.callbacks import Callback, End, Row, Start, StopReason, Tick
from lm.training.compiling import MEASURED_STEPS, obstacle, pays
from lm.training.distillation import Teacher
from lm.training.last_checkpoint import TrainProgress
from lm.training.metrics import MetricsInterval
from lm.training.plan import HARM, Plan
from lm.training.preview import affordable_tokens, preview_step
from lm.training.schedule import TimedSchedule, make_schedule
from lm.training.train_step import StepBatches, StepResult, TrainStep
from lm.training.validation import validate

log = logging.getLogger(__name__)

UNTRAINED_MARGIN = 1.0
"""Nats per token. A training loss this far above that of equal probabilities means that training diverged."""
WITH_MOMENTS = 2.0
"""Time of a save with the two moments of each weight, in saves without them."""
SAVE_SECONDS = 120.0
"""Longest training time between two saves."""


class Trainer:
    """Trains one model in one run folder.

    Args:
        folder: of the run.
        config: the training options.
        model: with initial weights.
        corpus: its tokens.
        callbacks: receive the events of the training.
        clock: seconds since some moment; plans by time follow it.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainingConfig,
        model: LanguageModel,
        corpus: PreparedCorpus,
        *,
        callbacks: Sequence[Callback] = (),
        teacher: Teacher | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder, self.config, self.corpus = folder, config, corpus
        self.callbacks = list(callbacks)
        self._clock = clock
        self.step = TrainStep(model, config, teacher)
        self.model, self.device, self.world = self.step.model, self.step.device, self.step.world
        self.batches = StepBatches(corpus.splits["train"], self.step)
        self.steps_per_epoch, self.tokens_per_step = self.batches.steps_per_epoch, self.batches.tokens_per_step
        self.progress = TrainProgress()
        self._interval = MetricsInterval()
        # Steps whose result is not read, by number: at most one, on a GPU.
        self._started: deque[tuple[int, Callable[[], StepResult]]] = deque()
        self._loss: float | None = None
        # The signal that this process received, and the one that all processes agreed on after a step.
        self._received: int | None = None
        self._signal: int | None = None

    def load(self) -> None:
        """Continue from the `last` checkpoint of the folder.

        Raises:
            CorruptRunError: it does not fit the model.
        """
        self.progress = last_checkpoint.load(self.folder, self.step)

    def reset_patience(self) -> None:
        """Forget validations without a better loss, for a run that gets more steps."""
        self.progress.stalls = self.progress.harmful = 0

    def train(self, plan: Plan, *, stop_after: int | None = None) -> End:
        """Train from the current step to the end of the plan, or to step `stop_after`.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite and the options say stop; `last/` is intact.
            DivergedError: the training loss is far above that of an untrained model.
            RunError: the disk is full or read-only; earlier checkpoints are intact.
        """
        try:
            with self._signals(), deterministic(self.device), keep_freed_memory(), Writer() as self._writer:
                return self._train(plan, stop_after)
        finally:
            # Each of them, even if one fails: a terminal must be restored whatever the disk does.
            with contextlib.ExitStack() as closing:
                for callback in reversed(self.callbacks):
                    closing.callback(callback.close)

    def _train(self, plan: Plan, stop_after: int | None) -> End:
        self.plan, progress = plan, self.progress
        self.schedule = schedule = make_schedule(plan, self.config, progress.segments, progress.pace)
        progress.pace = schedule.pace if isinstance(schedule, TimedSchedule) else None
        self._epoch_steps = {round(epoch * self.steps_per_epoch): epoch for epoch in self.config.checkpoint_epochs}
        start = Start(
            run=self.folder.name, model=str(self.model.options.type), parameters=self.model.num_parameters(),
            counts=self.model.num_counts(), adapter_parameters=self._adapter_parameters(),
            corpus=self.corpus.name, step=progress.step, plan_steps=schedule.steps,
            tokens_per_step=self.tokens_per_step, steps_per_epoch=self.steps_per_epoch, device=str(self.device),
            precision=str(self.step.mixed.format), seconds=progress.seconds, memory_bytes=plan.expected_bytes,
            plan_seconds=plan.seconds, step_seconds=plan.measured_step_seconds, report_seconds=plan.report_seconds,
            max_steps=plan.max_steps, validations=plan.validation_count,
            validation_tokens=plan.validation_tokens, valid_tokens=len(self.corpus.splits["valid"].ids) - 1,
        )  # fmt: skip
        begun = self._clock()
        if progress.step == 0:
            if self.world.broadcast_from_rank0(lambda: not (self.folder.path / MODEL).exists()):
                self._write_best(self.step.weights(), None)
            self.save()
            # Before the first line of metrics.jsonl; and an unwritable disk is an error before training.
            self._writer.finish()
            # The last save has the moments of the optimizer as well.
            self._note_save(begun, factor=WITH_MOMENTS)
        for callback in self.callbacks:
            callback.on_start(start)
        self._save_is_timed = False
        self._begun = self._clock() - progress.seconds
        if self._compile():
            # The time belongs to the plan.
            progress.seconds, _ = self.world.sync_clock(self._seconds())
        schedule.begin(progress.step, progress.seconds)
        self._saved_at = progress.seconds
        self._interval = MetricsInterval()
        reason = self._loop(stop_after)
        progress.stop_reason = reason
        if progress.best_step is None:
            # Stopped before the first validation: the current weights are the best ones.
            self._write_best(self.step.weights(), None)
        self.save()
        self._writer.finish()
        end = End(
            reason, progress.step, schedule.steps, progress.seconds, progress.best_loss, progress.best_step,
            signal=self._signal if reason == "interrupted" else None, learning_rate_share=progress.learning_rate_share,
        )  # fmt: skip
        for callback in self.callbacks:
            callback.on_end(end)
        return end

    def _adapter_parameters(self) -> int:
        """Numbers in the adapters; 0 without adapters."""
        if not self.model.has_adapters:
            return 0
        return sum(tensor.numel() for tensor in self.model.saved_tensors().values())

    # -- the loop -------------------------------------------------------------------------------------

    def _loop(self, stop_after: int | None) -> StopReason:
        progress, schedule = self.progress, self.schedule
        reason: StopReason | None = None
        since = begun = progress.seconds
        while not schedule.is_done(progress.step):
            loss = self._run_step()
            self._writer.poll()
            progress.seconds, self._signal = self.world.sync_clock(self._seconds(), self._received)
            stepped = progress.seconds
            schedule.add_step(stepped - since)
            schedule.end_if_late(progress.step, stepped)
            tick = Tick(progress.step, loss, stepped, schedule.progress(progress.step), schedule.steps)
            for callback in self.callbacks:
                callback.on_step(tick)
            reason = self._stop_reason(stop_after)
            # The plan's own steps decide about validation; a stop in between must not add one, or it would change
            # what patience and plateau see.
            validates = schedule.validates_at(progress.step)
            if self._logs_at(progress.step) or reason is not None:
                self._write_row(validates)
            kept = self._keep()
            if validates and reason != "finished":
                # Even if the run stops here anyway: a resume must not continue past the end of patience.
                reason = self._out_of_patience() or reason
            if reason is not None:
                return reason
            since = stepped
            if progress.step == self._decides_at:
                self._read_results()
                spent = (progress.seconds - begun) / MEASURED_STEPS
                self._compile_if_it_pays(spent * (schedule.steps - progress.step))
            if validates:
                since = self._save_after_validation(stepped)
            elif kept or progress.seconds - self._saved_at > SAVE_SECONDS:
                self.save()
            schedule.look(progress.step, since)
        return "finished"

    def _compile(self) -> bool:
        """Compile the step if the options, a resumed run or the plan's minutes say so; whether time was spent on it."""
        self._decides_at: int | None = None
        known = self.step.known_compilation()
        if known is not None:
            return known != "off" and self._compile_step()
        if self.plan.seconds is None:
            # The first steps tell how long the plan takes.
            self._decides_at = self.progress.step + MEASURED_STEPS
            return False
        return self._compile_if_it_pays(self.plan.seconds)

    def _compile_if_it_pays(self, seconds: float) -> bool:
        """Decide by the seconds that the plan takes; whether time was spent."""
        kind, parts = self.step.compile_kind, self.config.gradient_accumulation
        reason = obstacle(kind, self.device, processes=self.world.size, parts=parts)
        if reason is not None or self.step.reads_conversations:
            return False
        wanted, sentence = pays(kind, seconds)
        log.warning("%s", sentence)
        return wanted and self._compile_step()

    def _compile_step(self) -> bool:
        self.step.compile(self.batches)
        return True

    def _seconds(self) -> float:
        """The training time by this process's clock."""
        return self._clock() - self._begun

    def _save_after_validation(self, stepped: float) -> float:
        """Save, and note the time of the validation and the save, since `stepped`; the training time now."""
        begun = self._clock()
        self.save()
        if isinstance(self.schedule, TimedSchedule) and not self._save_is_timed:
            # Once, and with the moments of the optimizer: the plan must leave time for the last save.
            self._writer.finish()
            self._note_save(begun)
            self._save_is_timed = True
        now, _ = self.world.sync_clock(self._seconds())
        self.schedule.add_validation(now - stepped)
        return now

    def _note_save(self, begun: float, *, factor: float = 1.0) -> None:
        """Give a plan by time the time of a save that began at `begun` by the clock, if it is the longest so far."""
        seconds, _ = self.world.sync_clock((self._clock() - begun) * factor)
        if self.progress.pace is not None:
            self.progress.pace.save_seconds = max(seconds, self.progress.pace.save_seconds)

    def _run_step(self) -> float:
        """One step; the last known loss in nats per token, NaN if that update was skipped."""
        progress, number, begun = self.progress, self.progress.step + 1, self._clock()
        # A skipped step uses up its batch, but no step of a schedule in steps.
        # On a GPU the last step counts as an update, whether its result happens to be read already or not.
        updates = progress.updates + progress.last_is_skipped
        share = self.schedule.learning_rate_share(progress.step, updates) * progress.rate_scale
        progress.learning_rate_share = share
        logs = self._logs_at(number)
        self._started.append((number, self.step.start(self.batches.of_step(progress.step), share, with_metrics=logs)))
        progress.step, progress.last_is_skipped = number, False
        self._read_results(1 if self.step.reads_late and not logs and self._loss is not None else 0)
        self._interval.seconds += self._clock() - begun
        assert self._loss is not None
        return self._loss

    def _read_results(self, unread: int = 0) -> None:
        """Read the results of started steps, and leave the last `unread` of them."""
        progress = self.progress
        while len(self._started) > unread:
            number, finish = self._started.popleft()
            result = finish()
            if result.problem is not None:
                if self.config.on_nonfinite == "stop":
                    result.raise_problem(
                        number,
                        "The saved weights are intact: start from them with "
                        f"--init {self.folder.name}@last and a lower training.learning_rate, training.precision=fp32, "
                        "or training.on_nonfinite=skip.",
                    )
                log.warning(
                    "Step %d: %s (first in %s); the step was skipped.", number, result.problem, result.first_nonfinite
                )
            progress.skipped_steps += not result.is_updated
            progress.last_is_skipped = self.step.reads_late and number == progress.step and not result.is_updated
            progress.clipped_steps += result.is_clipped
            self._interval.add(result)
            self._loss = result.loss

    def _logs_at(self, step: int) -> bool:
        return step % self.config.log_every == 0 or self.schedule.validates_at(step)

    def _stop_reason(self, stop_after: int | None) -> StopReason | None:
        progress = self.progress
        if self.schedule.is_done(progress.step):
            return "finished"
        if self._signal is not None:
            return "interrupted"
        if stop_after is not None and progress.step >= stop_after:
            return "stop_after"
        return None

    def _out_of_patience(self) -> StopReason | None:
        progress, patience = self.progress, self.config.patience
        if patience is not None:
            return "no_progress" if progress.stalls >= patience else None
        patience = self.plan.patience
        return "no_progress" if patience is not None and progress.harmful >= patience else None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM finish the step; a second Ctrl-C stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self._received = number
            if self.world.size == 1:
                self._signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._received = self._signal = None
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- metrics and validation -----------------------------------------------------------------------

    def _write_row(self, validates: bool) -> None:
        self._read_results()
        progress = self.progress
        row = self._interval.row(
            progress.step, progress.skipped_steps, self.step, self.batches, self.corpus.splits["train"]
        )
        row |= {"progress": round(self.schedule.progress(progress.step), 6), "plan_steps": self.schedule.steps}
        if validates:
            self._check_divergence(row["train_loss"])
            begun = self._clock()
            row |= self._validate()
            row["validation_seconds"] = round(self._clock() - begun, 3)
        progress.seconds, _ = self.world.sync_clock(self._seconds())
        row["seconds"] = round(progress.seconds, 3)
        self.folder.append_metrics(row)
        for callback in self.callbacks:
            callback.on_log(row)
        self._interval = MetricsInterval()

    def _check_divergence(self, loss: float | None) -> None:
        """Raise DivergedError if the interval's training loss is far above that of an untrained model."""
        untrained = math.log(self.model.vocab_size)
        if loss is None or loss <= untrained + UNTRAINED_MARGIN:
            return
        best = self.progress.best_step
        kept = "" if best is None else f" The best weights, of step {best:,}, are saved."
        raise DivergedError(
            f"Step {self.progress.step:,}: the training loss is {loss:,.4g} nats per token, far above the "
            f"{untrained:.4g} of an untrained model. Training diverged: lower training.learning_rate "
            f"(now {self.config.learning_rate:g}).{kept}"
        )

    def _validate(self) -> Row:
        """Validate, save the weights if they are the best so far, and count stalls."""
        progress, limit, valid = self.progress, self.plan.validation_tokens, self.corpus.splits["valid"]

        def show(done: int, total: int) -> None:
            for callback in self.callbacks:
                callback.on_validation(done, total)

        ids, marks = beginning(valid, limit)
        scores = validate(self.step, ids, marks=marks, progress=show)
        loss = scores.loss
        # A resumed run reaches the same best step again: that is no stall.
        better = math.isfinite(loss) and (
            progress.best_loss is None or loss < progress.best_loss or progress.step == progress.best_step
        )
        if better:
            progress.best_loss, progress.best_step = loss, progress.step
            progress.stalls = progress.rate_stalls = progress.harmful = 0
            self._write_best(self.step.weights(), loss)
        else:
            progress.stalls += 1
            progress.rate_stalls += 1
            harms = progress.best_loss is not None and not loss <= progress.best_loss + HARM
            progress.harmful = progress.harmful + 1 if harms else 0
            if self.config.schedule == "plateau" and progress.rate_stalls >= self.config.decay_patience:
                progress.rate_scale *= self.config.decay_factor
                progress.rate_stalls = 0
        if not math.isfinite(loss):
            where = self.step.find_nonfinite(self.batches.batch(0)) or "the loss"
            log.warning("Step %d: the validation loss is %s (first in %s).", progress.step, loss, where)
            return {}
        return {
            "valid_loss": loss,
            "valid_bits_per_byte": valid.counts.bits_per_byte(loss),
            "valid_accuracy": scores.accuracy,
            "best_step": progress.best_step,
            "sample": self._sample(),
        }

    def _sample(self) -> str | None:
        """A short text of the validated weights; None for a model that is sharded over processes."""
        tokens = self.config.sample_tokens
        if tokens is None or not self.world.is_rank0:
            return None
        return preview_step(self.step, self.corpus.tokenizer, affordable_tokens(self.step, tokens))

    # -- saving ---------------------------------------------------------------------------------------
    # The training thread only copies; `Writer` does the rest, in this order: best weights, kept checkpoints, `last/`.
    # So after a kill the best weights are as old as `last/`, or newer by less than one validation.

    def _write_best(self, weights: Arrays, loss: float | None) -> None:
        step = self.progress.step
        self._writer.write(functools.partial(self.folder.write_best, weights, step=step, valid_loss=loss))

    def _keep(self) -> bool:
        """Keep this step's weights under steps/ if the options say so."""
        step, every = self.progress.step, self.config.checkpoint_every
        epoch = self._epoch_steps.get(step)
        if epoch is None and (every is None or step % every):
            return False
        self._writer.write(functools.partial(self._write_step, step, epoch, self.step.weights()))
        return True

    def _write_step(self, step: int, epoch: int | None, weights: Arrays) -> None:
        """Write a checkpoint, and delete the oldest beyond the limit; those of epochs stay."""
        self.folder.write_step(f"step-{step}", weights, step=step, epoch=epoch)
        if self.config.keep_checkpoints is not None:
            of_epochs = {f"step-{step}" for step in self._epoch_steps}
            names = [name for name in self.folder.kept_checkpoints() if re.fullmatch(r"step-\d+", name)]
            for name in [name for name in names if name not in of_epochs][: -self.config.keep_checkpoints]:
                self.folder.drop_step(name)

    def save(self) -> None:
        """Replace the `last` checkpoint, in the writer's thread."""
        self._read_results()
        step = self.progress.step

        def saved() -> None:
            for callback in self.callbacks:
                callback.on_save(step)

        self._writer.write(last_checkpoint.snapshot(self.folder, self.step, self.progress), saved)
        self._saved_at = self.progress.seconds
