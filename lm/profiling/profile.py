"""Where the memory and the time of training go: what `lm profile` measures.

    profile = profile_training(config, corpus)
    profile.layers, profile.memory, profile.evaluation, profile.speed, profile.logging, profile.arithmetic

All is measured on the trainer's own steps, one thing after the other so that none stands in another's way:

1. memory, of two steps, a few batches of validation and a saving, all tensors followed (`lm.profiling.tensor_memory`);
2. time, of steps that nobody watches, then of steps in which each part is timed (`lm.profiling.phases`);
3. what a line of metrics costs;
4. arithmetic: the matrix products of the model, counted by torch, and the most that this machine computes a second.

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

from lm import machine
from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.device import Precision, deterministic, enough_memory, memory_in_use, pick_device
from lm.evaluation.perplexity import tokens_at_once
from lm.kernels.dispatch import forget_buffers
from lm.profiling.phases import PHASES, REST, Listener, Part, Times, Watch
from lm.profiling.tensor_memory import Block, Kind, TensorMemory, gradients, state_tensors, timeline
from lm.profiling.trial import WARM_UP_STEPS, Trial, make_trial
from lm.runs.record import run_record
from lm.runs.run_folder import EVENTS, RunFolder
from lm.torch_private import kept_memory
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
FEWEST_STEPS = 3
IDLE_SHARE = 0.001
Spent = dict[tuple[str, str], float]
"""Seconds by phase and part."""
COUNTED_TOKENS = 1024
"""Arithmetic is counted on rows of about so many tokens: attention as it can be counted keeps all scores."""


@dataclass(frozen=True)
class Layer:
    """A part of the model and its own work, without that of the parts inside it; together they are the whole step."""

    name: str
    shape: tuple[int, ...] | None
    """Of its output."""
    parameters: int
    """Numbers that are trained; those that are shared stand where they are used first."""
    kept_bytes: int
    """Made here, and still held when backward begins."""
    forward_seconds: float
    backward_seconds: float
    runs_on: str
    """native, or torch."""


@dataclass(frozen=True)
class PhaseMemory:
    """Memory in one phase."""

    name: str
    held_bytes: int
    """By tensors, at its end."""
    peak_bytes: int
    """By tensors, the most within it."""
    process_bytes: int | None
    """At its end: resident (on a CPU), reserved by torch (on a GPU)."""
    process_peak_bytes: int | None
    """The most of it within the phase."""
    begin: float
    end: float


@dataclass(frozen=True)
class EvaluationMemory:
    """Memory while validating, which must not grow with the text."""

    tokens: int
    held_bytes: tuple[int, ...]
    """By tensors, after each batch."""
    growth_bytes: int
    """From the second batch, where the first state is there, to the one before the last, which may be a shorter one."""


@dataclass(frozen=True)
class Speed:
    """How long a step takes."""

    steps: int
    step_seconds: float
    """The median of steps that nobody watched."""
    least_seconds: float
    most_seconds: float
    tokens_per_second: float
    phase_seconds: dict[str, float]
    """Of steps with each part timed, which are a little slower."""
    data_seconds: float
    """To make a batch and to bring it to the device."""


@dataclass(frozen=True)
class Logging:
    """What a line of metrics costs: accuracy of the batch, waiting for the device, the file, TensorBoard."""

    line_seconds: float
    share_of_time: dict[int, float]
    """By the steps from one line to the next."""


@dataclass(frozen=True)
class Arithmetic:
    """Operations of the model's matrix products, forward and backward; a multiplication and an addition are two."""

    flops_per_step: float
    flops_per_token: float
    flops_per_second: float
    counted_rows: int
    """Rows of a batch that were counted; the others are taken to be like them."""
    peak_flops_per_second: dict[str, float]
    """The most that square matrix products reach here on all threads, by number format."""
    peak_threads: int
    share_of_peak: float
    """Of the peak in the precision of this training."""


@dataclass(frozen=True)
class Profile:
    """All that was measured."""

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
    """What does the work: native kernels, torch, or which part each."""
    layers: list[Layer]
    memory: list[PhaseMemory]
    peak_phase: str
    peak_kinds: dict[Kind, int]
    """What memory is for where a step takes most of it."""
    evaluation: EvaluationMemory
    speed: Speed
    logging: Logging
    arithmetic: Arithmetic
    followed: list[PhaseMemory]
    """All phases while memory was followed: of two steps, validation and saving."""
    timeline: list[tuple[float, dict[Kind, int]]]
    """Bytes by kind after each change in that time."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the course of memory, which is long."""
        return {name: part for name, part in dataclasses.asdict(self).items() if name not in ("followed", "timeline")}


def profile_training(config: RunConfig, corpus: PreparedCorpus, *, seconds: float = 2.0) -> Profile:
    """Measure the training that these options give, on a model that is thrown away.

    Args:
        config: of the run.
        corpus: its prepared text.
        seconds: how long plain steps are measured, about; everything together takes some four times as long.

    Raises:
        ConfigError: the model is trained by counting, without steps.
        DeviceError: the memory is not enough.
    """
    with tempfile.TemporaryDirectory(prefix="inkling-profile-") as path, enough_memory():
        folder = RunFolder(Path(path) / "run")
        trial, followed = _follow(config, corpus, folder)
        step = trial.step
        with deterministic(step.device), kept_memory():
            for _ in range(WARM_UP_STEPS):
                trial.run_step()
            plain = _time_steps(trial, seconds)
            parts, times = _time_parts(trial, seconds / 2)
            step_seconds = statistics.median(plain)
            logging = _time_logging(trial, folder, step_seconds, seconds / 2)
            data_seconds = _time_data(trial)
        arithmetic = _count_arithmetic(trial, step_seconds)
    sizes = [parameter.numel() for parameter in step.model.parameters()]
    layers = [
        Layer(
            name=part.name,
            shape=part.shape,
            parameters=sum(sizes[number] for number in part.parameters),
            kept_bytes=followed.kept.get(part.name, 0),
            forward_seconds=times["forward", part.name] + times["loss", part.name],
            backward_seconds=times["backward", part.name],
            runs_on="native" if part.native else "torch",
        )
        for part in sorted(parts.values(), key=lambda part: part.name == REST)
    ]
    layers = _without_idle(layers)
    line = timeline(followed.kinds(), followed.phases[0].begin, followed.phases[-1].end)
    steps = [phase for phase in followed.phases if phase.name in PHASES]
    moment, held = max((entry for entry in line if entry[0] <= steps[-1].end), key=lambda entry: sum(entry[1].values()))
    return Profile(
        model=config.model.type,
        parameters=step.model.num_parameters(),
        vocab_size=step.model.vocab_size,
        corpus=corpus.name,
        batch_size=config.training.batch_size,
        bptt=trial.batches.bptt,
        gradient_accumulation=config.training.gradient_accumulation,
        tokens_per_step=trial.batches.tokens_per_step,
        device=str(step.device),
        device_name=machine.name_of(step.device),
        precision=str(step.mixed.format),
        threads=torch.get_num_threads(),
        runs_on=_runs_on(layers),
        layers=layers,
        memory=followed.shown(),
        followed=followed.phases,
        peak_phase=next(phase.name for phase in steps if phase.begin <= moment <= phase.end),
        peak_kinds=held,
        evaluation=followed.evaluation(),
        speed=Speed(
            steps=len(plain),
            step_seconds=step_seconds,
            least_seconds=min(plain),
            most_seconds=max(plain),
            tokens_per_second=trial.batches.tokens_per_step / step_seconds,
            phase_seconds={
                phase: sum(spent for (name, _), spent in times.items() if name == phase) for phase in PHASES
            },
            data_seconds=data_seconds * config.training.gradient_accumulation,
        ),
        logging=logging,
        arithmetic=arithmetic,
        timeline=line,
    )


def _without_idle(layers: list[Layer]) -> list[Layer]:
    """The layers that do something; what little the others take goes to the work between the parts, which is last."""
    whole = sum(layer.forward_seconds + layer.backward_seconds for layer in layers)
    shown, rest = [], layers[-1]
    for layer in layers[:-1]:
        spent = layer.forward_seconds + layer.backward_seconds
        if layer.parameters or layer.kept_bytes or spent > IDLE_SHARE * whole:
            shown.append(layer)
        else:
            rest = dataclasses.replace(
                rest,
                forward_seconds=rest.forward_seconds + layer.forward_seconds,
                backward_seconds=rest.backward_seconds + layer.backward_seconds,
            )
    return [*shown, rest]


def _runs_on(layers: list[Layer]) -> str:
    by_path: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer.parameters:
            by_path[layer.runs_on].append(layer.name)
    if "native" not in by_path:
        return "torch"
    busy = sum(layer.forward_seconds + layer.backward_seconds for layer in layers)
    ours = sum(layer.forward_seconds + layer.backward_seconds for layer in layers if layer.runs_on == "native")
    return f"native kernels ({ours / busy:.0%} of the time of forward and backward), else torch"


# -- memory ---------------------------------------------------------------------------------------------


class _Followed(Listener):
    """Notes the memory of each phase, and what each block was for."""

    def __init__(self, memory: TensorMemory) -> None:
        self.memory = memory
        self.device = memory.device
        self.step: TrainStep | None = None
        self.phases: list[PhaseMemory] = []
        self.kept: dict[str, int] = {}
        """Bytes that each part had made and that were held as the last backward began."""
        self._kinds: dict[Block, Kind] = {}
        self._phase, self._begin = "", 0.0
        self._held: list[tuple[int, int]] = []
        """While validating: tokens done, and bytes held then."""

    def on_phase(self, name: str) -> None:
        """See `Listener.on_phase`; no name: nothing runs."""
        machine.wait(self.device)
        if self._phase:
            now, peak = self._held_now(), self.memory.peak
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
            self.phases.append(PhaseMemory(self._phase, now, peak, *self._process(), self._begin, time.perf_counter()))
        match name:
            case "backward":
                self._note_kept()
            case "optimizer":
                assert self.step is not None
                self._note("gradients", self.memory.blocks_of(gradients(self.step.model)))
        # What a part makes on its way forward is that part's, and nothing else is.
        self.memory.owner = ""
        self.memory.peak = self.memory.now
        machine.reset_peak_resident()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._phase, self._begin = name, time.perf_counter()

    def on_part(self, name: str) -> None:
        """See `Listener.on_part`."""
        self.memory.owner = name if self._phase in ("forward", "loss") else ""

    def on_validation(self, done: int, total: int) -> None:
        """See `Callback.on_validation`."""
        self._held.append((done, self._held_now()))

    def on_made(self, step: TrainStep) -> None:
        """A trainer was made: what is there now are its weights, and copies of them."""
        self.step = step
        self._note("weights", self.memory.live())

    def kinds(self) -> list[tuple[Block, Kind]]:
        """All blocks there have been, and what each was for."""
        assert self.step is not None
        self._note("optimizer", self.memory.blocks_of(state_tensors(self.step.optimizers)))
        return [(block, self._kinds.get(block, "other")) for block in self.memory.blocks]

    def shown(self) -> list[PhaseMemory]:
        """The phases of the last step, in which moments and buffers are there from the start, and what came after."""
        begin = max(place for place, phase in enumerate(self.phases) if phase.name == "data")
        return [dataclasses.replace(self.phases[begin], name="start"), *self.phases[begin + 1 :]]

    def evaluation(self) -> EvaluationMemory:
        """What was noted while validating."""
        held = tuple(size for _, size in self._held)
        whole = held[1:-1] or held[-1:]
        return EvaluationMemory(self._held[-1][0], held, whole[-1] - whole[0])

    def _note(self, kind: Kind, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if self._kinds.get(block) != "weights":
                self._kinds[block] = kind

    def _note_kept(self) -> None:
        self.kept = defaultdict(int)
        made = [block for block in self.memory.live() if block.owner and self._kinds.get(block, "kept") == "kept"]
        self._note("kept", made)
        for block in made:
            self.kept[block.owner] += block.size

    def _held_now(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self.memory.now

    def _process(self) -> tuple[int | None, int | None]:
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_reserved(self.device)
        return memory_in_use(self.device), machine.peak_resident_bytes()


def _follow(config: RunConfig, corpus: PreparedCorpus, folder: RunFolder) -> tuple[Trial, _Followed]:
    """A trial, and its memory over some steps, some validation and a saving in `folder`."""
    forget_buffers()
    device = pick_device(config.training.device)
    followed = _Followed(TensorMemory(device))
    with followed.memory, deterministic(device), kept_memory():
        trial = make_trial(config, corpus)
        followed.on_made(trial.step)
        with Watch(trial, followed, backward=False).on() as watch:
            for _ in range(FOLLOWED_STEPS):
                watch.step()
        followed.on_phase("evaluation")
        ids = corpus.splits["valid" if "valid" in corpus.splits else "train"].ids
        tokens = EVALUATION_BATCHES * tokens_at_once(trial.step.model.vocab_size)
        validate(trial.step, ids[: tokens + 1], progress=followed.on_validation)
        folder.create(run_record(config, corpus, trial.step.model, None), corpus.tokenizer)
        followed.on_phase("saving")
        # The training thread copies, and another thread writes.
        with Writer() as writer:
            writer.write(snapshot(folder, trial.step, TrainProgress(step=trial.steps_done)))
        followed.on_phase("")
    return trial, followed


# -- time -----------------------------------------------------------------------------------------------


def _turns(seconds: float, fewest: int = FEWEST_STEPS) -> Iterator[None]:
    """Turns until the time is over, at least `fewest`."""
    until, done = time.perf_counter() + seconds, 0
    while done < fewest or time.perf_counter() < until:
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
    board.on_start(
        Start(
            run=folder.name,
            model="",
            parameters=0,
            corpus="",
            step=trial.steps_done,
            plan_steps=1,
            tokens_per_step=batches.tokens_per_step,
            steps_per_epoch=1,
            device="",
            precision="",
        )  # fmt: skip
    )

    def write(spent: float) -> None:
        interval = MetricsInterval()
        interval.add(StepResult(loss=0.0), spent)
        row = interval.row(trial.steps_done, 0, step, batches, split)
        folder.append_metrics(row)
        board.on_log(row)

    try:
        with Watch(trial, times, backward=False).on() as watch:
            for _ in _turns(seconds, fewest=2 * FEWEST_STEPS):
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
        flops_per_step=flops,
        flops_per_token=flops / trial.batches.tokens_per_step,
        flops_per_second=flops / step_seconds,
        counted_rows=rows,
        peak_flops_per_second=peaks,
        peak_threads=machine.usable_threads(),
        share_of_peak=flops / step_seconds / peaks[own],
    )


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
