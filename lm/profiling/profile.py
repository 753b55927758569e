"""The memory and the time of training, as `lm profile` measures them.

    profile = profile_training(config, corpus)
    profile.layers, profile.memory, profile.evaluation, profile.speed, profile.logging, profile.arithmetic

Real training steps are measured, one thing after the other so that no measurement disturbs another:

1. memory of two steps, a few batches of validation and a save, with all tensors tracked (`lm.profiling.tensor_memory`);
2. time of plain steps, then of steps in which each part is timed (`lm.profiling.phases`);
3. the cost of a line of metrics;
4. arithmetic: the model's matrix products, counted by torch, and the peak that this machine reaches.

Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lm import host, machine
from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.device import Precision, deterministic, enough_memory, memory_in_use, pick_device
from lm.evaluation.perplexity import tokens_at_once
from lm.kernels.dispatch import release_buffers
from lm.profiling.phases import PHASES, REST, Listener, Part, Times, Watch
from lm.profiling.tensor_memory import Block, Kind, TensorMemory, gradients, state_tensors, timeline
from lm.profiling.trial import WARM_UP_STEPS, Trial, make_trial
from lm.runs.record import run_record
from lm.runs.run_folder import EVENTS, RunFolder
from lm.torch_private import keep_freed_memory
from lm.training.async_writer import Writer
from lm.training.callbacks import Start
from lm.training.last_checkpoint import TrainProgress, snapshot
from lm.training.metrics import MetricsInterval
from lm.training.tensorboard import TensorBoard
from lm.training.train_step import StepResult, TrainStep
from lm.training.validation import validate

FOLLOWED_STEPS = 2
EVALUATION_BATCHES = 6
LOG_INTERVALS = 1, 10, 100
MIN_STEPS = 3
IDLE_SHARE = 0.001
"""Layers below this share of the time have no row of their own, unless they have parameters or keep memory."""
COUNTED_TOKENS = 1024
"""Tokens of the rows on which arithmetic is counted: attention then keeps all scores in memory."""
Spent = dict[tuple[str, str], float]
"""Seconds by phase and part."""


@dataclass(frozen=True)
class Layer:
    """A part of the model and its own work, without inner parts; all layers together are the whole step."""

    name: str
    shape: tuple[int, ...] | None
    """Of its output."""
    parameters: int
    """Shared ones belong to their first user."""
    kept_bytes: int
    """Made here, and still held when backward begins."""
    forward_seconds: float
    backward_seconds: float
    runs_on: str
    """native, or torch."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class PhaseMemory:
    """Memory in one phase."""

    name: str
    held_bytes: int
    """Of tensors, at its end."""
    peak_bytes: int
    """Of tensors."""
    process_bytes: int | None
    """At its end: resident (on a CPU), reserved by torch (on a GPU)."""
    process_peak_bytes: int | None
    begin: float
    end: float


@dataclass(frozen=True)
class EvaluationMemory:
    """Memory during validation, which must not grow with the text."""

    tokens: int
    held_bytes: tuple[int, ...]
    """Of tensors, after each batch."""
    growth_bytes: int
    """From the second batch, which has a state first, to the one before the last, which may be short."""


@dataclass(frozen=True)
class Speed:
    """The time of a step."""

    steps: int
    step_seconds: float
    """The median of plain steps."""
    least_seconds: float
    most_seconds: float
    tokens_per_second: float
    phase_seconds: dict[str, float]
    """Of steps with each part timed, which are a little slower."""
    data_seconds: float
    """To make the batches and move them to the device."""


@dataclass(frozen=True)
class Logging:
    """The cost of a line of metrics: accuracy of the batch, waiting for the device, file, TensorBoard."""

    line_seconds: float
    share_of_time: dict[int, float]
    """By the number of steps between lines."""


@dataclass(frozen=True)
class Arithmetic:
    """Operations of the model's matrix products, forward and backward; a multiplication and an addition are two."""

    flops_per_step: float
    flops_per_token: float
    flops_per_second: float
    counted_rows: int
    """Rows of the batch that were counted; the others need the same."""
    peak_flops_per_second: dict[str, float]
    """Of square matrix products on all threads, by number format."""
    peak_threads: int
    share_of_peak: float
    """Of the peak in this training's precision."""


@dataclass(frozen=True)
class Profile:
    """All measurements."""

    model: str
    parameters: int
    vocab_size: int
    corpus: str
    batch_size: int
    bptt: int
    gradient_accumulation: int
    tokens_per_step: int
    device: str
    device_name: str
    precision: str
    threads: int
    runs_on: str
    """native kernels, torch, or the share of each."""
    layers: list[Layer]
    memory: list[PhaseMemory]
    peak_phase: str
    peak_kinds: dict[Kind, int]
    """Purposes of memory at the peak of a step."""
    evaluation: EvaluationMemory
    speed: Speed
    logging: Logging
    arithmetic: Arithmetic
    followed: list[PhaseMemory]
    """All phases with tracked memory: two steps, validation and save."""
    timeline: list[tuple[float, dict[Kind, int]]]
    """Bytes by kind after each change in that time."""

    def to_json(self) -> dict[str, Any]:
        """All but the long `followed` and `timeline`."""
        return {name: part for name, part in dataclasses.asdict(self).items() if name not in ("followed", "timeline")}


def profile_training(config: RunConfig, corpus: PreparedCorpus, *, seconds: float = 2.0) -> Profile:
    """Measure the training with these options, on a throw-away model.

    Args:
        config: of the run.
        corpus: its prepared text.
        seconds: time for plain steps; everything together takes about four times as long.

    Raises:
        ConfigError: the model is trained by counting, without steps.
        DeviceError: the memory is not enough.
    """
    with tempfile.TemporaryDirectory(prefix="inkling-profile-") as path, enough_memory():
        folder = RunFolder(Path(path) / "run")
        trial, followed = _follow(config, corpus, folder)
        step, tokens_per_step = trial.step, trial.batches.tokens_per_step
        with deterministic(step.device), keep_freed_memory():
            for _ in range(WARM_UP_STEPS):
                trial.run_step()
            plain = _time_steps(trial, seconds)
            parts, times = _time_parts(trial, seconds / 2)
            step_seconds = statistics.median(plain)
            logging = _time_logging(trial, folder, step_seconds, seconds / 2)
            data_seconds = _time_data(trial)
        arithmetic = _count_arithmetic(trial, step_seconds)
    layers = _layers(parts, times, followed.kept, [parameter.numel() for parameter in step.model.parameters()])
    line = timeline(followed.kinds(), followed.phases[0].begin, followed.phases[-1].end)
    steps = [phase for phase in followed.phases if phase.name in PHASES]
    moment, held = max((entry for entry in line if entry[0] <= steps[-1].end), key=lambda entry: sum(entry[1].values()))
    phase_seconds = {phase: sum(spent for (name, _), spent in times.items() if name == phase) for phase in PHASES}
    training = config.training
    return Profile(
        model=config.model.type, parameters=step.model.num_parameters(), vocab_size=step.model.vocab_size,
        corpus=corpus.name, batch_size=training.batch_size, bptt=trial.batches.bptt,
        gradient_accumulation=training.gradient_accumulation, tokens_per_step=tokens_per_step, device=str(step.device),
        device_name=machine.name_of(step.device), precision=str(step.mixed.format), threads=torch.get_num_threads(),
        runs_on=_runs_on(layers), layers=layers, memory=followed.shown(), followed=followed.phases,
        peak_phase=next(phase.name for phase in steps if phase.begin <= moment <= phase.end), peak_kinds=held,
        evaluation=followed.evaluation(),
        speed=Speed(
            len(plain), step_seconds, min(plain), max(plain), tokens_per_step / step_seconds, phase_seconds,
            data_seconds * training.gradient_accumulation,
        ),
        logging=logging, arithmetic=arithmetic, timeline=line,
    )  # fmt: skip


def _layers(parts: dict[str, Part], times: Spent, kept: dict[str, int], sizes: list[int]) -> list[Layer]:
    """The layers with parameters, memory or time; the little time of the others is added to `REST`, the last one."""
    layers = [
        Layer(
            name=part.name,
            shape=part.shape,
            parameters=sum(sizes[number] for number in part.parameters),
            kept_bytes=kept.get(part.name, 0),
            forward_seconds=times["forward", part.name] + times["loss", part.name],
            backward_seconds=times["backward", part.name],
            runs_on="native" if part.native else "torch",
        )
        for part in parts.values()
    ]
    least = IDLE_SHARE * sum(layer.seconds for layer in layers)
    (rest,) = (layer for layer in layers if layer.name == REST)
    busy = [layer for layer in layers if layer.parameters or layer.kept_bytes or layer.seconds > least]
    idle = [layer for layer in layers if layer not in busy and layer is not rest]
    forward = rest.forward_seconds + sum(layer.forward_seconds for layer in idle)
    backward = rest.backward_seconds + sum(layer.backward_seconds for layer in idle)
    rest_row = dataclasses.replace(rest, forward_seconds=forward, backward_seconds=backward)
    return [*(layer for layer in busy if layer is not rest), rest_row]


def _runs_on(layers: list[Layer]) -> str:
    if not any(layer.parameters and layer.runs_on == "native" for layer in layers):
        return "torch"
    native = sum(layer.seconds for layer in layers if layer.runs_on == "native")
    share = native / sum(layer.seconds for layer in layers)
    return f"native kernels ({share:.0%} of the time of forward and backward), else torch"


# -- memory ---------------------------------------------------------------------------------------------


class _Followed(Listener):
    """Stores the memory of each phase, and the purpose of each block."""

    def __init__(self, memory: TensorMemory) -> None:
        self.memory = memory
        self.device = memory.device
        self.phases: list[PhaseMemory] = []
        self.kept: dict[str, int] = {}
        """Bytes by part that were made in it, and held when the last backward began."""
        self._kinds: dict[Block, Kind] = {}
        self._phase, self._begin = "", 0.0
        self._held: list[tuple[int, int]] = []
        """Tokens scored, and bytes held then."""

    def on_made(self, step: TrainStep) -> None:
        """After a step was made: all blocks are its weights and their copies."""
        self._step = step
        self._set_kind("weights", self.memory.live())

    def on_phase(self, name: str) -> None:
        """See `Listener.on_phase`; "": nothing runs."""
        machine.wait(self.device)
        on_gpu = self.device.type == "cuda"
        if self._phase:
            peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else self.memory.peak
            process = (
                (torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_reserved(self.device))
                if on_gpu
                else (memory_in_use(self.device), host.peak_resident_bytes())
            )
            found = PhaseMemory(self._phase, self._held_now(), peak, *process, self._begin, time.perf_counter())
            self.phases.append(found)
        if name == "backward":
            self.kept = defaultdict(int)
            made = [block for block in self.memory.live() if block.owner and self._kinds.get(block, "kept") == "kept"]
            self._set_kind("kept", made)
            for block in made:
                self.kept[block.owner] += block.size
        elif name == "optimizer":
            self._set_kind("gradients", self.memory.blocks_of(gradients(self._step.model)))
        # Only blocks that a part makes in forward have an owner.
        self.memory.owner = ""
        self.memory.peak = self.memory.now
        host.reset_peak_resident()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._phase, self._begin = name, time.perf_counter()

    def on_part(self, name: str) -> None:
        """See `Listener.on_part`."""
        self.memory.owner = name if self._phase in ("forward", "loss") else ""

    def on_validation(self, done: int, total: int) -> None:
        """After a batch of validation."""
        self._held.append((done, self._held_now()))

    def kinds(self) -> list[tuple[Block, Kind]]:
        """All blocks, and the purpose of each."""
        self._set_kind("optimizer", self.memory.blocks_of(state_tensors(self._step.optimizers)))
        return [(block, self._kinds.get(block, "other")) for block in self.memory.blocks]

    def shown(self) -> list[PhaseMemory]:
        """The phases from the last step on, which has moments and buffers from its start."""
        begin = max(index for index, phase in enumerate(self.phases) if phase.name == "data")
        return [dataclasses.replace(self.phases[begin], name="start"), *self.phases[begin + 1 :]]

    def evaluation(self) -> EvaluationMemory:
        """The memory during validation."""
        held = tuple(size for _, size in self._held)
        whole = held[1:-1] or held[-1:]
        return EvaluationMemory(self._held[-1][0], held, whole[-1] - whole[0])

    def _set_kind(self, kind: Kind, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if self._kinds.get(block) != "weights":
                self._kinds[block] = kind

    def _held_now(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self.memory.now


def _follow(config: RunConfig, corpus: PreparedCorpus, folder: RunFolder) -> tuple[Trial, _Followed]:
    """A trial, and its memory over some steps, some validation and a saving in `folder`."""
    release_buffers()
    device = pick_device(config.training.device)
    followed = _Followed(TensorMemory(device))
    with followed.memory, deterministic(device), keep_freed_memory():
        trial = make_trial(config, corpus)
        followed.on_made(trial.step)
        with Watch(trial, followed, backward=False).on() as watch:
            for _ in range(FOLLOWED_STEPS):
                watch.step()
        followed.on_phase("evaluation")
        ids = corpus.splits["valid" if "valid" in corpus.splits else "train"].ids
        tokens = EVALUATION_BATCHES * tokens_at_once(trial.step.model.logits_per_target, trial.step.device)
        validate(trial.step, ids[: tokens + 1], progress=followed.on_validation)
        folder.create(run_record(config, corpus, trial.step.model, None), corpus.tokenizer)
        followed.on_phase("saving")
        # The training thread copies, and another thread writes.
        with Writer() as writer:
            writer.write(snapshot(folder, trial.step, TrainProgress(step=trial.steps_done)))
        followed.on_phase("")
    return trial, followed


# -- time -----------------------------------------------------------------------------------------------


def _turns(seconds: float, at_least: int = MIN_STEPS) -> Iterator[None]:
    """Turns until the time is over, at least `at_least` of them."""
    until, done = time.perf_counter() + seconds, 0
    while done < at_least or time.perf_counter() < until:
        yield
        done += 1


def _timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, on the device as well."""
    machine.wait(device)
    begun = time.perf_counter()
    work()
    machine.wait(device)
    return time.perf_counter() - begun


def _time_steps(trial: Trial, seconds: float) -> list[float]:
    return [_timed(trial.step.device, trial.run_step) for _ in _turns(seconds)]


def _time_parts(trial: Trial, seconds: float) -> tuple[dict[str, Part], Spent]:
    """The parts of the model, and the median time of each in each phase."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    times = Times(trial.step.device)
    with Watch(trial, times, backward=True).on() as watch:
        for _ in _turns(seconds):
            watch.step()
            for key, spent in times.take().items():
                taken[key].append(spent)
    return watch.parts, defaultdict(float, {key: statistics.median(each) for key, each in taken.items()})


def _time_logging(trial: Trial, folder: RunFolder, step_seconds: float, seconds: float) -> Logging:
    """The cost of a line of metrics: reading the accuracy after the loss, and writing the line."""
    after_loss: dict[bool, list[float]] = {True: [], False: []}
    writing = []
    step, batches, split = trial.step, trial.batches, trial.corpus.splits["train"]
    board, times = TensorBoard(folder.path / EVENTS), Times(step.device)
    start = Start(
        run=folder.name, model="", parameters=0, corpus="", step=trial.steps_done, plan_steps=1,
        tokens_per_step=batches.tokens_per_step, steps_per_epoch=1, device="", precision="",
    )  # fmt: skip
    board.on_start(start)

    def write(spent: float) -> None:
        interval = MetricsInterval(seconds=spent)
        interval.add(StepResult(loss=0.0))
        row = interval.row(trial.steps_done, 0, step, batches, split)
        folder.append_metrics(row)
        board.on_log(row)

    try:
        with Watch(trial, times, backward=False).on() as watch:
            for _ in _turns(seconds, at_least=2 * MIN_STEPS):
                for with_metrics in (True, False):
                    watch.step(with_metrics=with_metrics)
                    spent = times.take()
                    after_loss[with_metrics].append(spent["loss", REST])
                    if with_metrics:
                        begun = time.perf_counter()
                        write(sum(spent.values()))
                        writing.append(time.perf_counter() - begun)
    finally:
        board.close()
    reading = statistics.median(after_loss[True]) - statistics.median(after_loss[False])
    line = max(reading, 0.0) + statistics.median(writing)
    return Logging(line, {every: line / every / (step_seconds + line / every) for every in LOG_INTERVALS})


def _time_data(trial: Trial) -> float:
    """Seconds to make one batch and move it to the device."""
    step = trial.step

    def move(index: int) -> None:
        batch = trial.batches.batch(trial.steps_done + index)
        for array in (batch.inputs, batch.targets):
            torch.from_numpy(array).to(step.device)

    return statistics.median(_timed(step.device, functools.partial(move, index)) for index in range(20))


# -- arithmetic -----------------------------------------------------------------------------------------


def _count_arithmetic(trial: Trial, step_seconds: float) -> Arithmetic:
    step, config, bptt = trial.step, trial.step.config, trial.batches.bptt
    rows = max(1, min(config.batch_size, COUNTED_TOKENS // bptt))
    counted = count_flops(trial, rows)
    flops = counted * config.batch_size / rows * config.gradient_accumulation
    own = step.mixed.format.precision
    formats: list[Precision] = ["fp32"] if own == "fp32" else ["fp32", own]
    peaks: dict[str, float] = {name: machine.matmul_peak(step.device, name) for name in formats}
    return Arithmetic(
        flops_per_step=flops, flops_per_token=flops / trial.batches.tokens_per_step,
        flops_per_second=flops / step_seconds, counted_rows=rows, peak_flops_per_second=peaks,
        peak_threads=host.usable_threads(), share_of_peak=flops / step_seconds / peaks[own],
    )  # fmt: skip


def count_flops(trial: Trial, rows: int | None = None) -> int:
    """Operations of the matrix products of one batch, forward and backward.

    Torch counts its own operators, so the batch runs on those: without the native kernels, and without the fused cells
    and attention of oneDNN and cuDNN, which torch cannot count. Attention counts all scores, including masked ones.

    Args:
        trial: whose model and first batch are used.
        rows: the first rows of the batch; None: all.
    """
    step, batch = trial.step, trial.batches.batch(0)
    inputs, targets = (torch.from_numpy(array[:rows]).to(step.device) for array in (batch.inputs, batch.targets))
    native = os.environ.get("INKLING_NATIVE")
    os.environ["INKLING_NATIVE"] = "0"
    try:
        with (
            torch.backends.mkldnn.flags(enabled=False, allow_tf32=None),
            torch.backends.cudnn.flags(enabled=False, allow_tf32=None),
            sdpa_kernel(SDPBackend.MATH),
            step.mixed.computing(),
            FlopCounterMode(display=False) as counter,
        ):
            step.model.train()
            step.model.training_loss(inputs, targets).objective.backward()
    finally:
        step.model.zero_grad()
        if native is None:
            del os.environ["INKLING_NATIVE"]
        else:
            os.environ["INKLING_NATIVE"] = native
    return int(counter.get_total_flops())
