"""Training by several processes, with torch's DistributedDataParallel, or FSDP2 for `--shard`.

    lm train --devices N  (launch) ─┐
    torchrun … lm train …          ─┴─► joined() ─► World ─► Parallel (the model's loss and its averaged gradients)

All processes make the same steps of the same plan, each on its share of the rows of the same batches. So the tokens of
a step do not depend on the number of processes. Rank 0 alone reads the text, names the run, measures, writes and
shows, and broadcasts its decisions. All processes agree between two steps on when to stop.

If a process dies or hangs, the others stop waiting: at once if its connection closes, else after
`training.timeout_seconds`. Tensors on a GPU use NCCL, everything else gloo.

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
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from lm._renamed import old_names
from lm.config import RunConfig, TrainingConfig
from lm.device import pick_device
from lm.errors import ConfigError, DeviceError, LMError, RunError, TrainingError
from lm.evaluation.score_sums import Scores
from lm.host import usable_threads
from lm.models.base import LanguageModel, State, TrainingLoss
from lm.runs.run_folder import CONFIG, RunFolder
from lm.torch_private import ignore_in_ddp, register_tree
from lm.training.module_needs import build_on_meta, module_needs

T = TypeVar("T")

START_TIMEOUT = datetime.timedelta(minutes=10)
"""Longest wait for all processes to start."""
RANK0_TIMEOUT = datetime.timedelta(hours=24)
"""Longest wait for work of rank 0 alone, such as preparing a corpus."""
PAUSE_SECONDS = 2.0
"""Wait of a process that fails because another one failed: the launcher usually ends it before it prints an error."""
SHARED_FOLDER_SECONDS = 60.0
"""Time that a file system of several machines may need to show a new file."""
SAVING_SECONDS = 300
"""Time to save for processes that get a signal to end."""
_LOST = re.compile(r"gloo|NCCL|onnection (closed|reset|refused)|imed out|wait timeout|Broken pipe", re.IGNORECASE)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LostError(TrainingError):
    """Another process of the job ended, or did not answer in time."""


@dataclass(frozen=True)
class World:
    """The processes of this job; by default only this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    long_waits: Any = None
    """The process group for waits up to `RANK0_TIMEOUT`."""

    @property
    def is_rank0(self) -> bool:
        """Whether this process reads, writes and shows."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """This process's share of divided work: its number from 0, and the number of shares."""
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

    # -- communication ------------------------------------------------------------------------------

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """The result of `make` in rank 0, in all processes; all raise an LMError that it raises."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_rank0:
            try:
                box[0] = make()
            except LMError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.long_waits)
        result, failure = box
        if failure is not None:
            failure.is_reported = self.local_rank > 0
            raise failure
        return result  # type: ignore[no-any-return]

    def local_rank0_first(self, make: Callable[[], T]) -> T:
        """The result of `make`, called by one process of each machine first, so that the others find its files."""
        found = [make()] if self.local_rank == 0 else []
        self.barrier()
        return found[0] if found else make()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            # Not dist.barrier: objects use the group for long waits with every backend.
            self.broadcast_from_rank0(lambda: None)
            self.all_gather(None)

    def all_gather(self, own: T) -> list[T]:
        """The small object of each process, by rank."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.long_waits)
        return found

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sums over all processes, in float64; the same bits in all."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def all_reduce_mean(self, value: float, weight: float = 1.0) -> float:
        """The weighted mean over all processes."""
        if self.size == 1:
            return value
        total, weights = self.all_reduce_sum(value * weight, weight)
        return total / weights

    def all_reduce_mean_on_device(self, value: Tensor, weight: float = 1.0) -> Tensor:
        """The weighted mean of a scalar over all processes, without a wait for the device."""
        if self.size == 1:
            return value
        sums = torch.stack([value.float() * weight, torch.full_like(value, weight, dtype=torch.float32)])
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    def sync_clock(self, seconds: float, signal_number: int | None = None) -> tuple[float, int | None]:
        """The clock of rank 0, and a signal that any process received."""
        if self.size == 1:
            return seconds, signal_number
        sent = (signal_number == each for each in _SIGNALS)
        clock, *counts = self.all_reduce_sum(seconds if self.is_rank0 else 0.0, *sent)
        return clock, next((number for number, count in zip(_SIGNALS, counts, strict=True) if count), None)

    def sum_scores(self, scores: Scores) -> Scores:
        """The scores of a split, from those of each process's share."""
        counted = scores.tokens, scores.nats, scores.squared_nats, scores.top1, scores.top5
        tokens, nats, squared_nats, top1, top5 = self.all_reduce_sum(*counted)
        return replace(scores, tokens=int(tokens), nats=nats, squared_nats=squared_nats, top1=int(top1), top5=int(top5))

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows (axis 0) of all processes by rank, on the CPU; each process has the same number."""
        tensor = tensor.cpu().contiguous()
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def seed(self, seed: int, step: int = 0) -> None:
        """Seed the dropout of all processes but rank 0, which draws the same numbers as a single process."""
        if not self.is_rank0:
            state = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))


_world = World()


def current() -> World:
    """The processes that this one has joined."""
    return _world


def started() -> bool:
    """Whether a launcher (torchrun, `launch`) started this process, even as the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number, also before it has joined the others."""
    return int(os.environ["RANK"]) if started() else 0


@contextlib.contextmanager
def joined(training: TrainingConfig | None = None) -> Iterator[World]:
    """Join the processes that were started with this one. A single process, or one that has joined, does nothing.

    Args:
        training: for device and timeout; None: the defaults.

    Raises:
        DeviceError: this process has no device.
        LostError: another process ended, or did not answer in time.
    """
    global _world
    training = training or TrainingConfig()
    if _world.size > 1 or not started() or int(os.environ["WORLD_SIZE"]) == 1:
        yield _world
        return
    known = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **os.environ}
    world = World(*(int(known[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    try:
        device = world.pick_device(training.device)
        with _lost_errors():
            _world = replace(world, long_waits=_connect(world, device, training.timeout_seconds))
            yield _world
    except Exception as error:
        if not world.is_rank0 or isinstance(error, LostError):
            # The process that failed first prints first; the launcher usually ends this one meanwhile.
            time.sleep(PAUSE_SECONDS)
        if isinstance(error, LMError) and not isinstance(error, LostError) and dist.is_initialized():
            # A process that exits while gloo's threads run is aborted.
            dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        _world = World()


def _connect(world: World, device: torch.device, timeout_seconds: float) -> Any:
    """Connect to the others; the process group for long waits."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store, _, _ = next(rendezvous("env://", timeout=START_TIMEOUT))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store = PrefixStore(_attempt(store, world), store)
    shared: dict[str, Any] = {"store": store, "rank": world.rank, "world_size": world.size, "timeout": timeout}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **shared)
    else:
        dist.init_process_group("gloo", **shared)
    return dist.new_group(backend="gloo", timeout=RANK0_TIMEOUT)


def _attempt(store: Any, world: World) -> str:
    """A unique name for this start of the job, the same in all processes.

    The launcher keeps one store through all restarts, with addresses of processes that have ended (pytorch issue
    135712), and it has no number that is the same on all machines. So each process stores a unique id, rank 0 proposes
    the ids that it finds, and all wait until every process has found its own id in the proposal.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + START_TIMEOUT.total_seconds()
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
        f"Not all {world.size} processes of this job started in {START_TIMEOUT.total_seconds() / 60:g} minutes: see "
        "the log of the machine that is missing."
    )


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


@contextlib.contextmanager
def _lost_errors() -> Iterator[None]:
    """Replace torch's errors about a lost process by LostError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise LostError(
            f"Another process of this job ended, or did not answer in training.timeout_seconds ({reason}). Its error "
            "is above, or in its own log. The last checkpoint is intact: continue with lm train --resume."
        ) from error


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process works without the others."""
    global _world
    before, _world = _world, World()
    try:
        yield
    finally:
        _world = before


# -- checks -----------------------------------------------------------------------------------------


def check(config: RunConfig, size: int) -> None:
    """Check, before any long work, that `size` processes can train.

    Raises:
        ConfigError: the batch cannot be split, or the model or optimizer cannot be sharded.
    """
    training = config.training
    if training.batch_size % size:
        fits = sorted({max(size, training.batch_size // size * size), -(-training.batch_size // size) * size})
        raise ConfigError(
            f"training.batch_size={training.batch_size} rows cannot be split evenly over {size} processes: use "
            f"{' or '.join(map(str, fits))} (the rows of all processes together), or another number of processes."
        )
    if not training.shard:
        return
    whole = {needs.module for needs in module_needs(build_on_meta(config.model, 16)).values() if not needs.shardable}
    if whole:
        raise ConfigError(
            f"--shard cannot spread the modules {', '.join(sorted(whole))} of this model over processes: remove them "
            "(context tables: --set model.table_orders=[]), or leave --shard out."
        )
    if training.amp in ("O2", "O3") or training.fp32_modules:
        option = f"training.amp={training.amp}" if training.amp in ("O2", "O3") else "training.fp32_modules"
        raise ConfigError(
            f"--shard and {option} cannot be combined: FSDP spreads weights in fp32. Use --amp O1, which computes in "
            "bf16 or fp16, or leave --shard out."
        )
    if training.optimizer == "muon":
        raise ConfigError(
            "--shard and training.optimizer=muon cannot be combined, because Muon needs whole matrices: use adamw or "
            "sgd, or leave --shard out."
        )


def config_per_process(config: RunConfig, processes: int) -> RunConfig:
    """The options of one process: with its rows of the batch."""
    rows = max(1, config.training.batch_size // processes)
    return config.model_copy(update={"training": config.training.model_copy(update={"batch_size": rows})})


def check_devices(count: int, name: str | None) -> None:
    """Check that this machine has devices for `count` processes.

    Raises:
        DeviceError: there are fewer GPUs, or fewer cores if the CPU computes.
    """
    device = pick_device(name)
    there = {"cuda": torch.cuda.device_count, "cpu": usable_threads}.get(device.type, lambda: 1)()
    if count > there:
        kind = {"cuda": "GPU", "cpu": "CPU core"}.get(device.type, f"{device.type} device")
        other = ", or --device cpu" if device.type != "cpu" else ""
        raise DeviceError(
            f"--devices {count}: this machine has {there} {kind}{'s' if there != 1 else ''}; use --devices {there} or "
            f"fewer{other}."
        )


# -- starting processes -----------------------------------------------------------------------------


def launch(devices: int, program: Sequence[str]) -> int:
    """Run a program in `devices` processes on this machine, as torchrun does, and wait for all of them.

    The processes share the CPU's threads evenly, unless OMP_NUM_THREADS is set.

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        TrainingError: a process was killed; the others were ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes print their own errors.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_threads() // devices)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=devices, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, shutdown_timeout=SAVING_SECONDS,
    )  # fmt: skip
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
            f"Process {number + 1} of {devices} was ended by {name}, so the others were ended too. The last checkpoint "
            "is intact: continue with lm train --resume."
        ) from None
    return 0


def job_name() -> str | None:
    """A name of this job that stays through restarts; None if no elastic launcher started it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a rendezvous all jobs are called "none"; the launcher's process stays through restarts.
    return f"{platform.node()}:{os.getppid()}" if run_id == "none" else run_id


def restarted() -> bool:
    """Whether the launcher restarted this job, because a process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


# -- the run's folder -------------------------------------------------------------------------------


class ReadOnlyRunFolder(RunFolder):
    """The run's folder in all processes but rank 0: methods that write do nothing."""

    def _skip(self, *args: Any, **kwargs: Any) -> None:
        pass

    create = write_record = write_best = write_step = drop_step = write_last = append_metrics = cut_metrics = _skip

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Rank 0 holds it for all."""
        yield

    def await_record(self) -> None:
        """Wait until this machine sees the run.

        Raises:
            RunError: it does not within `SHARED_FOLDER_SECONDS`.
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
    """The run's folder: writable for rank 0, read-only for the others."""
    return RunFolder(path) if world.is_rank0 else ReadOnlyRunFolder(path)


# -- the model --------------------------------------------------------------------------------------


class Parallel:
    """A model whose gradients, after `backward`, are averaged over the rows of all processes.

    Args:
        model: on its device, with equal weights in all processes.
        world: the processes.
        shard: spread weights, gradients and moments over the processes (FSDP2), instead of a copy in each.
        each_part: average the gradients of each part of a step, because they are moved away after it.
    """

    def __init__(self, model: LanguageModel, world: World, *, shard: bool, each_part: bool = False) -> None:
        self._model, self._world, self._each_part = model, world, each_part
        self._sharded: Any = None
        self._copies: DistributedDataParallel | None = None
        self._sparse: list[nn.Parameter] = []
        if world.size > 1 and shard:
            self._sharded = _shard(model, world)
        elif world.size > 1:
            self._copies, self._sparse = _copy(model)

    @property
    def sharded(self) -> bool:
        """Whether all processes must take part in each forward pass."""
        return self._sharded is not None

    def training_loss(self, *args: Any, **kwargs: Any) -> TrainingLoss:
        """See `LanguageModel.training_loss`; of this process's rows."""
        loss: Callable[..., TrainingLoss] = self._copies or self._model.training_loss
        return loss(*args, **kwargs)

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a part of a step: gradients are averaged with the last one only."""
        last_dense = last or self._each_part
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last_dense)
        held = self._copies.no_sync() if self._copies is not None and not last_dense else contextlib.nullcontext()
        with held:
            yield
        if last:
            for parameter in self._sparse:
                _average_sparse_grad(parameter, self._world)

    def drop_gradients(self) -> None:
        """Forget the gradients of earlier parts of a step that is skipped; the optimizers' own are theirs to clear."""
        if self._sharded is None:
            return
        from torch.distributed.fsdp import FSDPModule

        # They are in the whole weights, which FSDP keeps next to the shards that optimizers see.
        for module in self._sharded.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                for parameter in module.parameters(recurse=True):  # type: ignore[attr-defined]
                    parameter.grad = None
                module.reshard()


class _Loss(nn.Module):
    """A module whose forward is the training loss, for DistributedDataParallel."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> TrainingLoss:
        """See `LanguageModel.training_loss`."""
        return self.model.training_loss(*args, **kwargs)


def _copy(model: LanguageModel) -> tuple[DistributedDataParallel, list[nn.Parameter]]:
    """A copy of the model in each process, and the parameters with sparse gradients, which it ignores."""
    module = _Loss(model)
    by_rows = {p: True for p, needs in module_needs(model).items() if needs.optimizer_kind == "row_adagrad"}
    ignore_in_ddp(module, [name for name, parameter in module.named_parameters() if parameter in by_rows])
    # A tied embedding gets a dense gradient from the output layer, to which its sparse one is added.
    sparse: list[Any] = [part for part in model.modules() if getattr(part, "sparse", False)]
    for part in sparse:
        part.sparse = False
    copies = DistributedDataParallel(module, gradient_as_bucket_view=True)
    for part in sparse:
        part.sparse = True
    return copies, list(by_rows)


def _average_sparse_grad(parameter: nn.Parameter, world: World) -> None:
    """Replace a gradient by the mean over all processes; a sparse one has their rows one after the other."""
    if parameter.grad is None:
        return
    if not parameter.grad.is_sparse:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world.size
        return
    grad = parameter.grad.coalesce()
    rows, values = grad.indices()[0], grad.values() / world.size
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(count) for count in counts]
    longest = max(lengths)
    # All processes send the same number of rows; the padding is cut off again.
    all_rows = [rows.new_empty(longest) for _ in lengths]
    all_values = [values.new_empty(longest, values.shape[1]) for _ in lengths]
    dist.all_gather(all_rows, nn.functional.pad(rows, (0, longest - len(rows))))
    dist.all_gather(all_values, nn.functional.pad(values, (0, 0, 0, longest - len(rows))))
    rows = torch.cat([part[:length] for part, length in zip(all_rows, lengths, strict=True)])
    values = torch.cat([part[:length] for part, length in zip(all_values, lengths, strict=True)])
    parameter.grad = torch.sparse_coo_tensor(rows[None], values, parameter.shape, check_invariants=False)


def _shard(model: LanguageModel, world: World) -> Any:
    """Spread the model over the processes: each block of a list of blocks separately, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # FSDP finds an output's tensors through pytree; else backward would not gather the weights again.
    for kind in (State, TrainingLoss):
        register_tree(kind)
    # Native layers keep the addresses of their weights from forward to backward: on the CPU the weights stay gathered.
    device = next(model.parameters()).device
    frees = device.type != "cpu"
    # Without a mesh FSDP takes the GPU of the machine, even for a model on the CPU.
    mesh = init_device_mesh(device.type, (world.size,))
    for blocks in [part for part in model.modules() if isinstance(part, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=frees)
    fully_shard(model, mesh=mesh)
    for method in ("training_loss", "target_scores"):
        register_fsdp_forward_method(model, method)
    # It warns of outputs that are views, in case they are changed in place; none is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    return model


if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
