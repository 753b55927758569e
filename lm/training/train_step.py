"""One optimizer step of a model: forward, backward, clipping, update. It knows no data source, run or plan.

step = TrainStep(model, config)
batches = StepBatches(corpus.splits["train"], step)
result = step.run(batches.of_step(0), learning_rate_share=1.0)
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm.config import TrainingConfig, row_length
from lm.corpora import TokenSplit
from lm.corpora.batches import STREAMS, Batch, make_batches
from lm.errors import NonFiniteLossError
from lm.files import Arrays
from lm.kernels.compiled import native
from lm.kernels.dispatch import isa_and_threads
from lm.models.base import LanguageModel, State, TrainingLoss
from lm.training import distributed
from lm.training.compiling import MAX_GRAPHS, CompiledLoss, compiled, compiling, kind_for, obstacle
from lm.training.distillation import Teacher
from lm.training.nonfinite import activations, first_nonfinite
from lm.training.optimizers import load_optimizer_arrays, make_optimizers, optimizer_arrays
from lm.training.precision import MixedPrecision
from lm.training.prefetch import Prefetch
from lm.training.weight_average import WeightAverage

log = logging.getLogger(__name__)


@dataclass
class StepResult:
    """The outcome of one step."""

    loss: float = math.nan
    """Nats per token; NaN if the loss or the gradients are not finite and the loss scale is not the cause."""
    grad_norm: float = math.nan
    """Before clipping."""
    is_updated: bool = False
    """False: the weights, moments and average are unchanged, because a number was not finite."""
    is_clipped: bool = False
    problem: str | None = None
    """The non-finite number, if a lower loss scale cannot help: "the loss is nan"."""
    first_nonfinite: str | None = None
    """The weight, module output or gradient that was not finite first."""
    accuracy: float | None = None
    largest_activation: tuple[str, float] | None = None
    """Module and absolute value."""

    def raise_problem(self, number: int, remedy: str) -> None:
        """Raise NonFiniteLossError if there is a problem.

        Args:
            number: of the step, from 1.
            remedy: a sentence for the user.
        """
        if self.problem is not None:
            raise NonFiniteLossError(f"Step {number}: {self.problem} (first in {self.first_nonfinite}). {remedy}")


@dataclass
class StepCheckpoint:
    """Everything that later steps depend on, as host arrays by file and JSON values."""

    tensors: dict[str, Arrays]
    """Files "random", "hidden", "teacher", "model", "optimizer", "average"; some are optional."""
    values: dict[str, Any]
    """"scaler", "hidden_dtype", "environment"."""


class TrainStep:
    """A model with all that one optimizer step needs.

    Args:
        model: with initial weights; it is moved to the device and cast.
        config: the training options.
        teacher: the model whose probabilities are learned as well; None: the text alone.

    Raises:
        ConfigError, DeviceError: the device, the number format or the model does not allow these options.
    """

    def __init__(self, model: LanguageModel, config: TrainingConfig, teacher: Teacher | None = None) -> None:
        self.config, self.teacher = config, teacher
        self.world = distributed.current()
        self.device = self.world.pick_device(config.device)
        self.model = model.to(self.device)
        self.mixed = MixedPrecision(self.model, config, self.device)
        masters = self.mixed.masters
        # Masters add up the gradients of several batches in fp32, so each batch's gradients must be averaged.
        self.parallel = distributed.Parallel(model, self.world, shard=config.shard, each_part=bool(masters))
        self.loss_function: Callable[..., TrainingLoss] = self.parallel.training_loss
        """Computes the loss of a batch; `lm.profiling` wraps it."""
        self.optimizers = make_optimizers(model, config, fused=self.device.type != "mps", masters=masters)
        share = config.average_share
        self.average = None if share is None else WeightAverage(self.model, share, self.mixed.trained)
        self.updates = 0
        """Steps that changed the weights."""
        # The state of a limited window is not carried: it would grow with every batch.
        self.carries_state = (config.batching or model.batching) in STREAMS and model.context_length is None
        self.carried_state: State | None = None
        self._input_state: State | None = None
        self.compile_kind = kind_for(model)
        self.compiled: str = "off"
        """How forward pass and loss are compiled: "off", or a kind."""
        self.compiled_before: str | None = None
        """The same before a resume; None: this is a new run."""
        self.reads_conversations = False
        """Whether each row of a batch is a conversation: no state is carried, and the shapes of batches differ."""
        self.reads_late = self.device.type == "cuda"
        """Whether the next step is started before the result of a step is read: the device never waits for the host."""
        if teacher is not None:
            teacher.to(self.device)
        self.world.seed(config.seed)

    def run(self, batches: Iterable[Batch], learning_rate_share: float, *, with_metrics: bool = False) -> StepResult:
        """One step, to its end.

        Args:
            batches: `training.gradient_accumulation` of them.
            learning_rate_share: of each optimizer's peak learning rate.
            with_metrics: also measure accuracy and, with `training.log_activations`, the largest activation.
        """
        return self.start(batches, learning_rate_share, with_metrics=with_metrics)()

    def start(
        self, batches: Iterable[Batch], learning_rate_share: float, *, with_metrics: bool = False
    ) -> Callable[[], StepResult]:
        """One step; on a GPU it may not be over. For the arguments see `run`.

        Returns:
            A function that waits for the end of the step and gives its result. Call it once for each step, in their
            order; the next step may be started before, and then nothing waits.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_learning_rate"] * learning_rate_share
        if not self.model.training:
            self.model.train()
        if self.mixed.updates_on_device:
            return self._start_on_device(batches, with_metrics)
        result = self._run_on_host(batches, with_metrics)
        return lambda: result

    def _run_on_host(self, batches: Iterable[Batch], with_metrics: bool) -> StepResult:
        result, total, parts = StepResult(), 0.0, self.config.gradient_accumulation
        for part, batch in enumerate(batches, start=1):
            with self.parallel.part(last=part == parts):
                found, accuracy = self._forward(batch, result if with_metrics else None)
                loss = self.world.all_reduce_mean(float(found.nats), batch.weight)
                if accuracy is not None:
                    result.accuracy = self.world.all_reduce_mean(float(accuracy), batch.weight)
                if not math.isfinite(loss):
                    where = self.find_nonfinite(batch, self._input_state) or "the loss"
                    return self._skip(result, where, problem=f"the loss is {loss}")
                self.mixed.backward(_weighted(found.objective, batch) / parts)
            self.mixed.collect()
            total += loss / parts
        result.grad_norm = self.mixed.clip(self.config.grad_clip)
        if not math.isfinite(result.grad_norm):
            where = self.mixed.nonfinite_gradient()
            if not self.mixed.scale.note_overflow():
                return self._skip(result, where, problem=f"the gradient norm is {result.grad_norm}")
            result.loss = total
            return self._skip(result, where)
        self.mixed.step(self.optimizers)
        self._clear_gradients()
        self.updates += 1
        if self.average is not None:
            self.average.update(self.updates)
        result.loss, result.is_updated = total, True
        result.is_clipped = self.config.grad_clip is not None and result.grad_norm > self.config.grad_clip
        return result

    def _start_on_device(self, batches: Iterable[Batch], with_metrics: bool) -> Callable[[], StepResult]:
        """A step of which the host reads nothing before it is over."""
        result, parts, world = StepResult(), self.config.gradient_accumulation, self.world
        losses: list[Tensor] = []
        seen: list[tuple[Tensor, State | None]] = []
        accuracy: Tensor | None = None
        for part, batch in enumerate(batches, start=1):
            with self.parallel.part(last=part == parts):
                found, own = self._forward(batch, result if with_metrics else None)
                losses.append(world.all_reduce_mean_on_device(found.nats, batch.weight))
                seen.append((self._inputs, self._input_state))
                if own is not None:
                    accuracy = world.all_reduce_mean_on_device(own, batch.weight)
                self.mixed.backward(_weighted(found.objective, batch) / parts)
            self.mixed.collect()
        loss = losses[0] if parts == 1 else torch.stack(losses).mean()
        update = self.mixed.update(self.optimizers, loss, self.config.grad_clip)
        self._clear_gradients()
        if self.average is not None:
            self.average.update_where(update.finite, self.updates)
        scale = self.mixed.scale.on_device(self.device) if self.mixed.scale.enabled else update.norm
        measured = loss if accuracy is None else accuracy
        read = read_later(torch.stack([loss, update.norm, scale, measured.float()]), update.norms)

        def finish() -> StepResult:
            total, norm, scale, measured, *norms = read()
            result.grad_norm = norm
            result.accuracy = None if accuracy is None else measured
            if not math.isfinite(total):
                where = self._first_nonfinite(seen[_first_bad(losses)]) or "the loss"
                return self._skip(result, where, problem=f"the loss is {total}")
            is_good = math.isfinite(norm)
            is_cause = self.mixed.scale.follow(scale, is_good=is_good) if self.mixed.scale.enabled else False
            if not is_good:
                where = update.nonfinite_gradient(norms)
                if not is_cause:
                    return self._skip(result, where, problem=f"the gradient norm is {norm}")
                result.loss = total
                return self._skip(result, where)
            self.updates += 1
            result.loss, result.is_updated = total, True
            result.is_clipped = self.config.grad_clip is not None and norm > self.config.grad_clip
            return result

        return finish

    def compile(self, batches: StepBatches) -> bool:
        """Compile forward pass and loss with the first batches; if that fails, log a sentence. Whether it is compiled.

        Weights, moments, carried state and random generators stay as they are. An error that is not the compiler's
        comes again in the next step, which runs uncompiled.
        """
        processes, parts = self.world.size, self.config.gradient_accumulation
        reason = obstacle(self.compile_kind, self.device, processes=processes, parts=parts)
        plain, carried, begun = self.loss_function, self.carried_state, time.perf_counter()
        taught = None if self.teacher is None else self.teacher.state
        try:
            if reason is None:
                self.model.train()
                with compiling(self.device):
                    kind, carries = self.compile_kind, self.carries_state
                    self.loss_function = compiled(self.model, kind, carries_state=carries)
                    for number in range(MAX_GRAPHS + 1 if self.compile_kind == "cuda graphs" else 1):
                        for batch in batches.of_step(number):
                            self.mixed.backward(self._forward(batch, None)[0].objective)
        except Exception as error:
            # The compiler's own error is inside of torch's.
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:200]}"
        finally:
            self._clear_gradients()
            self.model.zero_grad(set_to_none=True)
            self.carried_state = carried
            if self.teacher is not None:
                self.teacher.state = taught
        if reason is None:
            self.compiled = self.compile_kind
            log.info("The training step is compiled (%s, %.0f s).", self.compiled, time.perf_counter() - begun)
            return True
        self.loss_function = plain
        log.warning("The training step runs uncompiled (%s).", reason)
        return False

    def known_compilation(self) -> str | None:
        """How the step will be compiled, "off" or a kind; None: the length of the plan decides."""
        if self.reads_conversations:
            return "off"
        if self.config.compile == "on":
            return self.compile_kind
        if self.config.compile == "off" or self.device.type != "cuda":
            return "off"
        return self.compiled_before

    def _forward(self, batch: Batch, result: StepResult | None) -> tuple[TrainingLoss, Tensor | None]:
        """The loss of a batch, and with `result` the accuracy; other metrics go into `result`."""
        inputs, targets, learned, others = self._on_device(batch)
        self._inputs, self._input_state = inputs, None if batch.fresh else self.carried_state
        if result is not None and self.config.log_activations:
            result.largest_activation = self._largest_activation(inputs) or result.largest_activation
        options: dict[str, Any] = {"label_smoothing": self.config.label_smoothing}
        if others:
            options["host_inputs"] = others
        if learned is not None:
            options["learned"] = learned
        if self.teacher is not None:
            options["soft_targets"] = self.teacher.soft_targets(
                batch, inputs, targets, carries_state=self.carries_state
            )
        with self.mixed.computing():
            found = self.loss_function(inputs, targets, self._input_state, **options)
        self.carried_state = found.state.detach() if self.carries_state else None
        accuracy = None
        if result is not None and isinstance(found, CompiledLoss):
            accuracy = found.accuracy
        elif result is not None and found.logits is not None:
            with self.mixed.computing():
                own = targets if learned is None else targets.flatten()[learned]
                accuracy = (found.logits().argmax(dim=-1) == own).float().mean()
        return found, accuracy

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """Inputs, targets, places that count and the model's host inputs; without a wait from pinned memory."""
        if batch.pinned is None:
            inputs, targets = (torch.from_numpy(array).to(self.device) for array in (batch.inputs, batch.targets))
            learned = None if batch.learned is None else torch.from_numpy(batch.learned).to(self.device)
            return inputs, targets, learned, {}
        copies = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.pinned.items()}
        return copies.pop("inputs"), copies.pop("targets"), copies.pop("learned", None), copies

    def _skip(self, result: StepResult, where: str, *, problem: str | None = None) -> StepResult:
        """The result of a step that leaves weights, moments and average unchanged."""
        self._clear_gradients()
        self.parallel.drop_gradients()
        if problem is not None:
            # The state may hold the bad values, which would make every later loss NaN.
            self.carried_state = None
        result.first_nonfinite, result.problem = where, problem
        return result

    def _clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _largest_activation(self, inputs: Tensor) -> tuple[str, float] | None:
        """Module and value, over all processes; None if any activation is not finite."""
        own = activations(self.model, inputs, self._input_state, self.mixed.computing())
        found = [pair for each in self.world.all_gather(own) for pair in each]
        if not all(math.isfinite(value) for _, value in found):
            return None
        return max(found, key=lambda pair: pair[1])

    def find_nonfinite(self, batch: Batch, state: State | None = None) -> str | None:
        """The first weight or module output that is not finite on a batch, of any process."""
        return self._first_nonfinite((torch.from_numpy(batch.inputs).to(self.device), state))

    def _first_nonfinite(self, read: tuple[Tensor, State | None]) -> str | None:
        """`find_nonfinite` of inputs on the device and the state before them."""
        found = self.world.all_gather(first_nonfinite(self.model, *read, self.mixed.computing()))
        return next(filter(None, found), None)

    @property
    def learning_rate(self) -> float:
        """That of the first optimizer in the last step."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    # -- weights and checkpoint -----------------------------------------------------------------------

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the averaged weights, if there is an average."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def weights(self) -> Arrays:
        """The weights to validate and keep, averaged if there is an average; {} in processes that do not save.

        All processes must call it.
        """
        if not (self.world.is_rank0 or self.config.shard):
            return {}
        arrays = {**self.mixed.arrays(), **({} if self.average is None else self.average.arrays())}
        return arrays if self.world.is_rank0 else {}

    def checkpoint(self) -> StepCheckpoint:
        """Copies of everything that later steps depend on; all processes must call it, rank 0 saves its result."""
        world = self.world
        tensors: dict[str, Arrays] = {"random": self._random_states()}
        teacher_state = None if self.teacher is None else self.teacher.state
        for file, state in (("hidden", self.carried_state), ("teacher", teacher_state)):
            if state is not None:
                tensors[file] = {
                    name: np.array(world.all_gather_rows(t.float() if t.is_floating_point() else t).numpy())
                    for name, t in state.tensors.items()
                }
        if world.is_rank0 or self.config.shard:
            tensors["model"] = self.mixed.arrays()
            tensors["optimizer"] = optimizer_arrays(self.optimizers)
            if self.average is not None:
                tensors["average"] = self.average.arrays()
        scaler = self.mixed.scale.state()
        dtype = _float_dtype(self.carried_state)
        return StepCheckpoint(tensors, {"scaler": scaler, "hidden_dtype": dtype, "environment": self.environment()})

    def load_checkpoint(self, saved: StepCheckpoint, *, updates: int, steps: int) -> None:
        """Continue from a checkpoint.

        Args:
            saved: from `checkpoint` of an equal TrainStep, with any number of processes.
            updates: steps that changed the weights.
            steps: all steps; seeds a process that has no random generator in `saved`.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it does not fit.
        """
        tensors = saved.tensors
        self.mixed.load_arrays(tensors["model"])
        load_optimizer_arrays(self.optimizers, tensors["optimizer"])
        if self.average is not None:
            self.average.load_arrays(tensors["average"])
        self.mixed.scale.load_state(saved.values["scaler"])
        self._restore_random(tensors["random"], steps)
        if "hidden" in tensors and self.carries_state:
            dtype = getattr(torch, (saved.values["hidden_dtype"] or "torch.float32").removeprefix("torch."))
            self.carried_state = self._own_rows(tensors["hidden"], dtype)
        if "teacher" in tensors and self.teacher is not None:
            self.teacher.state = self._own_rows(tensors["teacher"], torch.float32)
        self.updates = updates

    def _own_rows(self, arrays: Arrays, dtype: torch.dtype) -> State:
        """This process's rows of a saved state, its floats in `dtype`."""
        rows = {name: np.array_split(array, self.world.size)[self.world.rank] for name, array in arrays.items()}
        own = {name: torch.from_numpy(part.copy()) for name, part in rows.items()}
        return State({name: t.to(self.device, dtype if t.is_floating_point() else None) for name, t in own.items()})

    def environment(self) -> dict[str, str]:
        """Everything outside the options that the last bits of a result depend on."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": self.mixed.format.precision,
            "amp": self.mixed.format.level,
            "compile": self.compiled,
            "optimizer": "fused" if self.optimizers[0].defaults.get("fused") else "unfused",
            "processes": str(self.world.size),
            "threads": str(torch.get_num_threads()),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "kernels": "none" if native() is None else self._instruction_set(),
            "MKL_CBWR": os.environ.get("MKL_CBWR", ""),
        }

    def _instruction_set(self) -> str:
        with self.mixed.computing():
            return isa_and_threads()[0]

    def _random_states(self) -> Arrays:
        """The random generators of all processes: "cpu" and "cuda" of rank 0, "cpu.1" of rank 1, …"""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        states = {}
        for name, state in own.items():
            for rank, each in enumerate(self.world.all_gather_rows(state[None]).numpy()):
                states[name if rank == 0 else f"{name}.{rank}"] = each
        return states

    def _restore_random(self, states: Arrays, steps: int) -> None:
        end = "" if self.world.is_rank0 else f".{self.world.rank}"
        if f"cpu{end}" not in states:
            self.world.seed(self.config.seed, steps)
            return
        torch.set_rng_state(torch.from_numpy(states[f"cpu{end}"].copy()))
        if self.device.type == "cuda" and f"cuda{end}" in states:
            torch.cuda.set_rng_state(torch.from_numpy(states[f"cuda{end}"].copy()), self.device)


class StepBatches:
    """The batches of each optimizer step: this process's rows of them.

    Args:
        split: the training split.
        step: that they are for; its options give size, order and seed.

    Raises:
        CorpusError: the split is shorter than one batch.
    """

    def __init__(self, split: TokenSplit, step: TrainStep) -> None:
        config, model = step.config, step.model
        self.bptt = row_length(config.bptt, model.context_length)
        kind, rows = config.batching or model.batching, config.batch_size
        if split.marks is not None:
            step.reads_conversations, step.carries_state = True, False
        self._batches = make_batches(
            kind, split, rows, self.bptt, config.seed, share=step.world.share, longest=model.context_length
        )
        self._prefetch = Prefetch(self._batches, model) if step.device.type == "cuda" else None
        self._parts = config.gradient_accumulation
        self.steps_per_epoch = self._batches.per_epoch / self._parts
        self.tokens_per_step = rows * self.bptt * self._parts

    def batch(self, index: int) -> Batch:
        """The batch of this number, from 0."""
        return self._batches.batch(index)

    def of_step(self, number: int) -> Iterator[Batch]:
        """The batches of a step, from 0: as many as `training.gradient_accumulation`."""
        source = self._batches if self._prefetch is None else self._prefetch
        return (source.batch(index) for index in range(number * self._parts, (number + 1) * self._parts))


def _weighted(objective: Tensor, batch: Batch) -> Tensor:
    """The objective of this process's share of a batch."""
    return objective if batch.weight == 1 else objective * batch.weight


def _first_bad(losses: list[Tensor]) -> int:
    """The first loss that is not finite; waits for the device."""
    return next((n for n, loss in enumerate(losses) if not math.isfinite(float(loss))), len(losses) - 1)


def read_later(*vectors: Tensor) -> Callable[[], list[float]]:
    """Start to copy vectors of one device to the host; the function waits for them and returns all their numbers.

    The copy goes to pinned memory, so the device does not wait, and the host waits for this copy alone.
    """
    together = torch.cat([vector.float() for vector in vectors])
    copy = together.to("cpu", non_blocking=True)
    if together.device.type != "cuda":
        return copy.tolist
    event = torch.cuda.Event()
    event.record()

    def wait() -> list[float]:
        event.synchronize()
        return copy.tolist()

    return wait


def _float_dtype(state: State | None) -> str | None:
    """The dtype of a state's floats, which files hold in fp32."""
    tensors = () if state is None else state.tensors.values()
    return next((str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()), None)
