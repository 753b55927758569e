"""The runs that are offered, loaded when first asked for, evicted when memory is short, and swapped when retrained.

Names from requests are looked up in the list that was made at the start, and never become part of a path.

    lease = await models.lease("shakespeare-gru")       # loads it where needed
    try:
        job = lease.model.worker.start(...)
    finally:
        lease.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lm.errors import ConfigError, LMError
from lm.generation.decoder import Decoder
from lm.runs.run import Run
from lm.tokenizers.base import Tokenizer
from serve.engines.available_runs import AvailableRun, FoundRuns, find_runs
from serve.engines.codec import TokenCodec
from serve.engines.worker import Worker
from serve.http_errors import RequestError, engine_died, model_not_found, no_model, too_many_requests
from serve.settings import ServeOptions

log = logging.getLogger(__name__)

RETRY_SECONDS = 5
"""Retry-After where every loaded model is in use and there is no room for another."""


@dataclass(eq=False)
class Model:
    """A loaded run: what answers requests are made with."""

    name: str
    fingerprint: tuple[object, ...]
    decoder: Decoder
    tokenizer: Tokenizer
    tokens: TokenCodec
    worker: Worker
    memory_bytes: int
    leases: int = 0
    used: int = 0
    """Greater, the later it was used."""
    retired: bool = False
    request_seconds: float = field(default=1.0)
    """What a request takes: a moving average."""


class Lease:
    """A model that stays loaded until `close`."""

    def __init__(self, models: ModelPool, model: Model) -> None:
        self._models, self.model, self._open = models, model, True
        self._began = time.monotonic()
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
            self.model.request_seconds += 0.1 * (time.monotonic() - self._began - self.model.request_seconds)
            self._models.release(self.model)


class ModelPool:
    """The models of one server. Used from one event loop, except where it says otherwise."""

    def __init__(self, options: ServeOptions, *, may_be_empty: bool = False) -> None:
        self._options = options
        self._available_runs, self._skipped = find_runs(options, may_be_empty=may_be_empty)
        self._loaded: dict[str, Model] = {}
        self._retired: set[Model] = set()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._claims: Counter[str] = Counter()
        """Requests by the model that they are about to lease."""
        self._reloading = asyncio.Lock()
        self._clock = itertools.count(1)
        self._reserved = 0
        self.evictions = 0

    # -- what there is ------------------------------------------------------------------------------

    @property
    def available_runs(self) -> dict[str, AvailableRun]:
        """By name, in the order asked for, else the newest first."""
        return self._available_runs

    offers = available_runs

    @property
    def skipped(self) -> dict[str, str]:
        """Why runs were not offered, or could not be loaded when they were last asked for."""
        return self._skipped

    @property
    def loaded(self) -> dict[str, Model]:
        """By name."""
        return self._loaded

    @property
    def engines(self) -> Iterator[Model]:
        """Every model that has a thread, those included that only finish what they began."""
        return itertools.chain(self._loaded.values(), self._retired)

    @property
    def in_use(self) -> bool:
        """Whether anybody waits for a model's work."""
        return any(model.leases for model in self.engines)

    @property
    def healthy(self) -> bool:
        """False while an engine that requests would go to is dead."""
        return all(model.worker.healthy for model in self._loaded.values())

    def resolve(self, name: str | None) -> str:
        """The name of an offered model; None is the first.

        Raises:
            RequestError: 404, or 500 for a run that was skipped.
        """
        if name in self._skipped and name not in self._available_runs:
            raise self._refusal(name)
        if not self._available_runs:
            raise no_model()
        if name is None:
            return next(iter(self._available_runs))
        if name not in self._available_runs:
            raise model_not_found(name, self._available_runs)
        return name

    # -- using them ---------------------------------------------------------------------------------

    async def lease(self, name: str | None) -> Lease:
        """The model, loaded.

        Raises:
            RequestError: 404 no such model, 503 no room for it, 500 its files are damaged or its engine died.
        """
        name = self.resolve(name)
        self._claims[name] += 1
        try:
            while (model := self._loaded.get(name)) is None:
                await self._loading_of(self.resolve(name))
        finally:
            self._claims[name] -= 1
        # Nothing is awaited between the look into `_loaded` and the lease: nobody can take the model away there.
        model.used = next(self._clock)
        if not model.worker.healthy:
            raise engine_died(name)
        return Lease(self, model)

    def _loading_of(self, name: str) -> asyncio.Future[None]:
        """The load of a model, begun where it is not under way."""
        task = self._loading.get(name)
        if task is None or task.done():
            task = self._loading[name] = asyncio.create_task(self._load(self._available_runs[name]))
            task.add_done_callback(lambda task: self._loading_done(name, task))
        # A request that gives up must not take the load from the others.
        return asyncio.shield(task)

    def _loading_done(self, name: str, task: asyncio.Task[None]) -> None:
        if self._loading.get(name) is task:
            del self._loading[name]
        if not task.cancelled():
            # Looked at, so that an error for which nobody waits any more is no news of its own.
            task.exception()

    async def _load(self, offer: AvailableRun) -> None:
        """Load a model, unless its files change while they are read.

        Raises:
            RequestError: see `lease`.
        """
        name, reserved = offer.name, 0
        try:
            needed = await asyncio.to_thread(offer.memory_bytes, self._options)
            self._make_room(name, needed)
            reserved = needed
            self._reserved += reserved
            model = await asyncio.to_thread(self.open, offer)
            if not self._is_current(offer, model):
                # The run was deleted or trained again meanwhile: who still wants it looks again.
                model.worker.stop()
                return
        except RequestError:
            raise
        except Exception as error:
            self._failed(offer, error)
            raise self._refusal(name) from None
        finally:
            self._reserved -= reserved
        self._loaded[name] = model
        self._skipped.pop(name, None)

    def _is_current(self, offer: AvailableRun, model: Model) -> bool:
        """Whether a model that was just loaded is what the offer stands for now."""
        # Deleted files that no reload has noticed yet: what was read of them is served.
        with contextlib.suppress(OSError):
            return self._available_runs.get(offer.name) == offer and offer.fingerprint() == model.fingerprint
        return True

    @staticmethod
    def _refusal(name: str) -> RequestError:
        return RequestError(500, f"The model {name!r} cannot be loaded; the server's log says why.")

    def _failed(self, offer: AvailableRun, error: Exception) -> None:
        """Note why a run cannot be loaded: any exception, since damaged files may hold anything."""
        self._skipped[offer.name] = offer.reason(error)
        unforeseen = not isinstance(error, LMError | OSError | RequestError)
        log.error("Model %r cannot be loaded. %s", offer.name, error, exc_info=error if unforeseen else None)

    def _log_skipped(self) -> None:
        for name, reason in self._skipped.items():
            log.warning("Run %r is skipped. %s", name, reason)

    def preload(self) -> None:
        """Load the named runs while there is room, before the server takes requests; needs no event loop.

        Raises:
            LMError: one of them cannot be loaded.
        """
        self._log_skipped()
        if not self._options.runs:
            return
        limit = self._options.max_memory
        for offer in self._available_runs.values():
            needed = offer.memory_bytes(self._options)
            if limit is not None and needed > limit:
                raise ConfigError(f"Run {offer.name!r} needs about {needed:,} bytes, more than --max-memory {limit:,}.")
            if limit is None or self._used + needed <= limit:
                self._loaded[offer.name] = self.open(offer)

    def open(self, offer: AvailableRun) -> Model:
        """A loaded model, with its thread; may run in any thread.

        Raises:
            LMError: the run is damaged.
        """
        options = self._options
        # All that the files say comes before the thread is made, which nobody would stop if they were gone by then.
        begun, fingerprint, memory_bytes = time.monotonic(), offer.fingerprint(), offer.memory_bytes(options)
        run = Run(offer.folder, offer.checkpoint, device=options.device, precision=options.precision)
        engine = run.engine(
            max_batch=options.max_batch, prefix_cache_bytes=int(options.prefix_cache),
            state_bytes=int(options.state_memory),
        )  # fmt: skip
        model = Model(
            name=offer.name,
            fingerprint=fingerprint,
            decoder=engine.decoder,
            tokenizer=run.tokenizer,
            tokens=TokenCodec(run.tokenizer),
            worker=Worker(engine, offer.name, max_sequences=options.max_sequences),
            memory_bytes=memory_bytes,
            used=next(self._clock),
        )
        log.info(
            "Loaded %r.",
            offer.name,
            extra={"fields": {"decoder": engine.decoder.name, "seconds": round(time.monotonic() - begun, 3)}},
        )
        return model

    # -- memory ---------------------------------------------------------------------------------------

    @property
    def _used(self) -> int:
        return self._reserved + sum(model.memory_bytes for model in self.engines)

    @property
    def memory_bytes(self) -> int:
        """What the loaded models are reckoned to take."""
        return self._used

    def _make_room(self, name: str, needed: int) -> None:
        """Evict idle models, the longest unused first, until there is room for one more.

        Raises:
            RequestError: there would not be enough room; then no model is evicted.
        """
        limit = self._options.max_memory
        if limit is None:
            return
        if needed > limit:
            raise RequestError(503, f"The model {name!r} needs more memory than this server gives to models.")
        idle = [model for model in self._loaded.values() if not model.leases and not self._claims[model.name]]
        idle.sort(key=lambda model: model.used)
        if self._used + needed - sum(model.memory_bytes for model in idle) > limit:
            raise too_many_requests(
                RETRY_SECONDS, f"There is no room for the model {name!r} while the loaded ones are in use."
            )
        while self._used + needed > limit:
            victim = idle.pop(0)
            self.evictions += 1
            log.info("Evicted %r.", victim.name, extra={"fields": {"memory_bytes": victim.memory_bytes}})
            self._retire(victim)

    def _retire(self, model: Model) -> None:
        """Take a model out of service; it goes once nobody uses it."""
        if self._loaded.get(model.name) is model:
            del self._loaded[model.name]
        model.retired = True
        self._retired.add(model)
        self.release(model)

    def release(self, model: Model) -> None:
        """Forget a retired model that nobody uses."""
        if model.retired and not model.leases and model in self._retired:
            self._retired.remove(model)
            model.worker.stop()
            gc.collect()

    # -- retrained runs -------------------------------------------------------------------------------

    async def reload(self) -> dict[str, str]:
        """Look at the runs again and swap in those that were trained again; streams go on with the weights they have.

        Returns:
            What became of each model that was loaded: "unchanged", "reloaded", "gone", or "failed" (then the old one
            stays in service; the log and `skipped` say why).
        """
        outcome = {}
        async with self._reloading:
            try:
                self._list(await asyncio.to_thread(find_runs, self._options, again=True))
            except (LMError, OSError) as error:
                log.error("The list of runs stays as it was. %s", error)
            for name, model in list(self._loaded.items()):
                outcome[name] = await self._reload(name, model)
        log.info("Reloaded.", extra={"fields": {"models": outcome}})
        return outcome

    def _list(self, found: FoundRuns) -> None:
        """Offer what was found; a model that is loaded is offered also where its run cannot be read any more."""
        kept = {
            name: self._available_runs[name]
            for name in found.skipped
            if name in self._loaded and name in self._available_runs
        }
        self._available_runs, self._skipped = {**found.runs, **kept}, dict(found.skipped)
        self._log_skipped()

    async def refresh(self) -> None:
        """Reload where another process made, deleted or retrained a run; else do nothing.

        A page calls it whenever somebody looks at what is on offer.
        """
        options, offers, skipped = self._options, dict(self._available_runs), set(self._skipped)
        loaded = {name: model.fingerprint for name, model in self._loaded.items()}

        def same() -> bool:
            found = find_runs(options, again=True)
            known = {name: offer for name, offer in offers.items() if name not in found.skipped}
            return (
                found.runs == known
                and skipped >= set(found.skipped)
                and all(offer.fingerprint() == loaded[name] for name, offer in known.items() if name in loaded)
            )

        # What stands in the way, reload says in the log.
        with contextlib.suppress(LMError, OSError):
            if await asyncio.to_thread(same):
                return
        await self.reload()

    async def include(self, name: str) -> None:
        """Offer one more run of the runs folder, one that was trained since.

        Raises:
            LMError: it cannot be offered; the others are as before.
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
            if name in self._loaded:
                # Somebody used it while it was being trained.
                await self._reload(name, self._loaded[name])

    async def _reload(self, name: str, old: Model) -> str:
        offer = self._available_runs.get(name)
        if offer is None:
            self._retire(old)
            return "gone"
        if name in self._skipped:
            return "failed"
        reserved = 0
        try:
            if old.worker.healthy and offer.fingerprint() == old.fingerprint:
                return "unchanged"
            needed = await asyncio.to_thread(offer.memory_bytes, self._options)
            limit, idle = self._options.max_memory, not old.leases and not self._claims[name]
            if limit is not None and self._used + needed > limit and idle:
                # No room for both, and nobody uses the old one: who asks next loads the new files.
                self._retire(old)
                return "reloaded"
            self._make_room(name, needed)
            reserved = needed
            self._reserved += reserved
            new = await asyncio.to_thread(self.open, offer)
        except Exception as error:
            self._failed(offer, error)
            return "failed"
        finally:
            self._reserved -= reserved
        if self._loaded.get(name) is old:
            self._retire(old)
            self._loaded[name] = new
        else:
            # The old one made room for another model meanwhile: who asks next loads the new files, or has done so.
            new.worker.stop()
        return "reloaded"

    def close(self) -> None:
        """Stop every engine, and forget the models."""
        stopped = [model.worker for model in self.engines]
        for worker in stopped:
            worker.stop()
        for worker in stopped:
            worker.join()
        self._loaded.clear()
        self._retired.clear()
