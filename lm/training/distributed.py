"""Several processes that train one model, on torch's own engine: DistributedDataParallel, or FSDP2 with `shard`.

    lm train --devices N  (launch) ─┐
    torchrun … lm train …          ─┴─► joined() ─► World ─► Parallel (the model's loss and its gradients' mean)

All processes make the same steps of the same plan, each on its share of the rows of the same batches, so that the
tokens of a step do not depend on how many they are. The first process (rank 0) alone reads the text, names the run,
measures, writes and shows, and tells the others. Whatever stops training is agreed on between two steps.

A process that dies or hangs ends the wait of the others: at once where its connection closes, else after
`training.timeout_seconds`. Tensors on a GPU travel by NCCL, everything else by gloo.

Sources: Li et al. 2020 (DistributedDataParallel); Zhao et al. 2023 (FSDP).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import platform
import re
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from lm.config import RunConfig, TrainingConfig
from lm.device import pick_device
from lm.errors import ConfigError, DeviceError, LMError, RunError, TrainingError
from lm.evaluation.score_sums import Scores
from lm.machine import usable_threads
from lm.models.base import LanguageModel, State, TrainingLoss
from lm.runs.run_folder import CONFIG, RunFolder
from lm.torch_private import ignore_in_ddp, register_tree
from lm.training.module_needs import build_on_meta, module_needs

T = TypeVar("T")

JOINING = datetime.timedelta(minutes=10)
"""The longest wait for all processes to start."""
PATIENCE = datetime.timedelta(hours=24)
"""The longest wait for work that the first process does alone: preparing a corpus, the report at the end."""
PAUSE_SECONDS = 2.0
"""A process that fails because another one did waits so long before it says so: by then it has mostly been ended."""
SHARED_FOLDER_SECONDS = 60.0
"""How long a file system of several machines may take to show a new file."""
SAVING_SECONDS = 300
"""How long processes that are asked to end may take to save."""
_LOST = re.compile(r"gloo|NCCL|onnection (closed|reset|refused)|imed out|wait timeout|Broken pipe", re.IGNORECASE)


class LostError(TrainingError):
    """Another process of the job ended, or did not answer in time."""


@dataclass(frozen=True)
class World:
    """The processes of this job, as one of them sees them; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    patient: Any = None
    """The group for waits that may be long."""

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that reads, writes and shows."""
        return self.rank == 0

    # renamed: delete these aliases when all rooms use the new names
    first = property(lambda self: self.is_rank0)

    def place(self, name: str | None) -> torch.device:
        """See `pick_device`."""
        return self.pick_device(name)

    def wait(self) -> None:
        """See `barrier`."""
        self.barrier()

    @property
    def share(self) -> tuple[int, int]:
        """Which part of shared work is this process's, and of how many."""
        return self.rank, self.size

    def pick_device(self, name: str | None) -> torch.device:
        """The device of this process: one GPU each, or the CPU for all.

        Raises:
            DeviceError: there is no such device, or fewer than processes.
        """
        device = pick_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise DeviceError(
                f"Device {name or device.type!r} is one device and {self.size} processes train: use cuda (a GPU each) "
                "or cpu."
            )
        check_devices(self.local_size, name)
        return torch.device("cuda", self.local_rank)

    # -- telling and asking -------------------------------------------------------------------------

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all of them; an LMError that it raises is raised in all."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_rank0:
            try:
                box[0] = make()
            except LMError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.patient)
        told, refusal = box
        if refusal is not None:
            raise refusal
        return told  # type: ignore[no-any-return]

    def local_rank0_first(self, make: Callable[[], T]) -> T:
        """What `make` returns: called by one process of each machine first, so that the others find its files."""
        found = [make()] if self.local_rank == 0 else []
        self.barrier()
        return found[0] if found else make()

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            # Not a barrier: the object travels by the patient group on every backend.
            self.broadcast_from_rank0(lambda: None)
            self.all_gather(None)

    def all_gather(self, own: T) -> list[T]:
        """What each process has, in their order; for small things."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.patient)
        return found

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sums over all processes, in float64; the same bits in all."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def all_reduce_mean(self, value: float, weight: float = 1.0) -> float:
        """The mean over all processes."""
        if self.size == 1:
            return value
        total, weights = self.all_reduce_sum(value * weight, weight)
        return total / weights

    def sync_clock(self, seconds: float, signal_number: int | None = None) -> tuple[float, int | None]:
        """The first process's clock, and a signal that any process was sent."""
        if self.size == 1:
            return seconds, signal_number
        sent = (signal_number == each for each in _SIGNALS)
        clock, *counts = self.all_reduce_sum(seconds if self.is_rank0 else 0.0, *sent)
        return clock, next((number for number, count in zip(_SIGNALS, counts, strict=True) if count), None)

    def sum_scores(self, scores: Scores) -> Scores:
        """The scores of a split from those of all shares of it."""
        counted = scores.tokens, scores.nats, scores.squared_nats, scores.top1, scores.top5
        tokens, nats, squared_nats, top1, top5 = self.all_reduce_sum(*counted)
        return replace(scores, tokens=int(tokens), nats=nats, squared_nats=squared_nats, top1=int(top1), top5=int(top5))

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows (axis 0) of all processes in their order, on the CPU; each has as many."""
        tensor = tensor.cpu().contiguous()
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    # -- random numbers -----------------------------------------------------------------------------

    def seed(self, seed: int, step: int = 0) -> None:
        """Give each process but the first dropout of its own; the first draws as it would alone."""
        if not self.is_rank0:
            state = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_world = World()


def current() -> World:
    """The processes that this one has joined."""
    return _world


def started() -> bool:
    """Whether a launcher (torchrun, `launch`) started this process, also where it is the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number, also before it has joined the others."""
    return int(os.environ["RANK"]) if started() else 0


@contextlib.contextmanager
def joined(training: TrainingConfig | None = None) -> Iterator[World]:
    """Join the processes that were started together with this one; inside another `joined`, and alone, does nothing.

    Args:
        training: its device and timeout; None: the defaults.

    Raises:
        DeviceError: this process has no device.
        LostError: another process ended, or did not answer in time.
    """
    global _world
    training = training or TrainingConfig()
    if _world.size > 1 or not started() or int(os.environ["WORLD_SIZE"]) == 1:
        yield _world
        return
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **os.environ}
    world = World(*(int(told[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    try:
        place = world.pick_device(training.device)
        with _words():
            _world = replace(world, patient=_connect(world, place, training.timeout_seconds))
            yield _world
    except Exception as error:
        if not world.is_rank0 or isinstance(error, LostError):
            # The process that began it speaks first; this one is mostly ended by the launcher meanwhile.
            time.sleep(PAUSE_SECONDS)
        raise
    else:
        dist.destroy_process_group()
    finally:
        _world = World()


def _connect(world: World, place: torch.device, timeout_seconds: float) -> Any:
    """Connect to the others; the group for waits that may be long."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store, _, _ = next(rendezvous("env://", timeout=JOINING))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store = PrefixStore(_attempt(store, world), store)
    shared: dict[str, Any] = {"store": store, "rank": world.rank, "world_size": world.size, "timeout": timeout}
    if place.type == "cuda":
        torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place, **shared)
    else:
        dist.init_process_group("gloo", **shared)
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _attempt(store: Any, world: World) -> str:
    """A name for this start of the job, agreed on by all processes.

    The launcher keeps one store through all restarts, in which the addresses of processes that are gone still stand
    (pytorch issue 135712), and no number that it hands out is the same on all machines. So each process leaves a name
    that no other ever had; the first one proposes what it finds, until all have found themselves in it.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + JOINING.total_seconds()
    store.set(f"inkling/here/{world.rank}", own)
    ranks = range(world.size)
    while time.monotonic() < until:
        if world.is_rank0:
            found = ",".join(store.get(f"inkling/here/{rank}").decode() for rank in ranks)
            store.set("inkling/proposed", found)
            store.set("inkling/seen/0", found)
            if all(_read(store, f"inkling/seen/{rank}") == found for rank in ranks):
                store.set("inkling/agreed", found)
                return own
        else:
            found = _read(store, "inkling/proposed")
            if own in found.split(","):
                store.set(f"inkling/seen/{world.rank}", found)
                if _read(store, "inkling/agreed") == found:
                    return found.partition(",")[0]
        time.sleep(0.02)
    raise LostError(
        f"Not all {world.size} processes of this job were there in {JOINING.total_seconds() / 60:g} minutes: look at "
        "the log of the machine that is missing."
    )


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


@contextlib.contextmanager
def _words() -> Iterator[None]:
    """A sentence in place of what torch raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise LostError(
            f"Another process of this job ended, or did not answer in training.timeout_seconds ({reason}). What it "
            "said stands above, or in its own log; what was saved is intact: go on with lm train --resume."
        ) from error


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, what the first process does concerns no other."""
    global _world
    before, _world = _world, World()
    try:
        yield
    finally:
        _world = before


# -- what is refused --------------------------------------------------------------------------------


def check(config: RunConfig, size: int) -> None:
    """Refuse, before any long work, what `size` processes cannot train.

    Raises:
        ConfigError: the batch cannot be split, or the model or optimizer cannot be sharded.
    """
    training = config.training
    if training.batch_size % size:
        fits = sorted({max(size, training.batch_size // size * size), -(-training.batch_size // size) * size})
        raise ConfigError(
            f"training.batch_size={training.batch_size} rows cannot be split evenly over {size} processes: use "
            f"{' or '.join(map(str, fits))} (it counts the rows of all of them together), or another number of "
            "processes."
        )
    if not training.shard:
        return
    whole = {needs.module for needs in module_needs(build_on_meta(config.model, 16)).values() if not needs.shardable}
    if whole:
        raise ConfigError(
            f"--shard cannot spread the modules {', '.join(sorted(whole))} of this model over processes: leave them "
            "out (context tables: --set model.table_orders=[]), or leave --shard out."
        )
    if training.amp in ("O2", "O3") or training.fp32_modules:
        what = f"training.amp={training.amp}" if training.amp in ("O2", "O3") else "training.fp32_modules"
        raise ConfigError(
            f"--shard and {what} do not meet: FSDP spreads weights in fp32. Use --amp O1, which computes in "
            "bf16 or fp16, or leave --shard out."
        )
    if training.optimizer == "muon":
        raise ConfigError(
            "--shard and training.optimizer=muon do not meet, because Muon needs whole matrices: use adamw or sgd, or "
            "leave --shard out."
        )


def own_part(config: RunConfig, processes: int) -> RunConfig:
    """The options as if one process's rows were all."""
    rows = max(1, config.training.batch_size // processes)
    return config.model_copy(update={"training": config.training.model_copy(update={"batch_size": rows})})


def check_devices(count: int, name: str | None) -> None:
    """Refuse more processes than this machine has devices for.

    Raises:
        DeviceError: there are fewer GPUs, or fewer cores where the CPU computes.
    """
    device = pick_device(name)
    there = torch.cuda.device_count() if device.type == "cuda" else usable_threads() if device.type == "cpu" else 1
    if count > there:
        kind = {"cuda": "GPU", "cpu": "CPU core"}.get(device.type, f"{device.type} device")
        other = ", or --device cpu" if device.type != "cpu" else ""
        raise DeviceError(
            f"--devices {count}: this machine has {there} {kind}{'s' if there != 1 else ''}; use --devices {there} or "
            f"fewer{other}."
        )


# -- starting processes -----------------------------------------------------------------------------


def launch(devices: int, program: Sequence[str]) -> int:
    """Run a program in `devices` processes on this machine, as torchrun would, and wait for all of them.

    The CPU's threads are divided among them, unless OMP_NUM_THREADS says how many each has.

    Returns:
        The exit code: 0, or that of the process that failed first, which has said why.

    Raises:
        TrainingError: a process was killed; the others were ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes speak for themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_threads() // devices)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=SAVING_SECONDS,
    )
    try:
        elastic_launch(config, program[0])(*program[1:])
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        number, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        raise TrainingError(
            f"Process {number + 1} of {devices} was ended by {name}, so the others were ended too. What was saved is "
            "intact: go on with lm train --resume."
        ) from None
    return 0


def job_name() -> str | None:
    """What names this job through all its restarts; None where no elastic launcher started it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a rendezvous all jobs are called "none"; the launcher's process outlives the restarts.
    return f"{platform.node()}:{os.getppid()}" if run_id == "none" else run_id


def restarted() -> bool:
    """Whether the launcher has started this job before, because a process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


# -- the run's folder -------------------------------------------------------------------------------


class ReadOnlyRunFolder(RunFolder):
    """The run's folder as all but the first process have it: they read it, and what they would write is left out."""

    def _leave(self, *args: Any, **kwargs: Any) -> None:
        pass

    create = write_record = write_best = write_step = drop_step = write_last = append_metrics = cut_metrics = _leave

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """The first process holds it for all."""
        yield

    def await_record(self) -> None:
        """Wait until this machine sees the run.

        Raises:
            RunError: it never did.
        """
        until = time.monotonic() + SHARED_FOLDER_SECONDS
        while not (self.path / CONFIG).is_file():
            if time.monotonic() > until:
                raise RunError(
                    f"{platform.node()} does not see {self.path}, where the first process has the run: put the runs "
                    "on a file system that all machines share (--runs-dir)."
                )
            time.sleep(0.2)


def folder_of(world: World, path: Path) -> RunFolder | ReadOnlyRunFolder:
    """The run's folder: to write for the first process, to read for the others."""
    return RunFolder(path) if world.is_rank0 else ReadOnlyRunFolder(path)


# -- the model --------------------------------------------------------------------------------------


class Parallel:
    """A model whose gradients, after `backward`, are those of the rows of all processes.

    Args:
        model: on its device, with equal weights in all processes.
        world: which processes.
        shard: spread weights, gradients and moments over the processes (FSDP2), instead of a copy in each.
        each_part: exchange the gradients of each part of a step, because they are taken away after it.
    """

    def __init__(self, model: LanguageModel, world: World, *, shard: bool, each_part: bool = False) -> None:
        self._model, self._world, self._each_part = model, world, each_part
        self._sharded: Any = None
        self._copies: DistributedDataParallel | None = None
        self._sparse: list[nn.Parameter] = []
        if world.size > 1 and shard:
            self._sharded = _shard(model)
        elif world.size > 1:
            self._copies, self._sparse = _copy(model)

    @property
    def sharded(self) -> bool:
        """Whether a pass through the model is for all processes together."""
        return self._sharded is not None

    def training_loss(self, *args: Any, **kwargs: Any) -> TrainingLoss:
        """See `LanguageModel.training_loss`; of this process's rows."""
        # Asked anew each time: a profile may stand in for it meanwhile.
        loss: Callable[..., TrainingLoss] = self._copies or self._model.training_loss
        return loss(*args, **kwargs)

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a part of a step: the gradients travel with the last one alone."""
        last_dense = last or self._each_part
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last_dense)
        held = self._copies.no_sync() if self._copies is not None and not last_dense else contextlib.nullcontext()
        with held:
            yield
        if last:
            for parameter in self._sparse:
                _mean_of_rows(parameter, self._world)


class _Loss(nn.Module):
    """A module whose forward is the training loss: what DistributedDataParallel wraps."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> TrainingLoss:
        """See `LanguageModel.training_loss`."""
        return self.model.training_loss(*args, **kwargs)


def _copy(model: LanguageModel) -> tuple[DistributedDataParallel, list[nn.Parameter]]:
    """A copy of the model in each process; the context tables' sparse gradients are left to `_mean_of_rows`."""
    module = _Loss(model)
    by_rows = {p for p, needs in module_needs(model).items() if needs.optimizer_kind == "row_adagrad"}
    ignore_in_ddp(module, [name for name, parameter in module.named_parameters() if parameter in by_rows])
    # An embedding that is the output layer too gets a dense gradient, to which its rows are added.
    sparse: list[Any] = [part for part in model.modules() if getattr(part, "sparse", False)]
    for part in sparse:
        part.sparse = False
    copies = DistributedDataParallel(module, gradient_as_bucket_view=True)
    for part in sparse:
        part.sparse = True
    return copies, [p for p in model.parameters() if p in by_rows]


def _mean_of_rows(parameter: nn.Parameter, world: World) -> None:
    """Replace a sparse gradient by the mean over all processes: their rows one after the other."""
    if parameter.grad is None:
        return
    gradient = parameter.grad.coalesce()
    rows, slopes = gradient.indices()[0], gradient.values() / world.size
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(count) for count in counts]
    longest = max(lengths)
    # All processes send as many rows; what fills them up is cut off again.
    all_rows = [rows.new_empty(longest) for _ in lengths]
    all_slopes = [slopes.new_empty(longest, slopes.shape[1]) for _ in lengths]
    dist.all_gather(all_rows, nn.functional.pad(rows, (0, longest - len(rows))))
    dist.all_gather(all_slopes, nn.functional.pad(slopes, (0, 0, 0, longest - len(rows))))
    rows = torch.cat([part[:length] for part, length in zip(all_rows, lengths, strict=True)])
    slopes = torch.cat([part[:length] for part, length in zip(all_slopes, lengths, strict=True)])
    parameter.grad = torch.sparse_coo_tensor(rows[None], slopes, parameter.shape, check_invariants=False)


def _shard(model: LanguageModel) -> Any:
    """Spread the model over the processes: each block of a list of blocks by itself, then what is left."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # FSDP finds the tensors of an output by these; without them backward would not gather the weights again.
    for kind in (State, TrainingLoss):
        register_tree(kind)
    # Native layers keep the addresses of their weights from forward to backward: on the CPU the weights stay gathered.
    frees = next(model.parameters()).device.type != "cpu"
    for blocks in [part for part in model.modules() if isinstance(part, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, reshard_after_forward=frees)
    fully_shard(model)
    register_fsdp_forward_method(model, "training_loss")
    # It warns of outputs that are views, in case they are changed in place; none is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    return model
