"""Where a run is in its plan: its progress, learning rate, validations and end.

    plan in steps   progress = steps done / steps of the plan
    plan by time    progress by `Segment`s: at intervals, the rest of the plan is fitted to the rest of the time

A plan by time is a list of segments. In a segment, each step makes the same progress. A new segment continues from the
progress that is reached, so the learning rate never jumps. Its steps bring the progress to 1 when the time is spent.
All numbers come from the clock of rank 0, so all processes compute the same segments.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lm.config import TrainingConfig
from lm.training.learning_rate import learning_rate_share, timed_learning_rate_share
from lm.training.plan import FEWEST_VALIDATIONS, LANDING, MAX_VALIDATION_SHARE, Plan, Segment

LATEST = 1.01
"""Share of the minutes after which no step should end."""
FIRST_LOOK = 3
"""Steps before the first look at the clock."""
LOOK_SHARE = 0.02
"""Longest time between two looks, as a share of the plan's time."""
TOLERANCE = 0.002
"""A segment is kept if its end differs by less than this share of the plan's time."""
MIN_STEPS_TIMED = 5
"""Last steps that give the time of a step, if the last look is more recent."""
LONGEST = 3.0
"""A longer step counts as this many typical ones: a pause is not expected again."""
LONGEST_VALIDATION = 5.0
"""The same for the first validation, with the measured one as the typical one."""
VALIDATIONS_TIMED = 3
"""Last validations that give the time of a validation."""
EXCESS = 1.5
"""Validations get fewer, but at least three, if they take this many times `MAX_VALIDATION_SHARE`."""
REST_SHARE = 0.4
"""Most of the remaining time for validations; the last one is always done."""
ROUNDING = 1e-9


@dataclass
class Pace:
    """Measured times, saved with the `last` checkpoint."""

    step_seconds: float
    """Typical time of the last steps."""
    validations: list[float] = field(default_factory=list)
    """Times of the last validations, in steps. The first one is measured before training."""
    save_seconds: float = 0.0
    """Time to copy and write the best weights and the `last` checkpoint."""

    @classmethod
    def of(cls, plan: Plan) -> Pace:
        """The pace that was measured before a plan by time."""
        assert plan.seconds is not None
        step_seconds = plan.measured_step_seconds or plan.seconds / plan.steps
        measured = plan.measured_validation_seconds
        return cls(step_seconds, [] if measured is None else [measured / step_seconds])

    @property
    def validation_seconds(self) -> float:
        """Typical time of a validation at the present speed; 0 if there was none."""
        match self.validations:
            case []:
                steps = 0.0
            case [measured, first]:
                steps = min(first, LONGEST_VALIDATION * measured)
            case known:
                steps = statistics.median(known)
        return steps * self.step_seconds


def typical_seconds(times: Sequence[float]) -> float:
    """The mean of times, with each of them at most `LONGEST` medians."""
    longest = LONGEST * statistics.median_low(times)
    return statistics.fmean(min(time, longest) for time in times)


class Schedule:
    """The schedule of a plan in steps."""

    def __init__(self, plan: Plan, config: TrainingConfig) -> None:
        self.plan, self.config = plan, config

    @property
    def steps(self) -> int:
        """Steps of the whole plan."""
        return self.plan.steps

    def progress(self, step: int) -> float:
        """The share of the plan that is done after `step` steps, 0 to 1."""
        return min(1.0, step / self.plan.steps)

    def is_done(self, step: int) -> bool:
        """Whether the plan ends after `step` steps."""
        return step >= self.plan.steps

    def validates_at(self, step: int) -> bool:
        """Whether a validation follows step number `step`, from 1."""
        return step % self.plan.evaluate_every == 0 or step == self.plan.steps

    def learning_rate_share(self, step: int, updates: int) -> float:
        """The share of the peak learning rate after `step` steps, of which `updates` changed the weights."""
        return learning_rate_share(updates, self.plan.steps, self.config)

    def begin(self, step: int, seconds: float) -> None:
        """Training starts or continues after `step` steps and `seconds`."""

    def add_step(self, seconds: float) -> None:
        """Note the time of a step."""

    def add_validation(self, seconds: float) -> None:
        """Note the time of a validation, with its saves."""

    def end_if_late(self, step: int, seconds: float) -> None:
        """End the plan after `step` steps and `seconds`, if another step would end too late."""

    def look(self, step: int, seconds: float) -> None:
        """Plan the rest again, if that is due after `step` steps and `seconds`."""


class TimedSchedule(Schedule):
    """The schedule of a plan by time.

    Args:
        plan: with `seconds`.
        config: schedule and its options.
        segments: those of the steps that are done; new ones are added to this list.
        pace: the times so far, which are kept up to date here.
    """

    def __init__(self, plan: Plan, config: TrainingConfig, segments: list[Segment], pace: Pace) -> None:
        super().__init__(plan, config)
        assert plan.seconds is not None
        self.seconds = plan.seconds
        self.segments, self.pace = segments, pace
        if plan.segments is not None:
            segments[:] = plan.segments
        elif not segments:
            every = None if plan.validations is None else 1 / plan.validations
            segments.append(Segment(0, 0.0, 1 / plan.steps, every))
        self._times: list[float] = []

    @property
    def steps(self) -> int:
        """Steps of the whole plan, as far as it is known."""
        return self.segments[-1].end_step

    def _segment(self, step: int) -> Segment:
        """The segment that step number `step` belongs to."""
        return next(each for each in reversed(self.segments) if each.step < step or each.step == 0)

    def progress(self, step: int) -> float:
        """The share of the plan that is done after `step` steps, 0 to 1."""
        last = self.segments[-1]
        if last.progress == 1 and last.step == step:
            return 1.0
        segment = self._segment(step)
        progress = segment.progress + (step - segment.step) * segment.per_step
        return 1.0 if progress > 1 - ROUNDING else progress

    def is_done(self, step: int) -> bool:
        """Whether the plan ends after `step` steps."""
        return self.progress(step) == 1

    def validates_at(self, step: int) -> bool:
        """Whether a validation follows step number `step`, from 1."""
        every = self._segment(step).validation_every
        if every is None:
            return step % self.plan.evaluate_every == 0 or self.is_done(step)
        return _validations_left(self.progress(step), every) < _validations_left(self.progress(step - 1), every)

    def learning_rate_share(self, step: int, updates: int) -> float:
        """The share of the peak learning rate after `step` steps, of which `updates` changed the weights."""
        per_step = self._segment(step + 1).per_step
        return timed_learning_rate_share(updates, self.progress(step), per_step, self.config)

    # -- the clock ------------------------------------------------------------------------------------

    def begin(self, step: int, seconds: float) -> None:
        """Training starts or continues after `step` steps and `seconds`."""
        self._begun = self._looked = seconds
        self._first_look = step + FIRST_LOOK
        # The first of few long steps may be slower than the others.
        self._times = [self.pace.step_seconds] if self._is_long(self.pace.step_seconds) else []

    def add_step(self, seconds: float) -> None:
        """Note the time of a step."""
        self._times.append(seconds)

    def add_validation(self, seconds: float) -> None:
        """Note the time of a validation, with its saves."""
        self.pace.validations = [*self.pace.validations, seconds / self.pace.step_seconds][-VALIDATIONS_TIMED:]

    def end_if_late(self, step: int, seconds: float) -> None:
        """End the plan here if another step would end too late: a segment without progress records it.

        A short step is always done: it ends the plan with the final learning rate.
        """
        if self.plan.segments is not None or self.is_done(step):
            return
        step_seconds = typical_seconds(self._times)
        if not self._is_long(step_seconds):
            return
        validations = 1 + self.validates_at(step)
        spent = seconds + validations * self.pace.validation_seconds + self.pace.save_seconds
        if spent + step_seconds > self.seconds * LATEST:
            self.segments.append(Segment(step, 1.0, 1.0, self.segments[-1].validation_every))

    def _is_long(self, step_seconds: float) -> bool:
        """Whether a step takes more of the plan's time than the plan may end too late."""
        return step_seconds > self.seconds * (LATEST - 1)

    def look(self, step: int, seconds: float) -> None:
        """Plan the rest again, if that is due after `step` steps and `seconds`."""
        if self.plan.segments is not None or self.is_done(step):
            return
        since, longest, now = seconds - self._looked, self.seconds * LOOK_SHARE, self.segments[-1]
        left = (now.end_step - step) * self.pace.step_seconds
        if since < min(longest, self._looked - self._begun, left / 2) or (step < self._first_look and since < longest):
            return
        self.pace.step_seconds = typical_seconds(self._times)
        self._looked, self._times = seconds, self._times[-MIN_STEPS_TIMED:]
        progress, left = self.progress(step), self.seconds * LANDING - seconds - self.pace.save_seconds
        every = self._validation_every(progress, left, now.validation_every)
        steps = self._steps_left(step, progress, left, every)
        moved = abs(now.end_step - step - steps) * self.pace.step_seconds
        if moved > self.seconds * TOLERANCE or every != now.validation_every:
            self.segments.append(Segment(step, progress, (1 - progress) / steps, every))

    def _validation_every(self, progress: float, left: float, every: float | None) -> float | None:
        """The progress between validations: as planned, or more if they take too much of the time."""
        seconds, planned = self.pace.validation_seconds, self.plan.validations
        if every is None or planned is None or seconds == 0:
            return every
        affordable = self.seconds * MAX_VALIDATION_SHARE / seconds
        fewer = min(planned, max(FEWEST_VALIDATIONS, int(affordable)))
        wanted = 1 / (planned if planned <= affordable * EXCESS else fewer)
        most = max(1, int(left * REST_SHARE / seconds))
        if _validations_left(progress, wanted) > most:
            wanted = (1 - progress) / most
        return every if _validations_left(progress, wanted) == _validations_left(progress, every) else wanted

    def _steps_left(self, step: int, progress: float, left: float, every: float | None) -> int:
        """The steps that bring the plan to its end in `left` seconds, at least 1."""
        pace, late = self.pace, self.seconds * (LATEST - LANDING)
        if every is None:
            each = pace.step_seconds + pace.validation_seconds / self.plan.evaluate_every
            spent = pace.validation_seconds
        else:
            each, spent = pace.step_seconds, _validations_left(progress, every) * pace.validation_seconds
        steps = min(round((left - spent) / each), math.floor((left + late - spent) / each))
        if self.plan.max_steps is not None:
            steps = min(steps, self.plan.max_steps - step)
        return max(1, steps)


def _validations_left(progress: float, every: float) -> int:
    """The validations from a progress on: those at 1, 1 - `every`, …, above it."""
    return math.ceil((1 - progress) / every - ROUNDING / every)


def make_schedule(plan: Plan, config: TrainingConfig, segments: list[Segment], pace: Pace | None) -> Schedule:
    """The schedule of a plan; for the arguments see `TimedSchedule`."""
    if plan.seconds is None:
        return Schedule(plan, config)
    return TimedSchedule(plan, config, segments, pace or Pace.of(plan))
