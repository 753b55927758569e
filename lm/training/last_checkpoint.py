"""What resuming needs, saved to and read from a run's `last/` folder.

Everything that a later step depends on is in `TrainProgress` and in the tensors saved beside it: weights, optimizer
moments, random generators and the carried state. The position in the data is the number of the step.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm.errors import CorruptRunError
from lm.files import Arrays
from lm.kernels.compiled import native
from lm.models.base import State
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import StopReason
from lm.training.optimizers import load_optimizer_arrays, optimizer_arrays

if TYPE_CHECKING:
    from lm.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class TrainProgress:
    """All numbers that resuming needs, beside the tensors."""

    step: int = 0
    seconds: float = 0.0
    """Training time spent, validation and saving included."""
    best_loss: float | None = None
    best_step: int | None = None
    stalls: int = 0
    """Validations since the best one."""
    harmful: int = 0
    """Validations in a row that were worse than the best one by more than `HARM`."""
    learning_rate_share: float | None = None
    """Of its peak, in the last step."""
    rate_scale: float = 1.0
    """What the plateau schedule has multiplied the learning rate by."""
    rate_stalls: int = 0
    skipped_steps: int = 0
    """Steps that changed nothing, because a number was not finite."""
    clipped_steps: int = 0
    stop_reason: StopReason | None = None

    @property
    def updates(self) -> int:
        """Steps that changed the weights: the schedule and the averages count these, the data counts all."""
        return self.step - self.skipped_steps


def environment(trainer: Trainer) -> dict[str, str]:
    """What the last bits of a result depend on."""
    return {
        "torch": torch.__version__,
        "device": trainer.device.type,
        "precision": trainer.mixed.format.precision,
        "amp": trainer.mixed.format.level,
        "optimizer": "fused" if trainer.optimizers[0].defaults.get("fused") else "unfused",
        "processes": str(trainer.world.size),
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": "none" if native() is None else native().instruction_sets()[0],
        "MKL_CBWR": os.environ.get("MKL_CBWR", ""),
    }


def snapshot(trainer: Trainer) -> Callable[[], None]:
    """What replaces `last/` by the trainer's state, all or nothing; it holds copies, safe from later steps.

    All processes must ask; what the first one gets writes.
    """
    world = trainer.world
    tensors: dict[str, Arrays] = {"random": _random_states(trainer)}
    if trainer.hidden is not None:
        tensors["hidden"] = {
            name: np.array(world.rows(tensor.float() if tensor.is_floating_point() else tensor).numpy())
            for name, tensor in trainer.hidden.tensors.items()
        }
    if world.first or trainer.config.shard:
        tensors["model"] = trainer.mixed.arrays()
        tensors["optimizer"] = optimizer_arrays(trainer.optimizers)
        if trainer.average is not None:
            tensors["average"] = trainer.average.arrays()
    if not world.first:
        return lambda: None
    state = {
        "train_state": asdict(trainer.state),
        "scaler": trainer.mixed.scale.state(),
        "hidden_dtype": _float_dtype(trainer.hidden),
        "environment": environment(trainer),
        "files": sorted(tensors),
    }
    return functools.partial(_write, trainer.folder, tensors, state)


def _write(folder: RunFolder, tensors: dict[str, Arrays], state: dict[str, Any]) -> None:
    facts = {"step": state["train_state"]["step"], "valid_loss": None}
    files = {f"{name}.safetensors": folder.pack_weights(arrays, **facts) for name, arrays in tensors.items()}
    folder.write_last({**files, "state.json": folder.pack_state(state)})


def load(trainer: Trainer) -> None:
    """Bring a fresh trainer to the state in `last/`.

    Raises:
        CorruptRunError: it does not fit the model.
    """
    state, tensors = trainer.folder.read_last()
    world = trainer.world
    try:
        trainer.state = TrainProgress(**state["train_state"])
        trainer.mixed.load_arrays(tensors["model"])
        load_optimizer_arrays(trainer.optimizers, tensors["optimizer"])
        if trainer.average is not None:
            trainer.average.load_arrays(tensors["average"])
        trainer.mixed.scale.load_state(state["scaler"])
        _restore_random(trainer, tensors["random"])
        if "hidden" in tensors and trainer.carries:
            dtype = getattr(torch, (state["hidden_dtype"] or "torch.float32").removeprefix("torch."))
            rows = {name: np.array_split(array, world.size) for name, array in tensors["hidden"].items()}
            hidden = {name: torch.from_numpy(parts[world.rank].copy()) for name, parts in rows.items()}
            trainer.hidden = State(
                {
                    name: tensor.to(trainer.device, dtype if tensor.is_floating_point() else None)
                    for name, tensor in hidden.items()
                }
            )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptRunError(f"{trainer.folder.path / 'last'} does not fit this run ({error}): restore it.") from None
    trainer.state.stop_reason = None
    _adopt_best(trainer)
    trainer.folder.cut_metrics(trainer.state.step)
    now, then = environment(trainer), {"processes": "1", **state["environment"]}
    if different := [
        f"{name} {then[name]!r} then, {now[name]!r} now" for name in now if now[name] != then.get(name, now[name])
    ]:
        log.warning("Resuming where the last bits may differ from an uninterrupted run: %s.", "; ".join(different))


def _random_states(trainer: Trainer) -> Arrays:
    """The random generators of all processes: "cpu" and "cuda" of the first, "cpu.1" of the next, and so on."""
    own = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(trainer.device)
    states = {}
    for name, state in own.items():
        for rank, each in enumerate(trainer.world.rows(state[None]).numpy()):
            states[name if rank == 0 else f"{name}.{rank}"] = each
    return states


def _restore_random(trainer: Trainer, states: Arrays) -> None:
    """Go on with this process's generators; a process that was not there draws from a place of its own."""
    end = "" if trainer.world.first else f".{trainer.world.rank}"
    if f"cpu{end}" not in states:
        trainer.world.seed(trainer.config.seed, trainer.state.step)
        return
    torch.set_rng_state(torch.from_numpy(states[f"cpu{end}"].copy()))
    if trainer.device.type == "cuda" and f"cuda{end}" in states:
        torch.cuda.set_rng_state(torch.from_numpy(states[f"cuda{end}"].copy()), trainer.device)


def _float_dtype(state: State | None) -> str | None:
    """The number format of a carried state's floats; files hold them in fp32."""
    if state is None:
        return None
    return next((str(tensor.dtype) for tensor in state.tensors.values() if tensor.is_floating_point()), None)


def _adopt_best(trainer: Trainer) -> None:
    """A kill may have come between saving the best weights and `last/`: those weights stay the ones to beat."""
    _, facts = trainer.folder.read_weights("best")
    loss = facts.get("valid_loss")
    if loss is not None and (trainer.state.best_loss is None or loss < trainer.state.best_loss):
        trainer.state.best_loss, trainer.state.best_step = loss, facts["step"]
