"""Whether a model and its batch fit in the memory there is: said in seconds, before any long work.

    fit = estimate(config, corpus)
    fit.fits, fit.needed_bytes, fit.largest_batch, fit.advice()

Steps are run on one row of the batch, two, four, …, every tensor followed, for a second or so or until half of the
memory would be taken; what a step of the whole batch takes is a straight line through the last two of them, since all
that grows with the batch is kept once a row. Where the whole batch was reached, it is what was measured. Validation
counts where it takes more, and so do the copies that are saved while training goes on. What goes beyond the free memory
is stopped before it is written to, so that nothing is ever short of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lm import machine
from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.device import pick_device
from lm.errors import DeviceError
from lm.evaluation.perplexity import tokens_at_once
from lm.kernels.dispatch import forget_buffers
from lm.models.base import LanguageModel
from lm.profiling.phases import Listener, Watch
from lm.profiling.tensor_memory import TensorMemory, TooMuchMemory, state_tensors
from lm.profiling.trial import Trial, make_trial
from lm.training.module_needs import build_on_meta, module_needs
from lm.training.plan import bptt_of
from lm.training.validation import VALIDATION_ROWS, validate

USABLE_SHARE = 0.9
"""Of the memory that is free: allocators round up and leave gaps, and kernels take some for themselves."""
TRIED_SHARE = 0.5
"""Nothing is tried that would take more of the free memory than this."""
SECONDS = 1.5
"""Trials of larger batches end after this."""
SHORTEST_ROW = 512
"""Of longer rows, a part is tried first."""


@dataclass(frozen=True)
class Fit:
    """What training would take, and what there is; bytes of tensors."""

    device: str
    batch_size: int
    bptt: int
    parameters: int
    state_bytes: int
    """Whatever the batch: weights, gradients, moments."""
    row_bytes: int | None
    """What each row of the batch adds; None where nothing was tried."""
    step_bytes: int | None
    evaluation_bytes: int | None
    saving_bytes: int | None
    """Copies of weights and moments that are written while training goes on, packed ones included; on the host."""
    needed_bytes: int
    """On the device, of all together where it is most."""
    available_bytes: int | None
    tried_rows: int
    """Rows of the largest batch that was really run."""
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether there is memory enough; true where it is not known how much there is."""
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes * USABLE_SHARE

    @property
    def largest_batch(self) -> int | None:
        """Rows that would fit, as far as a step goes; None where not even one does, or nothing is known."""
        if self.available_bytes is None or not self.row_bytes or self.step_bytes is None:
            return None
        beside = self.needed_bytes - max(self.step_bytes, self.evaluation_bytes or 0)
        fixed = self.step_bytes + beside - self.batch_size * self.row_bytes
        return max(0, int((self.available_bytes * USABLE_SHARE - fixed) // self.row_bytes)) or None

    def advice(self) -> str:
        """What does not fit, and what to lower so that it does.

        Only where it does not fit.
        """
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
                f"{parts}-fold, which learns the same, or lower training.bptt or model.hidden_size."
            )
        return head + (
            f"weights, gradients and moments alone take {gigabytes(self.state_bytes)}. Lower model.hidden_size or "
            "model.num_layers, or use a device with more memory."
        )


def gigabytes(size: float) -> str:
    """1234567890 → 1.23 GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def estimate(config: RunConfig, corpus: PreparedCorpus, *, seconds: float = SECONDS) -> Fit:
    """What training with these options would take.

    Args:
        config: of the run.
        corpus: its prepared text.
        seconds: how long larger and larger batches are tried; 0 tries one row and two.

    Raises:
        ConfigError: the model is trained by counting.
    """
    begun = time.perf_counter()
    device = pick_device(config.training.device)
    available = machine.available_bytes(device)
    model = build_on_meta(config.model, corpus.tokenizer.vocab_size)
    least = _least_state_bytes(model, low=config.training.amp == "O3")
    forget_buffers()
    memory = TensorMemory(device, limit=available and available * USABLE_SHARE)
    try:
        if memory.limit is not None and least > memory.limit:
            raise TooMuchMemory
        with memory:
            return _Sizes(make_trial(config, corpus), memory, available).fit(seconds, begun)
    except TooMuchMemory:
        # Not even one row of the batch.
        return Fit(
            device=str(device),
            batch_size=config.training.batch_size,
            bptt=bptt_of(config),
            parameters=model.num_parameters(),
            state_bytes=least,
            row_bytes=None,
            step_bytes=None,
            evaluation_bytes=None,
            saving_bytes=None,
            needed_bytes=max(least, memory.peak),
            available_bytes=available,
            tried_rows=0,
            seconds=time.perf_counter() - begun,
        )
    finally:
        forget_buffers()


def _least_state_bytes(model: LanguageModel, *, low: bool) -> int:
    """Weights, and for those whose gradients are not of a few rows alone, a gradient and at least one moment."""
    needs = module_needs(model)
    whole = sum(weight.nbytes * (1 if need.optimizer_kind == "row_adagrad" else 3) for weight, need in needs.items())
    return whole // 2 if low else whole


def refuse_what_cannot_fit(config: RunConfig, corpus: PreparedCorpus) -> int:
    """A quick look at one row and two, made before training; a closer one where that says no.

    Returns:
        Bytes of tensors that are expected to be needed at most.

    Raises:
        DeviceError: model and batch do not fit; the sentence says what to lower.
    """
    fit = estimate(config, corpus, seconds=0)
    if not fit.fits:
        fit = estimate(config, corpus)
    if not fit.fits:
        raise DeviceError(fit.advice())
    return fit.needed_bytes


Peaks = dict[str, int]
"""The most memory in each phase of something that was tried."""


class _Peaks(Listener):
    def __init__(self, memory: TensorMemory) -> None:
        self.found: Peaks = {}
        self._memory, self._phase = memory, ""

    def on_phase(self, name: str) -> None:
        if self._phase:
            self.found[self._phase] = max(self._memory.peak, self.found.get(self._phase, 0))
        self._memory.peak = self._memory.now
        self._phase = name


class _Sizes:
    """Steps and validations of rising size, with their peaks."""

    def __init__(self, trial: Trial, memory: TensorMemory, available: int | None) -> None:
        self.trial, self.memory, self.available = trial, memory, available
        self.rows = trial.step.config.batch_size
        self.time = trial.batches.bptt

    def fit(self, seconds: float, begun: float) -> Fit:
        step = self.trial.step
        sizes = list(self._batches())
        # The moments are made in the first step, and are there in all later ones.
        self._step(sizes[0])
        fixed, a_token, tried = self._grown(self._step, sizes, seconds)
        step_bytes = fixed + a_token * self.rows * self.time
        lengths = list(_doubled(self._fewest_tokens(), tokens_at_once(step.model.vocab_size)))
        begin, slope, _ = self._grown(self._validate, lengths, seconds / 2)
        evaluation_bytes = begin + slope * lengths[-1]
        kept = [*step.model.parameters(), *state_tensors(step.optimizers)]
        saving_bytes = 2 * sum(block.size for block in self.memory.blocks_of(kept))
        on_cpu = step.device.type == "cpu"
        return Fit(
            device=str(step.device),
            batch_size=self.rows,
            bptt=self.time,
            parameters=step.model.num_parameters(),
            state_bytes=fixed,
            row_bytes=a_token * self.time,
            step_bytes=step_bytes,
            evaluation_bytes=evaluation_bytes,
            saving_bytes=saving_bytes,
            needed_bytes=max(step_bytes, evaluation_bytes) + (saving_bytes if on_cpu else 0),
            available_bytes=self.available,
            tried_rows=tried // self.time,
            seconds=time.perf_counter() - begun,
        )

    def _batches(self) -> Iterator[int]:
        """Tokens of the batches to try: a part of a long row, whole rows, all of them."""
        shortest = self.time
        while shortest > SHORTEST_ROW:
            shortest //= 2
        yield from _doubled(shortest, self.time)
        for rows in list(_doubled(1, self.rows))[1:]:
            yield rows * self.time

    def _step(self, tokens: int) -> Peaks:
        peaks = _Peaks(self.memory)
        rows, length = max(1, tokens // self.time), min(tokens, self.time)
        with (
            self.trial.smaller_batches(rows, length),
            Watch(self.trial, peaks, backward=False).on() as watch,
        ):
            # In the first step of a larger batch the kernels' buffers are changed for larger ones.
            watch.step()
            peaks.found.clear()
            watch.step()
        return peaks.found

    def _validate(self, tokens: int) -> Peaks:
        splits = self.trial.corpus.splits
        ids = splits["valid" if "valid" in splits else "train"].ids
        self.memory.peak = self.memory.now
        # A first window is read by itself.
        step = self.trial.step
        validate(step, ids[: tokens + (step.model.context_length or 0) + 1])
        return {"evaluation": self.memory.peak}

    def _fewest_tokens(self) -> int:
        return max(8 * VALIDATION_ROWS, self.trial.step.model.context_length or 0)

    def _grown(self, measure: Callable[[int], Peaks], sizes: list[int], seconds: float) -> tuple[int, int, int]:
        """What larger and larger sizes take: without any of it, for each unit more, and up to which size it was tried.

        The first two are of the phase that takes most at the last size.
        """
        until = time.perf_counter() + seconds
        held, took = self.memory.now, 0.0
        points: list[tuple[int, Peaks]] = []
        for size in sizes:
            if points:
                growth = max(points[-1][1].values()) * size / points[-1][0]
                too_much = self.available is not None and growth > self.available * TRIED_SHARE
                if too_much or (len(points) > 1 and time.perf_counter() + took * size > until):
                    break
            started = time.perf_counter()
            points.append((size, measure(size)))
            took = (time.perf_counter() - started) / size
        (last, peaks), (before, others) = points[-1], points[-2] if len(points) > 1 else (0, {})
        lines = []
        for phase, peak in peaks.items():
            slope = (peak - others.get(phase, held)) / (last - before)
            lines.append((peak + slope * (sizes[-1] - last), slope))
        most, slope = max(lines)
        slope = max(slope, 0.0)
        return int(most - slope * sizes[-1]), math.ceil(slope), last


def _doubled(first: int, last: int) -> Iterator[int]:
    """first, twice that, …, last."""
    while first < last:
        yield first
        first *= 2
    yield last
