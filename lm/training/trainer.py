"""The trainer: from batches and a model to saved weights.

    plan ─► step (forward, backward, clip, update) ─► log ─► validate ─► save best ─► save last ─► …

Everything that a later step depends on is saved (`resuming`): N steps straight and N/2 + N/2 give the same weights, bit
for bit, on one machine's CPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm.config import TrainingConfig
from lm.corpora import PreparedCorpus
from lm.corpora.batches import make_batches
from lm.device import deterministic, memory_in_use
from lm.errors import DivergedError, NonFiniteLossError
from lm.evaluation.perplexity import Scores, score
from lm.files import Arrays
from lm.models.base import LanguageModel, State
from lm.runs.run_folder import MODEL, RunFolder
from lm.torch_private import kept_memory
from lm.training import distributed, last_checkpoint
from lm.training.async_writer import Writer
from lm.training.callbacks import Callback, End, Row, Start, StopReason, Tick
from lm.training.last_checkpoint import TrainProgress
from lm.training.learning_rate import learning_rate_share
from lm.training.nonfinite import activations, first_nonfinite
from lm.training.optimizers import make_optimizers
from lm.training.plan import DEFAULT_BPTT, HARM, Plan
from lm.training.precision import MixedPrecision
from lm.training.preview import preview_sample
from lm.training.weight_average import WeightAverage

log = logging.getLogger(__name__)

VALIDATION_ROWS = 64
"""Parts of the split that validation reads together while training; reports read it as one."""
VALIDATION_WARM_UP = 256
"""Tokens before its part that a row reads first: then the loss is within 0.005 nats of the report's."""
UNTRAINED_MARGIN = 1.0
"""Nats per token. A training loss this far above that of equal probabilities is worse than no training at all."""
SAVE_SECONDS = 120.0
"""The most training that a kill can cost."""
WARM_UP_STEPS = 2
"""Steps whose time does not count."""


class Trainer:
    """Trains one model in one run folder."""

    def __init__(
        self,
        folder: RunFolder,
        config: TrainingConfig,
        model: LanguageModel,
        corpus: PreparedCorpus,
        *,
        callbacks: list[Callback] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.corpus = corpus
        self.callbacks = callbacks or []
        self.world = distributed.current()
        self.device = self.world.place(config.device)
        self.model = model.to(self.device)
        self.mixed = MixedPrecision(self.model, config, self.device)
        self.plan = Plan(steps=1, evaluate_every=1)
        kind = config.batching or model.batching
        bptt = config.bptt or model.context_length or DEFAULT_BPTT
        train = corpus.splits["train"]
        share = self.world.share
        self.batches = make_batches(kind, train, batch_size=config.batch_size, bptt=bptt, seed=config.seed, share=share)
        # A window of limited length is not carried: it would grow with every batch.
        self.carries = kind == "streams" and model.context_length is None
        self.steps_per_epoch = self.batches.per_epoch / config.gradient_accumulation
        self.tokens_per_step = config.batch_size * bptt * config.gradient_accumulation
        masters = self.mixed.masters
        # Masters add up the gradients of several batches in fp32, so that each of them has to be everybody's.
        self.parallel = distributed.Parallel(model, self.world, shard=config.shard, each_part=bool(masters))
        self.optimizers = make_optimizers(model, config, fused=self.device.type != "mps", masters=masters)
        look_back = config.average_share
        self.average = None if look_back is None else WeightAverage(self.model, look_back, self.mixed.trained)
        self.state = TrainProgress()
        self.hidden: State | None = None
        # What this process was sent, at any moment, and what all processes have agreed on after a step.
        self._sent: int | None = None
        self._signal: int | None = None
        self._accuracy: float | None = None
        self._given: State | None = None
        self._seen: Row = {}
        self.world.seed(config.seed)

    # -- one step -----------------------------------------------------------------------------------

    def run_step(self) -> float:
        """One optimizer step; the loss in nats per token, NaN where the update was skipped."""
        config, state = self.config, self.state
        # A skipped step takes its batch from the data and nothing else.
        share = learning_rate_share(state.updates, self.plan.steps, config) * state.rate_scale
        state.learning_rate_share = share
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_learning_rate"] * share
        if not self.model.training:
            self.model.train()
        total = 0.0
        for part in range(config.gradient_accumulation):
            index = state.step * config.gradient_accumulation + part
            with self.parallel.part(last=part == config.gradient_accumulation - 1):
                loss, objective = self._forward(index)
                if not math.isfinite(loss):
                    self._skip_or_stop(f"the loss is {loss}", self._where(index))
                    return math.nan
                self.mixed.backward(objective / config.gradient_accumulation)
            self.mixed.collect()
            total += loss / config.gradient_accumulation
        self._grad_norm = self.mixed.clip(config.grad_clip)
        if not math.isfinite(self._grad_norm):
            where = self.mixed.nonfinite_gradient()
            if not self.mixed.scale.note_overflow():
                # No loss scale is to blame, or none is left to lower.
                self._skip_or_stop(f"the gradient norm is {self._grad_norm}", where)
                return math.nan
            self._skip(where)
            return total
        self.mixed.step(self.optimizers)
        if config.grad_clip is not None and self._grad_norm > config.grad_clip:
            state.clipped_steps += 1
        self._clear_gradients()
        state.step += 1
        if self.average is not None:
            self.average.update(state.updates)
        return total

    def _forward(self, index: int) -> tuple[float, Tensor]:
        batch = self.batches.batch(index)
        inputs, targets = (torch.from_numpy(array).to(self.device) for array in (batch.inputs, batch.targets))
        logs = self._logs_at(self.state.step + 1)
        self._given = None if batch.fresh else self.hidden
        if logs and self.config.log_activations:
            self._look(inputs)
        with self.mixed.computing():
            smoothing = self.config.label_smoothing
            found = self.parallel.training_loss(inputs, targets, self._given, label_smoothing=smoothing)
        self.hidden = found.state.detach() if self.carries else None
        if logs:
            logits = found.logits
            own = None if logits is None else float((logits.argmax(dim=-1) == targets).float().mean())
            self._accuracy = None if own is None else self.world.mean(own, batch.weight)
        objective = found.objective if batch.weight == 1 else found.objective * batch.weight
        return self.world.mean(float(found.nats), batch.weight), objective

    def _clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _look(self, inputs: Tensor) -> None:
        """Note the largest activation that the step's batch gives."""
        found = activations(self.model, inputs, self._given, self.mixed.computing())
        found = [pair for each in self.world.gather(found) for pair in each]
        if all(math.isfinite(value) for _, value in found):
            name, value = max(found, key=lambda pair: pair[1])
            self._seen |= {"largest_activation": value, "largest_activation_in": name}

    def _where(self, index: int) -> str:
        """Where a batch's loss stopped being a number."""
        inputs = torch.from_numpy(self.batches.batch(index).inputs).to(self.device)
        found = self.world.gather(first_nonfinite(self.model, inputs, self._given, self.mixed.computing()))
        return next(filter(None, found), "the loss")

    def _skip(self, where: str) -> None:
        """Leave weights, moments, averages and schedule as they are, and go on with the next batch."""
        self._clear_gradients()
        self._seen.setdefault("first_nonfinite", where)
        self.state.skipped_steps += 1
        self.state.step += 1

    def _skip_or_stop(self, what: str, where: str) -> None:
        """A step that no loss scale can mend: skipped or refused, as the options say, never silently."""
        # A state that holds the bad values would poison every later step.
        self.hidden = None
        sentence = f"Step {self.state.step + 1}: {what} (first in {where})"
        if self.config.on_nonfinite == "stop":
            self._clear_gradients()
            raise NonFiniteLossError(
                f"{sentence}. The weights saved last are intact: start from them with --init {self.folder.name}@last "
                "and a lower training.learning_rate, training.precision=fp32, or training.on_nonfinite=skip."
            )
        log.warning("%s; the step was skipped.", sentence)
        self._skip(where)

    # -- measuring, for a plan in minutes -------------------------------------------------------------

    def measure(self, seconds: float) -> tuple[float, float]:
        """Time of a step, and of validating on one token, on a trainer that is thrown away afterwards.

        Args:
            seconds: how long to measure, about.
        """
        self.plan = Plan(steps=10**9, evaluate_every=10**9)
        with deterministic(self.device), kept_memory():
            return self._measure(seconds)

    def _measure(self, seconds: float) -> tuple[float, float]:
        times: list[float] = []
        begun = time.perf_counter()
        # The first steps pay for caches and threads that the others find ready.
        while len(times) < WARM_UP_STEPS + 2 or self._since(begun) < seconds * 0.75:
            before = time.perf_counter()
            self.run_step()
            times.append(time.perf_counter() - before)
        # The median: another program that takes the processor for a moment must not halve the plan.
        step_seconds, _ = self.world.agree(statistics.median(times[WARM_UP_STEPS:]), None)
        valid = self.corpus.splits["valid"].ids
        # A validation token costs about a third of a training token.
        tokens = max(VALIDATION_ROWS, int(seconds * 0.25 / step_seconds * self.tokens_per_step * 3))
        begun = time.perf_counter()
        scores = self._score(valid[: tokens + 1])
        return step_seconds, self._since(begun) / scores.tokens

    def _since(self, begun: float) -> float:
        """Seconds since `begun`, the same in all processes."""
        return self.world.agree(time.perf_counter() - begun, None)[0]

    # -- the loop -------------------------------------------------------------------------------------

    def train(self, plan: Plan, *, stop_after: int | None = None) -> End:
        """Go on from the current state to the end of the plan, or to step `stop_after`.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite and the options say stop; `last/` is intact.
            RunError: the disk is full or read-only; what was saved before is intact.
        """
        try:
            with self._signals(), deterministic(self.device), kept_memory(), Writer() as self._writer:
                return self._train(plan, stop_after)
        finally:
            # Each of them, also where one fails: a terminal is to be given back whatever the disk says.
            with contextlib.ExitStack() as closing:
                for callback in reversed(self.callbacks):
                    closing.callback(callback.close)

    def _train(self, plan: Plan, stop_after: int | None) -> End:
        self.plan = plan
        self._epoch_steps = {round(epoch * self.steps_per_epoch): epoch for epoch in self.config.checkpoint_epochs}
        start = Start(
            run=self.folder.name,
            model=str(self.model.options.type),
            parameters=self.model.num_parameters(),
            counts=self.model.num_counts(),
            corpus=self.corpus.name,
            step=self.state.step,
            plan_steps=plan.steps,
            tokens_per_step=self.tokens_per_step,
            steps_per_epoch=self.steps_per_epoch,
            device=str(self.device),
            precision=str(self.mixed.format),
            seconds=self.state.seconds,
            expected=plan.expected,
            memory_bytes=plan.expected_bytes,
            plan_seconds=plan.seconds,
            validations=-(-plan.steps // plan.evaluate_every),
            validation_tokens=plan.validation_tokens,
            valid_tokens=len(self.corpus.splits["valid"].ids) - 1,
        )
        if self.state.step == 0:
            if self.world.broadcast_from_rank0(lambda: not (self.folder.path / MODEL).exists()):
                self._write_best(self._weights(), None)
            self.save()
            # Before the first line of metrics.jsonl; and a disk that cannot be written says so before the work.
            self._writer.finish()
        for callback in self.callbacks:
            callback.on_start(start)
        self._clock = time.perf_counter() - self.state.seconds
        self._saved_at = self.state.seconds
        self._begin_interval()
        reason = self._loop(stop_after)
        self.state.stop_reason = reason
        if self.state.best_step is None:
            # Stopped before the first validation: what was learned is still the best there is.
            self._write_best(self._weights(), None)
        self.save()
        self._writer.finish()
        end = End(
            reason,
            self.state.step,
            plan.steps,
            self.state.seconds,
            self.state.best_loss,
            self.state.best_step,
            signal=self._signal if reason == "interrupted" else None,
            learning_rate_share=self.state.learning_rate_share,
        )
        for callback in self.callbacks:
            callback.on_end(end)
        return end

    def _loop(self, stop_after: int | None) -> StopReason:
        state, plan = self.state, self.plan
        reason: StopReason | None = None
        while state.step < plan.steps:
            begun = time.perf_counter()
            loss = self.run_step()
            self._step_seconds += time.perf_counter() - begun
            self._losses.append(loss)
            self._writer.poll()
            state.seconds, self._signal = self.world.agree(time.perf_counter() - self._clock, self._sent)
            for callback in self.callbacks:
                callback.on_step(Tick(state.step, loss, state.seconds))
            reason = self._why_stop(stop_after)
            # The plan's own steps decide about validation; a stop in between must not add one, or it would change
            # what patience and plateau see.
            validates = self._validates_at(state.step) or reason == "out_of_time"
            if self._logs_at(state.step) or reason is not None:
                self._write_row(validates)
            kept = self._keep()
            if validates and reason != "finished":
                # Also where the run stops here anyway: a resume must not go on past the end of patience.
                reason = self._out_of_patience() or reason
            if reason is not None:
                return reason
            if validates or kept or state.seconds - self._saved_at > SAVE_SECONDS:
                self.save()
        return "finished"

    def _validates_at(self, step: int) -> bool:
        return step % self.plan.evaluate_every == 0 or step == self.plan.steps

    def _logs_at(self, step: int) -> bool:
        return step % self.config.log_every == 0 or self._validates_at(step)

    def _why_stop(self, stop_after: int | None) -> StopReason | None:
        state, plan = self.state, self.plan
        if state.step >= plan.steps:
            return "finished"
        if self._signal is not None:
            return "interrupted"
        if stop_after is not None and state.step >= stop_after:
            return "stop_after"
        if plan.seconds is not None and state.seconds >= plan.seconds:
            return "out_of_time"
        return None

    def _out_of_patience(self) -> StopReason | None:
        state, patience = self.state, self.config.patience
        if patience is not None:
            return "no_progress" if state.stalls >= patience else None
        patience = self.plan.patience
        return "no_progress" if patience is not None and state.harmful >= patience else None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM finish the step; a second Ctrl-C stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self._sent = number
            if self.world.size == 1:
                self._signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._sent = self._signal = None
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- looking --------------------------------------------------------------------------------------

    def _begin_interval(self) -> None:
        self._losses: list[float] = []
        self._step_seconds = 0.0
        self._clipped_before = self.state.clipped_steps
        self._grad_norm = math.nan
        self._seen = {}

    def _score(self, ids: Any, *, report: bool = False) -> Scores:
        def progress(done: int, total: int) -> None:
            for callback in self.callbacks:
                callback.on_validation(done, total)

        # A carried state is read in rows, which is quick; the loss ranks weights as the report's does.
        with self._averaged(), self.mixed.computing():
            scores = score(
                self.model,
                ids,
                precision=None,
                rows=VALIDATION_ROWS,
                warm_up=VALIDATION_WARM_UP,
                share=self.world.share,
                progress=progress if report else None,
            )
        return self.world.total(scores)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the weights that are validated and kept: the averaged ones, where there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _weights(self) -> dict[str, Any]:
        if not (self.world.first or self.config.shard):
            return {}
        return {**self.mixed.arrays(), **({} if self.average is None else self.average.arrays())}

    def _write_row(self, validates: bool) -> None:
        state, losses = self.state, [loss for loss in self._losses if math.isfinite(loss)]
        steps = max(1, len(self._losses))
        row: Row = {
            "step": state.step,
            "tokens": state.step * self.tokens_per_step,
            "epoch": round(state.step / self.steps_per_epoch, 4),
            "train_loss": float(np.mean(losses)) if losses else None,
            "train_accuracy": self._accuracy if self._logs_at(state.step) else None,
            "valid_loss": None,
            "valid_accuracy": None,
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": self._grad_norm if math.isfinite(self._grad_norm) else None,
            "clip_rate": (state.clipped_steps - self._clipped_before) / steps,
            "skipped_steps": state.skipped_steps,
            "tokens_per_second": steps * self.tokens_per_step / max(self._step_seconds, 1e-9),
            "memory_bytes": memory_in_use(self.device),
        }
        row["train_bits_per_byte"] = self._bits_per_byte("train", row["train_loss"])
        if self.mixed.scale.enabled:
            row["loss_scale"] = self.mixed.scale.value
        row |= self._seen
        if validates:
            self._refuse_divergence(row["train_loss"])
            begun = time.perf_counter()
            row |= self._validate()
            row["validation_seconds"] = round(time.perf_counter() - begun, 3)
        state.seconds = self._since(self._clock)
        row["seconds"] = round(state.seconds, 3)
        self.folder.append_metrics(row)
        for callback in self.callbacks:
            callback.on_log(row)
        self._begin_interval()

    def _refuse_divergence(self, loss: float | None) -> None:
        """Raises DivergedError where the interval's training loss is worse than no training at all."""
        untrained = math.log(self.model.vocab_size)
        if loss is None or loss <= untrained + UNTRAINED_MARGIN:
            return
        best = self.state.best_step
        kept = "" if best is None else f" The best weights, of step {best:,}, are kept."
        raise DivergedError(
            f"Step {self.state.step:,}: the training loss is {loss:,.4g} nats per token, far above the "
            f"{untrained:.4g} of a model that has learned nothing. Training diverged: lower training.learning_rate "
            f"(now {self.config.learning_rate:g}).{kept}"
        )

    def _validate(self) -> Row:
        """Validate, keep the weights if they are the best so far, and count stalls."""
        state = self.state
        limit = self.plan.validation_tokens
        valid = self.corpus.splits["valid"].ids
        scores = self._score(valid[: None if limit is None else limit + 1], report=True)
        loss = scores.loss
        # A resumed run comes to the same best step again: that is no stall.
        better = math.isfinite(loss) and (
            state.best_loss is None or loss < state.best_loss or state.step == state.best_step
        )
        if better:
            state.best_loss, state.best_step = loss, state.step
            state.stalls = state.rate_stalls = state.harmful = 0
            self._write_best(self._weights(), loss)
        else:
            state.stalls += 1
            state.rate_stalls += 1
            harms = state.best_loss is not None and not loss <= state.best_loss + HARM
            state.harmful = state.harmful + 1 if harms else 0
            if self.config.schedule == "plateau" and state.rate_stalls >= self.config.decay_patience:
                state.rate_scale *= self.config.decay_factor
                state.rate_stalls = 0
        if not math.isfinite(loss):
            self._given = None
            log.warning("Step %d: the validation loss is %s (first in %s).", state.step, loss, self._where(0))
            return {}
        return {
            "valid_loss": loss,
            "valid_bits_per_byte": self._bits_per_byte("valid", loss),
            "valid_accuracy": scores.accuracy,
            "best_step": state.best_step,
            "sample": self._sample(),
        }

    def _bits_per_byte(self, split: str, loss: float | None) -> float | None:
        """Of nats per token, over the whole split; with what its tokens do not say, None where that is not known."""
        counts = self.corpus.splits[split].counts
        spelled = counts.whole_nats(0.0)
        if loss is None or spelled is None:
            return None
        return loss / math.log(2) * counts.tokens / counts.bytes + spelled / math.log(2) / counts.bytes

    def _sample(self) -> str | None:
        """A short text of the weights that were validated; of a model that is spread over processes, none."""
        tokens = self.config.sample_tokens
        if tokens is None or not self.world.first or self.parallel.sharded:
            return None
        with self._averaged(), self.mixed.computing():
            return preview_sample(self.model, self.corpus.tokenizer, tokens)

    # -- keeping --------------------------------------------------------------------------------------
    # The training thread only copies; `Writer` does the rest, in this order: best weights, kept weights, `last/`. So a
    # kill finds best weights that are as old as `last/` or, by less than one validation, newer (resuming knows both).

    def _write_best(self, weights: Arrays, loss: float | None) -> None:
        self._writer.write(functools.partial(self.folder.write_best, weights, step=self.state.step, valid_loss=loss))

    def _keep(self) -> bool:
        """Keep this step's weights under steps/ where the options say so."""
        step, every = self.state.step, self.config.checkpoint_every
        epoch = self._epoch_steps.get(step)
        if epoch is None and (every is None or step % every):
            return False
        own = frozenset(f"step-{step}" for step in self._epoch_steps)
        self._writer.write(functools.partial(self._write_step, step, epoch, self._weights(), own))
        return True

    def _write_step(self, step: int, epoch: int | None, weights: Arrays, own: frozenset[str]) -> None:
        """Keep weights, and drop the oldest of those that are too many; `own` are kept for their epochs."""
        self.folder.write_step(f"step-{step}", weights, step=step, epoch=epoch)
        if self.config.keep_checkpoints is not None:
            kept = [
                name for name in self.folder.kept_checkpoints() if re.fullmatch(r"step-\d+", name) and name not in own
            ]
            for name in kept[: -self.config.keep_checkpoints]:
                self.folder.drop_step(name)

    def save(self) -> None:
        """Have `last/` replaced by the current state."""
        step = self.state.step
        self._writer.write(last_checkpoint.snapshot(self), lambda: self._tell_saved(step))
        self._saved_at = self.state.seconds

    def _tell_saved(self, step: int) -> None:
        for callback in self.callbacks:
            callback.on_save(step)

    def load(self) -> None:
        """Go back to what `last/` holds.

        Raises:
            CorruptRunError: it does not fit the model.
        """
        last_checkpoint.load(self)
