"""The learning film: short samples of one prompt and one seed along a training, kept in film.jsonl of the run.

    {"step": 812, "seconds": 9.4, "progress": 0.027, "valid_loss": 2.31, "text": "ROM: the…", "sample_seconds": 0.03}

The first frame is step 0, the last one the end. The others are at rising distances, because a model changes most at the
start: of n frames, frame k is near the share (k / (n - 1))³ of the plan.

All frames together take about 1 % of the training time: there are fewer of them if a sample takes long, and none in a
short training.

A sample draws its random numbers from its own seed. So the steps of a training are the same bits with and without.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from lm.errors import LMError
from lm.runs.run_folder import RunFolder
from lm.tokenizers.base import Tokenizer
from lm.training.callbacks import Callback, End, Row, Start, Tick
from lm.training.preview import native_preview, relative_cost
from lm.training.train_step import TrainStep

log = logging.getLogger(__name__)

FRAMES = 30
"""In a film, if the time allows it."""
TOKENS = 120
"""Of a frame."""
SHARE = 0.01
"""Of the training time, for all frames."""
POWER = 3
"""Frame k of n is at the share (k / (n - 1)) ** POWER of the plan."""
SAMPLE_SECONDS = 0.1
"""Expected time of a usual model's sample, before the first one."""
TOKENS_PER_SECOND = 200_000
"""Expected speed of a plan in steps before the first step: that of a small model."""


class Film(Callback):
    """Writes the frames of a run; a plan by time counts their time.

    Args:
        folder: of the run.
        step: whose weights write.
        tokenizer: of the model.
        prompt: that each frame continues.
        clock: seconds since some moment.
    """

    def __init__(
        self,
        folder: RunFolder,
        step: TrainStep,
        tokenizer: Tokenizer,
        *,
        prompt: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder, self._step, self._tokenizer, self._prompt, self._clock = folder, step, tokenizer, prompt, clock
        self._last_step = -1
        self._sample_seconds = SAMPLE_SECONDS * relative_cost(step)
        """Mean of the samples so far."""
        self._samples: list[float] = []
        self._plan_seconds: float | None = None
        self._valid_loss: float | None = None
        self._is_on = not step.parallel.sharded

    def on_start(self, start: Start) -> None:
        """See `Callback.on_start`; also continues the film of a resumed run."""
        self._plan_seconds = start.plan_seconds
        if frames := self._folder.read_film():
            self._last_step = max(row["step"] for row in frames)
            self._sample_seconds = float(frames[-1].get("sample_seconds") or SAMPLE_SECONDS)
        for row in self._folder.read_metrics():
            self._note(row)
        expected = start.plan_seconds or start.plan_steps * start.tokens_per_step / TOKENS_PER_SECOND
        if start.step == 0 and self._affordable(expected) > 1:
            self._add(0, 0.0, 0.0)

    def on_step(self, tick: Tick) -> None:
        """See `Callback.on_step`."""
        # The last frame is that of `on_end`, after the last validation.
        if tick.progress < 1 and self._is_due(tick):
            self._add(tick.step, tick.seconds, tick.progress)

    def on_log(self, row: Row) -> None:
        """See `Callback.on_log`."""
        self._note(row)

    def on_end(self, end: End) -> None:
        """See `Callback.on_end`."""
        if self._last_step >= 0:
            self._add(end.step, end.seconds, min(1.0, end.step / max(1, end.plan_steps)))

    def _note(self, row: Row) -> None:
        loss = row.get("valid_loss")
        self._valid_loss = self._valid_loss if loss is None else loss

    def _affordable(self, seconds: float) -> int:
        """The number of frames in a training of so many seconds."""
        return min(FRAMES, math.floor(seconds * SHARE / self._sample_seconds + 1e-9))

    def _is_due(self, tick: Tick) -> bool:
        """Whether the step is far enough from the last frame."""
        frames = self._affordable(self._plan_seconds or tick.seconds / max(tick.progress, 1e-9))
        if frames < 2 or self._last_step < 0:
            return frames > 1
        # Distances, not places: they stay right when a sample or a step becomes slower or faster.
        now, wanted = tick.progress ** (1 / POWER), 1 / (frames - 1) - 1e-9
        since = now - (tick.progress * self._last_step / tick.step) ** (1 / POWER)
        return bool(since >= wanted and 1 - now >= wanted / 2)

    def _add(self, step: int, seconds: float, progress: float) -> None:
        """Write a frame, if there is none of this step; a failure ends the film, not the training."""
        if not self._is_on or step <= self._last_step:
            return
        begun = self._clock()
        try:
            text = native_preview(self._step, self._tokenizer, TOKENS, self._prompt)
            seconds_taken = max(self._clock() - begun, 1e-6)
            self._samples.append(seconds_taken)
            self._sample_seconds = sum(self._samples) / len(self._samples)
            row: Row = {
                "step": step, "seconds": round(seconds, 3), "progress": round(progress, 6),
                "valid_loss": self._valid_loss, "text": f"{self._prompt}{text}",
                "sample_seconds": round(seconds_taken, 4),
            }  # fmt: skip
            self._folder.append_film(row)
        except LMError as error:
            self._is_on = False
            log.warning("The film of the run ends at step %d: %s", self._last_step, error)
        self._last_step = step
