"""Whether a model and its batch fit in memory, estimated in seconds before any long work.

    fit = estimate(config, corpus)
    fit.fits, fit.needed_bytes, fit.largest_batch, fit.advice()

Steps run on one row of the batch, two, four, …, for about a second or until half of the free memory would be needed,
and every tensor is tracked. The need of the whole batch is a straight line through the last two sizes, because a row's
memory is the same in each row. If the whole batch was reached, its need is measured. Validation counts if it needs
more, and so do the copies that are saved during training. Counts of the text are estimated, not made. Allocations
beyond the free memory are stopped before anything is written to them.

A step of a large model takes long. If it is made of equal blocks, models with one and with two of them are measured,
and the need of all blocks is a straight line through both.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from lm import machine
from lm.config import RunConfig, TrainingConfig
from lm.corpora import PreparedCorpus
from lm.device import pick_device
from lm.errors import DeviceError
from lm.evaluation.perplexity import tokens_at_once
from lm.kernels.dispatch import release_buffers
from lm.models.base import LanguageModel
from lm.models.lora import trainable_model
from lm.profiling.phases import Listener, Watch
from lm.profiling.tensor_memory import TensorMemory, TooMuchMemory, state_tensors
from lm.profiling.trial import Trial, make_trial
from lm.training.module_needs import module_needs, trainable_on_meta
from lm.training.validation import VALIDATION_ROWS, validate

USABLE_SHARE = 0.9
"""Share of the free memory that tensors may use: allocators round up, and kernels need some."""
TRIED_SHARE = 0.5
"""Largest share of the free memory that a measurement may use."""
REPORT_COPIES = 5
"""Copies of the weights while a fine-tuning is reported: of the training, and of the file and the model of the run and
of its base. It is more than the steps need if the weights are frozen."""
SECONDS = 1.5
"""Time for measurements of larger batches."""
MIN_FIRST_ROW, MAX_FIRST_ROW = 64, 512
"""Tokens of the first row that is measured; a longer one is cut."""
FIRST_WORK = 5e9
"""Most tokens of that row, times parameters: with 100 million parameters 512 tokens would take many seconds."""


LARGE_MODEL = 1e7
"""Parameters above which one block and two are measured in place of all."""


@dataclass(frozen=True)
class Fit:
    """The memory that training needs, and that there is; bytes of tensors."""

    device: str
    batch_size: int
    bptt: int
    parameters: int
    state_bytes: int
    """For weights, gradients and moments, with any batch."""
    row_bytes: int | None
    """For each row of the batch; None if nothing was measured."""
    step_bytes: int | None
    evaluation_bytes: int | None
    saving_bytes: int | None
    """On the host, for copies of weights and moments that are written during training."""
    needed_bytes: int
    """The peak on the device, of all of it."""
    available_bytes: int | None
    tried_rows: int
    """Rows of the largest batch that was measured."""
    seconds: float
    counting_bytes: int = 0
    """On the host, to count the training text; part of the peak if the device is the CPU."""

    @property
    def fits(self) -> bool:
        """Whether the memory is enough; true if the free memory is unknown."""
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes * USABLE_SHARE

    @property
    def largest_batch(self) -> int | None:
        """Rows that would fit in a step; None if not even one does, or nothing was measured."""
        if self.available_bytes is None or not self.row_bytes or self.step_bytes is None:
            return None
        saving = self.needed_bytes - max(self.step_bytes, self.evaluation_bytes or 0)
        fixed = self.step_bytes + saving - self.batch_size * self.row_bytes
        return max(0, int((self.available_bytes * USABLE_SHARE - fixed) // self.row_bytes)) or None

    def advice(self) -> str:
        """A sentence for a training that does not fit: its need, and the options to lower."""
        assert self.available_bytes is not None
        head = (
            f"A batch of {self.batch_size:,} rows of {self.bptt:,} tokens and a model of {self.parameters:,} "
            f"parameters need about {gigabytes(self.needed_bytes)} on {self.device}, where "
            f"{gigabytes(self.available_bytes)} are free: "
        )
        rows = self.largest_batch
        if rows is not None and rows < self.batch_size:
            parts = -(-self.batch_size // rows)
            return head + (
                f"lower training.batch_size to {self.batch_size // parts} and raise training.gradient_accumulation "
                f"{parts}-fold, which trains the same way, or lower training.bptt or model.hidden_size."
            )
        if self.counting_bytes > self.available_bytes * USABLE_SHARE / 2:
            return head + f"counts of the text alone need {gigabytes(self.counting_bytes)}. Lower model.max_tokens."
        return head + (
            f"weights, gradients and moments alone need {gigabytes(self.state_bytes)}. Lower model.hidden_size or "
            "model.num_layers, or use a device with more memory."
        )


def gigabytes(size: float) -> str:
    """1234567890 → 1.23 GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def estimate(config: RunConfig, corpus: PreparedCorpus, *, seconds: float = SECONDS) -> Fit:
    """The memory that training with these options needs.

    Args:
        config: of the run.
        corpus: its prepared text.
        seconds: time for measurements of larger batches; 0: only one row and two.

    Raises:
        ConfigError: the model is trained by counting.
    """
    begun = time.perf_counter()
    device = pick_device(config.training.device)
    available = machine.available_bytes(device)
    model = trainable_on_meta(config, corpus.tokenizer.vocab_size)
    least = _min_state_bytes(model, config.training, device)
    release_buffers()
    memory = TensorMemory(device, limit=available and available * USABLE_SHARE)
    try:
        if memory.limit is not None and least > memory.limit:
            raise TooMuchMemory
        counting = model.fit_bytes(np.asarray(corpus.splits["train"].ids))
        with memory:
            need = _need(config, corpus, model, memory, available, seconds)
        fit = _fit(need, config, model, device, available, begun)
        on_cpu = counting if device.type == "cpu" else 0
        return replace(fit, counting_bytes=counting, needed_bytes=fit.needed_bytes + on_cpu)
    except TooMuchMemory:
        # Not even one row of the batch fits.
        return Fit(
            device=str(device), batch_size=config.training.batch_size, bptt=config.row_length,
            parameters=model.num_parameters(), state_bytes=least, row_bytes=None, step_bytes=None,
            evaluation_bytes=None, saving_bytes=None, needed_bytes=max(least, memory.peak),
            available_bytes=available, tried_rows=0, seconds=time.perf_counter() - begun,
        )  # fmt: skip
    finally:
        release_buffers()


def refuse_large_model(config: RunConfig, vocab_size: int) -> None:
    """Refuse a model whose weights, gradients and moments alone need more than the free memory; nothing is allocated.

    Args:
        config: of the run.
        vocab_size: of its tokenizer.

    Raises:
        DeviceError: they do not fit; the message has the figures.
    """
    device = pick_device(config.training.device)
    available = machine.available_bytes(device)
    model = trainable_on_meta(config, vocab_size)
    least = _min_state_bytes(model, config.training, device)
    if available is None or least <= available * USABLE_SHARE:
        return
    adapters = config.training.lora is not None
    what = "Its frozen weights and the adapters" if adapters else "Its weights, gradients and moments"
    advice = "" if adapters else ", or train adapters alone: --lora 8"
    raise DeviceError(
        f"The model has {model.num_parameters():,} parameters. {what} alone need {gigabytes(least)} on {device}, where "
        f"{gigabytes(available)} are free: use a device with more memory{advice}."
    )


def refuse_what_cannot_fit(config: RunConfig, corpus: PreparedCorpus) -> int:
    """A quick estimate before training; if it does not fit, a more exact one.

    Returns:
        Bytes of tensors that training needs at its peak.

    Raises:
        DeviceError: model and batch do not fit; the message names the options to lower.
    """
    fit = estimate(config, corpus, seconds=0)
    if not fit.fits:
        fit = estimate(config, corpus)
    if not fit.fits:
        raise DeviceError(fit.advice())
    return fit.needed_bytes


def _min_state_bytes(model: LanguageModel, training: TrainingConfig, device: torch.device) -> int:
    """Bytes of the weights, gradients and moments, at least.

    Frozen weights have neither gradients nor moments. Context tables have small moments, and on a CPU small gradients.
    """
    tables = 1 if device.type == "cpu" else 2
    total = 0
    for weight, need in module_needs(model).items():
        one_moment = training.optimizer == "sgd" or (training.optimizer == "muon" and need.optimizer_kind == "muon")
        copies = tables if need.optimizer_kind == "row_adagrad" else 3 if one_moment else 4
        total += weight.nbytes * (copies if weight.requires_grad else 1)
    return total // 2 if training.amp == "O3" else total


Peaks = dict[str, int]
"""The peak of memory in each phase of a measurement."""


class _Peaks(Listener):
    def __init__(self, memory: TensorMemory) -> None:
        self.found: Peaks = {}
        self._memory, self._phase = memory, ""

    def on_phase(self, name: str) -> None:
        if self._phase:
            self.found[self._phase] = max(self._memory.peak, self.found.get(self._phase, 0))
        self._memory.peak = self._memory.now
        self._phase = name


@dataclass(frozen=True)
class Line:
    """Bytes as a straight line over tokens."""

    fixed: float
    """Without any token."""
    per_token: float

    def at(self, tokens: int) -> float:
        """Bytes with so many tokens."""
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class Need:
    """The measured need of a model."""

    step: dict[str, Line]
    """Of each phase of a step."""
    evaluation: Line
    saved_bytes: float
    """Weights and moments that are saved during training."""
    tried: int
    """Tokens of the largest batch that was measured."""

    def with_blocks(self, two: Need, blocks: int) -> Need:
        """The need with so many blocks, where this is that with one, and `two` that with two."""

        def along(one: float, other: float) -> float:
            return one + (other - one) * (blocks - 1)

        def line(one: Line, other: Line) -> Line:
            return Line(along(one.fixed, other.fixed), along(one.per_token, other.per_token))

        return Need(
            {phase: line(one, two.step[phase]) for phase, one in self.step.items()},
            line(self.evaluation, two.evaluation),
            along(self.saved_bytes, two.saved_bytes),
            min(self.tried, two.tried),
        )


def _need(
    config: RunConfig,
    corpus: PreparedCorpus,
    model: LanguageModel,
    memory: TensorMemory,
    available: int | None,
    seconds: float,
) -> Need:
    """The need of a model that is on the meta device, from steps of that model, or of two with fewer blocks."""

    def measured(options: RunConfig) -> Need:
        # Without its counts, a model that counts as well needs the same memory for its steps.
        fresh = trainable_model(options, corpus.tokenizer.vocab_size)
        need = _measured(make_trial(options, corpus, model=fresh), memory, available, seconds)
        # A module with another `forward` is a cycle of references: it must not count in the next measurement.
        del fresh
        gc.collect()
        release_buffers()
        return need

    if model.equal_blocks is None or model.num_parameters() < LARGE_MODEL:
        return measured(config)
    option, _ = model.equal_blocks
    blocks = config.model.model_dump()[option]
    names = (*config.training.fp32_modules, *config.training.lora_modules)
    # A block that is named may not be among the first two, and differs from the others.
    by_block = any(part.isdigit() for name in names for part in name.split("."))
    if by_block or blocks <= 2:
        return measured(config)
    few = (
        config.model_copy(update={"model": config.model.model_copy(update={option: count})}) for count in (1, 2)
    )  # fmt: skip
    one, two = (measured(options) for options in few)
    return one.with_blocks(two, blocks)


def _fit(
    need: Need,
    config: RunConfig,
    model: LanguageModel,
    device: torch.device,
    available: int | None,
    begun: float,
) -> Fit:
    """The estimate from the need of a model, which is on the meta device."""
    rows, length = config.training.batch_size, config.row_length
    most = max(need.step.values(), key=lambda line: line.at(rows * length))
    step_bytes = int(most.at(rows * length))
    evaluation_bytes = int(need.evaluation.at(_evaluated_at_once(model, device)))
    saving_bytes = int(2 * need.saved_bytes)
    scoring_bytes = need.evaluation.per_token * _evaluated_at_once(model, device)
    reporting_bytes = int(REPORT_COPIES * sum(weight.nbytes for weight in model.parameters()) + scoring_bytes)
    peak = max(step_bytes, evaluation_bytes)
    return Fit(
        device=str(device), batch_size=rows, bptt=length, parameters=model.num_parameters(),
        state_bytes=int(most.fixed), row_bytes=math.ceil(most.per_token) * length, step_bytes=step_bytes,
        evaluation_bytes=evaluation_bytes, saving_bytes=saving_bytes,
        needed_bytes=max(peak + saving_bytes, reporting_bytes) if device.type == "cpu" else peak,
        available_bytes=available, tried_rows=need.tried // length, seconds=time.perf_counter() - begun,
    )  # fmt: skip


def _evaluated_at_once(model: LanguageModel, device: torch.device) -> int:
    """Tokens that run through the model together in an evaluation: a window is whole, however many logits it has."""
    return max(model.context_length or 0, tokens_at_once(model.logits_per_target, device))


def _measured(trial: Trial, memory: TensorMemory, available: int | None, seconds: float) -> Need:
    """The need from steps and validations of rising size."""
    step, length, splits = trial.step, trial.batches.bptt, trial.corpus.splits
    model, all_rows = step.model, step.config.batch_size
    window = model.context_length or 0
    ids = splits["valid" if "valid" in splits else "train"].ids

    def train(tokens: int) -> Peaks:
        peaks = _Peaks(memory)
        with (
            trial.smaller_batches(max(1, tokens // length), min(tokens, length)),
            Watch(trial, peaks, backward=False).on() as watch,
        ):
            # In the first step of a larger batch the kernels replace their buffers by larger ones.
            watch.step()
            peaks.found.clear()
            watch.step()
        return peaks.found

    def evaluate(tokens: int) -> Peaks:
        memory.peak = memory.now
        # A text of up to one window is read whole; of a longer one, a first window is read separately.
        first = window if tokens > window else 0
        validate(step, ids[: tokens + first + 1])
        return {"evaluation": memory.peak}

    most = min(MAX_FIRST_ROW, max(MIN_FIRST_ROW, FIRST_WORK / model.num_parameters()))
    shortest = _halved(length, most)
    sizes = [*_doubled(shortest, length), *(rows * length for rows in list(_doubled(1, all_rows))[1:])]
    begun = time.perf_counter()
    # The first step, which is not measured, makes the moments that all later ones have.
    first = train(sizes[0])
    token_seconds = (time.perf_counter() - begun) / sizes[0]
    lines, tried = _lines(train, sizes, memory, available, seconds, first=(first, token_seconds))
    largest = _evaluated_at_once(model, step.device)
    sizes = list(_doubled(_halved(window, most) if window else 8 * VALIDATION_ROWS, largest))
    evaluation, _ = _lines(evaluate, sizes, memory, available, seconds / 2)
    saved = memory.blocks_of([*model.saved_tensors().values(), *state_tensors(step.optimizers)])
    return Need(lines, evaluation["evaluation"], sum(block.size for block in saved), tried)


def _lines(
    measure: Callable[[int], Peaks],
    sizes: list[int],
    memory: TensorMemory,
    available: int | None,
    seconds: float,
    *,
    first: tuple[Peaks, float] | None = None,
) -> tuple[dict[str, Line], int]:
    """The bytes of each phase, from the last two sizes that were measured, and the largest size that was.

    Args:
        measure: gives the peaks of a number of tokens.
        sizes: rising numbers of tokens.
        memory: that is measured.
        available: bytes.
        seconds: for more than two sizes.
        first: the peaks of the first size and the seconds of each of its tokens, if they are measured already.
    """
    until, held, token_seconds = time.perf_counter() + seconds, memory.now, 0.0
    points: list[tuple[int, Peaks]] = []
    if first is not None:
        peaks, token_seconds = first
        points, sizes = [(sizes[0], peaks)], sizes[1:]
    for size in sizes:
        if points:
            growth = max(points[-1][1].values()) * size / points[-1][0]
            too_much = available is not None and growth > available * TRIED_SHARE
            if too_much or (len(points) > 1 and time.perf_counter() + token_seconds * size > until):
                break
        started = time.perf_counter()
        points.append((size, measure(size)))
        token_seconds = (time.perf_counter() - started) / size
    (last, peaks), (before, others) = points[-1], points[-2] if len(points) > 1 else (0, {})
    lines = {}
    for phase, peak in peaks.items():
        growth = max(0.0, (peak - others.get(phase, held)) / (last - before))
        lines[phase] = Line(peak - growth * last, growth)
    return lines, last


def _halved(size: int, most: float) -> int:
    """size, or its first half, quarter, … that is not above `most`."""
    while size > most:
        size //= 2
    return size


def _doubled(first: int, last: int) -> Iterator[int]:
    """first, twice that, …, last."""
    while first < last:
        yield first
        first *= 2
    yield last
