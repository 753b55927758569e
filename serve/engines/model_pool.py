"""The models of a server: loaded on the first request, evicted when memory is short, replaced when trained again.

Names in requests are looked up in the list of available runs. They never become part of a path.

    with await models.lease("shakespeare-gru") as model:       # loads it if needed
        job = model.worker.start(...)
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lm.errors import ConfigError, LMError
from lm.generation.decoder import Decoder
from lm.registry import did_you_mean
from lm.runs.run import Run
from lm.tokenizers.base import Tokenizer
from serve.engines.available_runs import AvailableRun, FoundRuns, find_runs
from serve.engines.codec import TokenCodec
from serve.engines.worker import Worker
from serve.http_errors import MAX_SHOWN, RequestError, engine_died, too_many_requests
from serve.settings import ServeOptions

log = logging.getLogger(__name__)

RETRY_SECONDS = 5
"""Retry-After if there is no memory for a model while the loaded ones are in use."""


@dataclass(eq=False)
class Model:
    """A loaded run with its engine."""

    name: str
    fingerprint: tuple[object, ...]
    decoder: Decoder
    tokenizer: Tokenizer
    tokens: TokenCodec
    worker: Worker
    memory_bytes: int
    sampling: Mapping[str, Any]
    """Options for what a request does not give."""
    chat_sampling: Mapping[str, Any]
    """The same for a chat."""
    learned_turns: bool = False
    """Whether it learned conversations without a chat template, as plain turns."""
    leases: int = 0
    last_used: int = 0
    """A counter: the larger, the later."""
    retired: bool = False
    """Whether it only finishes the requests that it has."""
    request_seconds: float = field(default=1.0)
    """Moving average of the time of a request."""


class Lease:
    """Keeps a model loaded until `close`."""

    def __init__(self, models: ModelPool, model: Model) -> None:
        self._models, self.model, self._open = models, model, True
        self._started = time.monotonic()
        model.leases += 1

    def __enter__(self) -> Model:
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back. May be called twice."""
        if self._open:
            self._open = False
            self.model.leases -= 1
            self.model.request_seconds += 0.1 * (time.monotonic() - self._started - self.model.request_seconds)
            self._models.release(self.model)


class ModelPool:
    """The models of one server. Used from one event loop, except where a docstring says otherwise."""

    def __init__(self, options: ServeOptions, *, may_be_empty: bool = False) -> None:
        self.available_runs, self.skipped = find_runs(options, may_be_empty=may_be_empty)
        """By model name: the runs in the order of `--runs`, or the newest first; and why a run cannot be loaded."""
        self.loaded: dict[str, Model] = {}
        self.evictions = 0
        self._options = options
        self._retired: set[Model] = set()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._pending_leases: Counter[str] = Counter()
        """Requests that wait in `lease`, by model."""
        self._reloading = asyncio.Lock()
        self._clock = itertools.count(1)
        self._reserved_bytes = 0

    @property
    def engines(self) -> Iterator[Model]:
        """Every model with a thread, also retired ones."""
        return itertools.chain(self.loaded.values(), self._retired)

    @property
    def in_use(self) -> bool:
        """Whether a request uses a model."""
        return any(model.leases for model in self.engines)

    @property
    def dead(self) -> list[str]:
        """Loaded models whose engine has failed."""
        return [name for name, model in self.loaded.items() if not model.worker.healthy]

    def resolve(self, name: str | None) -> str:
        """The name of an available model; None is the first.

        Raises:
            RequestError: 404, or 500 for a run that was skipped.
        """
        if name in self.skipped and name not in self.available_runs:
            raise self._cannot_load(name)
        if not self.available_runs:
            message = "There is no model yet: train one on the page or with lm train FILE."
        elif name is None:
            return next(iter(self.available_runs))
        elif name in self.available_runs:
            return name
        elif "+" in name and (adapter := self._by_pair(name)) is not None:
            return adapter
        else:
            hint = did_you_mean(name[:MAX_SHOWN], self.available_runs)
            message = f"The model {name[:MAX_SHOWN]!r} does not exist.{hint} See GET /v1/models."
        raise RequestError(404, message, code="model_not_found", param="model")

    def _by_pair(self, name: str) -> str | None:
        """The name of the available adapter that RUN+ADAPTER names."""
        return next((own for own, run in self.available_runs.items() if run.pair == name), None)

    # -- loading ------------------------------------------------------------------------------------

    async def lease(self, name: str | None) -> Lease:
        """A lease of the model, loaded.

        Raises:
            RequestError: 404 no such model, 503 no memory for it, 500 its files are damaged or its engine died.
        """
        name = self.resolve(name)
        self._pending_leases[name] += 1
        try:
            while (model := self.loaded.get(name)) is None:
                await self._start_loading(self.resolve(name))
        finally:
            self._pending_leases[name] -= 1
        # No await between the look-up and the lease: nothing can evict the model in between.
        model.last_used = next(self._clock)
        if not model.worker.healthy:
            raise engine_died(name)
        return Lease(self, model)

    def _start_loading(self, name: str) -> asyncio.Future[None]:
        """The load of a model, shared by all requests for it."""
        task = self._loading.get(name)
        if task is None or task.done():
            task = self._loading[name] = asyncio.create_task(self._load(self.available_runs[name]))
            task.add_done_callback(lambda task: self._loading_done(name, task))
        # A cancelled request does not cancel the load for the others.
        return asyncio.shield(task)

    def _loading_done(self, name: str, task: asyncio.Task[None]) -> None:
        if self._loading.get(name) is task:
            del self._loading[name]
        if not task.cancelled():
            # Read it, or asyncio logs an error that no code reads.
            task.exception()

    async def _load(self, run: AvailableRun) -> None:
        """Load a model, unless its files change meanwhile.

        Raises:
            RequestError: see `lease`.
        """
        try:
            model = await self._open_within_memory(run)
        except RequestError:
            raise
        except Exception as error:
            self._failed(run, error)
            raise self._cannot_load(run.name) from None
        if not self._is_current(run, model):
            # The run was deleted or trained again meanwhile: a request that still waits loads it again.
            model.worker.stop()
            return
        self.loaded[run.name] = model
        self.skipped.pop(run.name, None)

    def _is_current(self, run: AvailableRun, model: Model) -> bool:
        """Whether a model that was just loaded is the current version of the run."""
        # If files were deleted and no reload has noticed, the model is served.
        with contextlib.suppress(OSError):
            return self.available_runs.get(run.name) == run and run.fingerprint() == model.fingerprint
        return True

    @staticmethod
    def _cannot_load(name: str) -> RequestError:
        return RequestError(500, f"The model {name!r} cannot be loaded. See the server's log.")

    def _failed(self, run: AvailableRun, error: Exception) -> None:
        """Record why a run cannot be loaded. Damaged files may cause any exception."""
        self.skipped[run.name] = run.reason(error)
        unexpected = not isinstance(error, LMError | OSError | RequestError)
        log.error("Model %r cannot be loaded. %s", run.name, error, exc_info=error if unexpected else None)

    def preload(self) -> None:
        """Load the named runs that fit into memory, before the server starts. Needs no event loop.

        Raises:
            LMError: a run cannot be loaded.
        """
        self._log_skipped()
        if not self._options.runs:
            return
        limit = self._options.max_memory
        for run in self.available_runs.values():
            needed = run.memory_bytes(self._options)
            if limit is not None and needed > limit:
                raise ConfigError(f"Run {run.name!r} needs about {needed:,} bytes, more than --max-memory {limit:,}.")
            if limit is None or self.memory_bytes + needed <= limit:
                self.loaded[run.name] = self.open(run)

    def open(self, run: AvailableRun) -> Model:
        """A loaded model with its thread. Runs in any thread.

        Raises:
            LMError: the run is damaged.
        """
        options = self._options
        # Read all files before the thread starts: an error would leave the thread running.
        started, fingerprint, memory_bytes = time.monotonic(), run.fingerprint(), run.memory_bytes(options)
        loaded = Run(run.folder, run.checkpoint, device=options.device, precision=options.precision)
        engine = loaded.engine(
            max_batch=options.max_batch, prefix_cache_bytes=int(options.prefix_cache),
            state_bytes=int(options.state_memory), joined=options.joined_decoding,
        )  # fmt: skip
        tokenizer = loaded.tokenizer
        model = Model(
            run.name, fingerprint, engine.decoder, tokenizer, TokenCodec(tokenizer),
            Worker(engine, run.name, max_sequences=options.max_sequences), memory_bytes,
            sampling=loaded.sampling_defaults(), chat_sampling=loaded.sampling_defaults(chat=True),
            learned_turns=tokenizer.chat_template is None and bool(loaded.record["corpus"].get("conversations")),
            last_used=next(self._clock),
        )  # fmt: skip
        seconds = round(time.monotonic() - started, 3)
        log.info("Loaded %r.", run.name, extra={"fields": {"decoder": engine.decoder.name, "seconds": seconds}})
        return model

    # -- memory ---------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of all models, also of those that are being loaded."""
        return self._reserved_bytes + sum(model.memory_bytes for model in self.engines)

    async def _open_within_memory(self, run: AvailableRun) -> Model:
        """`open` in a thread, after evictions if memory is short. Reserves the memory meanwhile.

        Raises:
            Exception: see `open` and `_make_room`.
        """
        needed = await asyncio.to_thread(run.memory_bytes, self._options)
        self._make_room(run.name, needed)
        self._reserved_bytes += needed
        try:
            return await asyncio.to_thread(self.open, run)
        finally:
            self._reserved_bytes -= needed

    def _make_room(self, name: str, needed: int) -> None:
        """Evict idle models, the least recently used first, until `needed` bytes are free.

        Raises:
            RequestError: that is not possible; then no model is evicted.
        """
        limit = self._options.max_memory
        if limit is None:
            return
        if needed > limit:
            raise RequestError(503, f"The model {name!r} needs more memory than this server has for models.")
        idle = [model for model in self.loaded.values() if self._is_idle(model)]
        idle.sort(key=lambda model: model.last_used)
        if self.memory_bytes + needed - sum(model.memory_bytes for model in idle) > limit:
            raise too_many_requests(
                RETRY_SECONDS, f"There is no memory for the model {name!r} while the loaded models are in use."
            )
        while self.memory_bytes + needed > limit:
            evicted = idle.pop(0)
            self.evictions += 1
            log.info("Evicted %r.", evicted.name, extra={"fields": {"memory_bytes": evicted.memory_bytes}})
            self._retire(evicted)

    def _is_idle(self, model: Model) -> bool:
        return not model.leases and not self._pending_leases[model.name]

    def _retire(self, model: Model) -> None:
        """Give a model no new requests, and unload it when the last one ends."""
        if self.loaded.get(model.name) is model:
            del self.loaded[model.name]
        model.retired = True
        self._retired.add(model)
        self.release(model)

    def release(self, model: Model) -> None:
        """Unload a retired model that no request uses."""
        if model in self._retired and not model.leases:
            self._retired.remove(model)
            model.worker.stop()
            gc.collect()

    # -- retrained runs -------------------------------------------------------------------------------

    async def reload(self) -> dict[str, str]:
        """List the runs again and load those that were trained again. Open streams keep their weights.

        Returns:
            By loaded model: "unchanged", "reloaded", "gone", or "failed". After "failed" the old model stays, and the
            log and `skipped` have the reason.
        """
        outcome = {}
        async with self._reloading:
            try:
                self._list(await asyncio.to_thread(find_runs, self._options, again=True))
            except (LMError, OSError) as error:
                log.error("The list of runs is not updated. %s", error)
            for name, model in list(self.loaded.items()):
                outcome[name] = await self._reload(name, model)
        log.info("Reloaded.", extra={"fields": {"models": outcome}})
        return outcome

    def _list(self, found: FoundRuns) -> None:
        """Update the available runs. A loaded model stays available if its run cannot be read any more."""
        available = self.available_runs
        still_loaded = {name: available[name] for name in found.skipped if name in self.loaded and name in available}
        self.available_runs, self.skipped = {**found.runs, **still_loaded}, dict(found.skipped)
        self._log_skipped()

    def _log_skipped(self) -> None:
        for name, reason in self.skipped.items():
            log.warning("Run %r is skipped. %s", name, reason)

    async def refresh(self) -> None:
        """Reload if another process added, deleted or retrained a run. The page calls it when it shows the models."""
        options, available, skipped = self._options, dict(self.available_runs), set(self.skipped)
        loaded = {name: model.fingerprint for name, model in self.loaded.items()}

        def is_unchanged() -> bool:
            found = find_runs(options, again=True)
            known = {name: run for name, run in available.items() if name not in found.skipped}
            return (
                found.runs == known
                and skipped >= set(found.skipped)
                and all(run.fingerprint() == loaded[name] for name, run in known.items() if name in loaded)
            )

        # reload logs the same error.
        with contextlib.suppress(LMError, OSError):
            if await asyncio.to_thread(is_unchanged):
                return
        await self.reload()

    async def include(self, name: str) -> None:
        """Make one more run of the runs folder available, after its training.

        Raises:
            LMError: it cannot be served; the other runs do not change.
        """
        async with self._reloading:
            options = self._options
            if options.runs and name not in options.runs:
                options = options.model_copy(update={"runs": (*options.runs, name)})
            found = await asyncio.to_thread(find_runs, options, again=True)
            if name in found.skipped:
                raise ConfigError(f"Run {name!r} cannot be served: {found.skipped[name]}")
            self._list(found)
            self._options = options
            if name in self.loaded:
                # A request used it during its training.
                await self._reload(name, self.loaded[name])

    async def _reload(self, name: str, old: Model) -> str:
        run = self.available_runs.get(name)
        if run is None:
            self._retire(old)
            return "gone"
        if name in self.skipped:
            return "failed"
        try:
            if old.worker.healthy and run.fingerprint() == old.fingerprint:
                return "unchanged"
            needed = await asyncio.to_thread(run.memory_bytes, self._options)
            limit = self._options.max_memory
            if limit is not None and self.memory_bytes + needed > limit and self._is_idle(old):
                # There is no memory for both, and the old one is idle: the next request loads the new files.
                self._retire(old)
                return "reloaded"
            new = await self._open_within_memory(run)
        except Exception as error:
            self._failed(run, error)
            return "failed"
        if self.loaded.get(name) is old:
            self._retire(old)
            self.loaded[name] = new
        else:
            # The old model was evicted meanwhile: the next request loads the new files, or one has loaded them.
            new.worker.stop()
        return "reloaded"

    def close(self) -> None:
        """Stop every engine and unload the models."""
        workers = [model.worker for model in self.engines]
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
        self.loaded.clear()
        self._retired.clear()
