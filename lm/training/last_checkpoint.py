"""The `last` checkpoint of a run: everything that resuming needs.

It holds the trainer's counters (`TrainProgress`) and the tensors of `TrainStep.checkpoint`. The number of the step is
the position in the data.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lm.config import TrainingConfig
from lm.device import pick_device
from lm.errors import CorruptRunError
from lm.files import Arrays
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import StopReason
from lm.training.compiling import MEASURED_STEPS
from lm.training.plan import Segment
from lm.training.schedule import Pace
from lm.training.train_step import StepCheckpoint, TrainStep

log = logging.getLogger(__name__)


@dataclass
class TrainProgress:
    """The trainer's counters; `state.json` has them as "train_state"."""

    step: int = 0
    seconds: float = 0.0
    """Training time, including validation and saving."""
    best_loss: float | None = None
    best_step: int | None = None
    stalls: int = 0
    """Validations since the best one."""
    harmful: int = 0
    """Last validations in a row that were worse than the best one by more than `HARM`."""
    learning_rate_share: float | None = None
    """Share of the peak in the last step."""
    rate_scale: float = 1.0
    """Factor of the learning rate from the plateau schedule."""
    rate_stalls: int = 0
    skipped_steps: int = 0
    """Steps without an update, because a number was not finite."""
    clipped_steps: int = 0
    last_is_skipped: bool = False
    """Whether the last step is one of `skipped_steps`, on a GPU: there the schedule follows one step later."""
    stop_reason: StopReason | None = None
    segments: list[Segment] = field(default_factory=list)
    """Of a plan by time, up to this step."""
    pace: Pace | None = None
    """Times that a plan by time is planned with; None: a plan in steps."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainProgress:
        """The counters of a `state.json`, also of an older run; TypeError if they are none."""
        known = {"segments": [], "pace": None, **content}
        known["segments"] = [Segment(**each) for each in known["segments"]]
        known["pace"] = None if known["pace"] is None else Pace(**known["pace"])
        return cls(**known)

    @property
    def updates(self) -> int:
        """Steps that changed the weights. The schedule and the average count these; the data position counts all."""
        return self.step - self.skipped_steps


def snapshot(folder: RunFolder, step: TrainStep, progress: TrainProgress) -> Callable[[], None]:
    """A function that writes the `last` checkpoint, all or nothing, from copies that later steps do not change.

    All processes must call `snapshot`; the function of rank 0 writes.
    """
    saved = step.checkpoint()
    if not step.world.is_rank0:
        return lambda: None
    # Older versions read this key.
    values = {"train_state": asdict(progress), **saved.values, "files": sorted(saved.tensors)}
    return functools.partial(_write, folder, saved.tensors, values)


def _write(folder: RunFolder, tensors: dict[str, Arrays], values: dict[str, Any]) -> None:
    facts = {"step": values["train_state"]["step"], "valid_loss": None}
    files = {f"{name}.safetensors": folder.pack_weights(arrays, **facts) for name, arrays in tensors.items()}
    folder.write_last({**files, "state.json": folder.pack_state(values)})


def _read(folder: RunFolder, step: TrainStep) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The values and tensors of `last`."""
    if not step.parallel.sharded:
        return folder.read_last()
    # Rank 0 checks the files, then each process copies its own rows out of them.
    step.world.broadcast_from_rank0(lambda: _check(folder))
    return folder.read_last(mapped=True)


def _check(folder: RunFolder) -> None:
    folder.read_last()


def with_saved_format(config: TrainingConfig, folder: RunFolder) -> TrainingConfig:
    """The options of a resumed run: on a CPU, `precision = "auto"` keeps steps in fp32 that were begun in fp32."""
    if config.precision != "auto" or config.amp is not None or pick_device(config.device).type != "cpu":
        return config
    environment = folder.read_state().get("environment", {})
    in_fp32 = environment.get("device") == "cpu" and environment.get("precision") == "fp32"
    return config.model_copy(update={"precision": "fp32"}) if in_fp32 else config


def load(folder: RunFolder, step: TrainStep) -> TrainProgress:
    """Bring a fresh `step` to the `last` checkpoint, and cut later lines off metrics.jsonl.

    Raises:
        CorruptRunError: the checkpoint does not fit the model or the options.
    """
    values, tensors = _read(folder, step)
    try:
        progress = TrainProgress.from_json(values["train_state"])
        step.load_checkpoint(StepCheckpoint(tensors, values), updates=progress.updates, steps=progress.step)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptRunError(f"{folder.path / 'last'} does not fit this run ({error}): restore it.") from None
    progress.stop_reason = None
    compiled = values["environment"].get("compile")
    # The first steps may come before the decision.
    step.compiled_before = None if compiled == "off" and progress.step < MEASURED_STEPS else compiled
    # A kill may come after the best weights are saved and before `last` is.
    facts = step.world.broadcast_from_rank0(lambda: folder.read_weights("best")[1])
    loss = facts.get("valid_loss")
    if loss is not None and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, facts["step"]
    folder.cut_metrics(progress.step)
    then = {"processes": "1", **values["environment"]}
    now = {**step.environment(), "compile": step.known_compilation() or "off"}
    if different := [
        f"{name} {then[name]!r} then, {now[name]!r} now" for name in now if now[name] != then.get(name, now[name])
    ]:
        log.warning("Resuming: the last bits may differ from an uninterrupted run (%s).", "; ".join(different))
    return progress
