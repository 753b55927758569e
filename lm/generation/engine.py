"""The engine: many requests at once through one decoder, each text as if it were alone.

    engine = Engine(decoder, tokenizer)
    for event in engine.run(Request(prompt=(tokenizer.start_id, *ids), options=SamplingOptions(seed=7))):
        print(event.text, end="")

Or, where others decide when to compute: `submit` from any thread, `step` on one thread until it says False, and
`Generation.take` for the news. Requests join and leave at any step; what one gives depends on the request alone.

    waiting ──► prompts (64 tokens a step, in turns) ──► running (a token a step, all together) ──► ended
       ▲                                                  │ drew QUANTUM tokens while others wait
       └──────────────────────────────────────────────────┘

`pause` takes a request's samples out of the round, without slots, until `resume`: for news that nobody reads yet.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lm.errors import ConfigError
from lm.generation.beams import Beams
from lm.generation.decoder import Decoder, Logits
from lm.generation.options import SamplingOptions
from lm.generation.prefill import PREFILL_CHUNK, Prompts, Reading
from lm.generation.prefix_cache import PrefixCache
from lm.generation.request import Event, Generation, Record, Request, Score, Usage
from lm.generation.sampler import Sampler
from lm.generation.sequence import Sample
from lm.generation.token_scores import score_rows
from lm.tokenizers.base import Tokenizer

__all__ = ["PREFILL_CHUNK", "QUANTUM", "Engine", "EngineStats", "Event", "Generation", "Request", "Score", "Usage"]

QUANTUM = 256
"""Tokens that a sample draws before it makes room, if others wait."""

Job = Reading | Sample | Beams


@dataclass(frozen=True)
class EngineStats:
    """What the engine is at, and what it has done so far."""

    running: int
    """Samples and searches that draw."""
    prefilling: int
    """Requests whose prompt is being read."""
    waiting: int
    """Requests that have not begun, and samples that made room or are paused."""
    slots: int
    """Slots held; at most `Engine.max_batch`."""
    steps: int
    drawn_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    """Tokens of prompts that did not have to be read again."""
    cache_bytes: int


@dataclass
class _Task:
    """What the engine knows of a request."""

    samples: list[Sample] = field(default_factory=list)
    """Empty until the prompt is read, and where beams are searched."""
    live: int = 0
    """Samples that are not over."""


class _JobCounts(NamedTuple):
    """Where the jobs were at one moment between two steps."""

    running: int = 0
    prefilling: int = 0
    waiting: int = 0
    """Of the requests that were taken in."""
    slots: int = 0
    taken: int = 0
    """Requests taken in until then."""


class _Group:
    """Samples that one sampler draws for."""

    def __init__(self, sampler: Sampler, samples: list[Sample]) -> None:
        self.sampler = sampler
        self.samples = samples
        self.contexts = [sample.context for sample in samples]
        self.alternatives = max((sample.alternatives for sample in samples), default=-1)
        """The most that one of them wants to be told; -1 where no scores are kept."""


class Engine:
    """Draws for many requests at once.

    `submit`, `cancel`, `resume` and `stats` may be called from any thread; `step`, `run` and `pause` from one at a
    time.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, *, max_batch: int = 32, prefix_cache_bytes: int = 64 * 2**20
    ) -> None:
        """An engine without requests.

        Args:
            decoder: of the model.
            tokenizer: of the model.
            max_batch: samples computed together; each takes a slot of the decoder.
            prefix_cache_bytes: memory for the states of prompt starts.
        """
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.max_batch = max_batch if decoder.max_slots is None else min(max_batch, decoder.max_slots)
        # From other threads; a deque's ends are safe to share.
        self._submitted: deque[Reading] = deque()
        self._submitted_count = self._taken_count = 0
        """Requests that were submitted so far, and those of them that the stepping thread has taken in."""
        self._submit_lock = threading.Lock()
        self._jobs_now = _JobCounts()
        self._cancelled: deque[Generation] = deque()
        self._resumed: deque[Generation] = deque()
        self._tasks: dict[Generation, _Task] = {}
        self._waiting: deque[Job] = deque()
        self._paused: dict[Generation, list[Job]] = {}
        self._cache = PrefixCache(prefix_cache_bytes)
        self._prompts = Prompts(decoder, self._cache)
        self._running: list[Sample] = []
        self._searching: list[Beams] = []
        self._free = self.max_batch
        self._groups: list[_Group] | None = None
        """The running samples by who draws for them; None when that has changed."""
        self._slots: list[int] = []
        self._samplers: tuple[SamplingOptions, tuple[Sampler, Sampler]] | None = None
        """Those of the last request: the prompts of one request have their options in common."""
        self._news: dict[Generation, None] = {}
        self._steps = self._drawn = 0

    # -- from any thread ------------------------------------------------------------------------

    def submit(self, request: Request, on_event: Callable[[Generation], None] | None = None) -> Generation:
        """Put a request in line.

        Args:
            request: what to draw.
            on_event: called on the stepping thread after each step in which the generation has news.

        Raises:
            ConfigError: the request cannot be done, whatever the model says.
        """
        generation = Generation(request, on_event)
        job = Reading(generation, self._check(request))
        with self._submit_lock:
            # Counted first: a request that is taken in was counted.
            self._submitted_count += 1
            self._submitted.append(job)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request; its slots are free at the next step."""
        self._cancelled.append(generation)

    def pause(self, generation: Generation) -> None:
        """Draw nothing more for a request until `resume`; its samples give their slots back and lose nothing.

        On the stepping thread, between steps or in `on_event`, once there is news of the request. It changes nothing
        for one that has ended.
        """
        if generation not in self._tasks or generation in self._paused:
            return
        running = [sample for sample in self._running if sample.generation is generation]
        for sample in running:
            sample.park(self.decoder)
            self._leave(sample)
        waiting = [job for job in self._waiting if job.generation is generation]
        self._waiting = deque(job for job in self._waiting if job.generation is not generation)
        self._paused[generation] = [*running, *waiting]
        self._count_jobs()

    def resume(self, generation: Generation) -> None:
        """Put the samples of a paused request in line again."""
        self._resumed.append(generation)

    def stats(self) -> EngineStats:
        """What the engine is at, after its last step: each request and sample that is not over is counted once."""
        jobs = self._jobs_now
        return EngineStats(
            running=jobs.running,
            prefilling=jobs.prefilling,
            waiting=jobs.waiting + self._submitted_count - jobs.taken,
            slots=jobs.slots,
            steps=self._steps,
            drawn_tokens=self._drawn,
            prefilled_tokens=self._prompts.tokens,
            cached_tokens=self._cache.found_tokens,
            cache_bytes=self._cache.nbytes,
        )

    def _count_jobs(self) -> None:
        """Let `stats` see where the jobs are: during a step, some are on their way between two lists."""
        self._jobs_now = _JobCounts(
            running=len(self._running) + len(self._searching),
            prefilling=len(self._prompts.jobs),
            waiting=len(self._waiting) + sum(map(len, self._paused.values())),
            slots=self.max_batch - self._free,
            taken=self._taken_count,
        )

    def _check(self, request: Request) -> tuple[Sampler, Sampler]:
        """The samplers before and after `min_tokens`."""
        if not request.prompt:
            raise ConfigError("The prompt is empty: an empty text begins with the tokenizer's start token.")
        size, options = self.tokenizer.vocab_size, request.options
        for token in request.bounds:
            if not 0 <= token < size:
                raise ConfigError(
                    f"Token {token} of the prompt is outside the vocabulary of {size} tokens. The ids were probably "
                    "made by another tokenizer."
                )
        if options.num_beams is not None and options.num_beams > self.max_batch:
            raise ConfigError(
                f"sampling.num_beams = {options.num_beams}: no more than {self.max_batch} texts are computed at once."
            )
        made = self._samplers
        if made is None or made[0] is not options:
            late = early = Sampler(options, self.tokenizer)
            if options.stop_tokens and options.min_tokens:
                early = Sampler(options, self.tokenizer, banned=options.stop_tokens)
            made = self._samplers = (options, (early, late))
        return made[1]

    # -- the loop -------------------------------------------------------------------------------

    def run(self, request: Request) -> Iterator[Event]:
        """Events of one request, as they are made; whoever else is in the engine is computed along.

        Closing the iterator cancels the request.
        """
        generation = self.submit(request)
        try:
            while not generation.done:
                self.step()
                yield from generation.take()
        finally:
            if not generation.done:
                self.cancel(generation)
                self._drop_cancelled()
                self._count_jobs()

    def step(self) -> bool:
        """One round: take requests in, read some of a prompt, draw one token for every running sample.

        Returns:
            False if there was nothing to do.
        """
        try:
            if self._cancelled:
                self._drop_cancelled()
            while self._resumed:
                self._waiting.extend(self._paused.pop(self._resumed.popleft(), ()))
            if self._submitted or self._waiting:
                self._admit()
            busy = bool(self._prompts.jobs or self._running or self._searching)
            if self._prompts.jobs:
                self._read_prompts()
            if self._running or self._searching:
                self._decode()
            self._steps += busy
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._count_jobs()
            if self._news:
                self._tell()
        return busy

    def _tell(self) -> None:
        news, self._news = self._news, {}
        for generation in news:
            if generation.on_event is not None and generation.records:
                generation.on_event(generation)

    # -- who has a slot -------------------------------------------------------------------------

    def _take_in(self) -> None:
        while self._submitted:
            job = self._submitted.popleft()
            self._taken_count += 1
            self._tasks[job.generation] = _Task()
            self._waiting.append(job)

    def _admit(self) -> None:
        self._take_in()
        while self._waiting:
            job = self._waiting[0]
            if job.slots_needed > self._free:
                self._make_room(job.slots_needed)
            if job.slots_needed > self._free:
                # Nobody overtakes: else a search for many slots would wait forever.
                return
            self._waiting.popleft()
            self._free -= job.slots_needed
            job.resume(self.decoder)
            if isinstance(job, Reading):
                self._prompts.add(job)
            elif isinstance(job, Beams):
                self._searching.append(job)
            else:
                self._running.append(job)
                self._groups = None

    def _make_room(self, slots: int) -> None:
        """Park who has drawn most since they got their slots, if that frees so many."""
        everybody: list[Sample | Beams] = [*self._running, *self._searching]
        long = [job for job in everybody if job.turn_tokens >= QUANTUM]
        long.sort(key=lambda job: -job.turn_tokens)
        if self._free + sum(job.slots_needed for job in long) < slots:
            return
        for job in long:
            if self._free < slots:
                job.park(self.decoder)
                self._leave(job)
                self._waiting.append(job)

    def _leave(self, job: Sample | Beams) -> None:
        """Take a job from those that run."""
        if isinstance(job, Beams):
            self._searching.remove(job)
        else:
            self._running.remove(job)
            self._groups = None
        job.close(self.decoder)
        self._free += job.slots_needed

    # -- from prompt to samples -----------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Read a chunk of one prompt, or of several short ones about as much."""
        enough = self._prompts.tokens + PREFILL_CHUNK
        while self._prompts.jobs and self._prompts.tokens < enough:
            read = self._prompts.read_chunk()
            if read is not None:
                self._begin(*read)

    def _begin(self, job: Reading, logits: Logits) -> None:
        """The prompt is read: make the samples, and draw the first token of each."""
        generation, slot = job.generation, job.slot
        request = generation.request
        assert slot is not None, "a prompt that was read has a slot"
        if request.score_prompt:
            generation.prompt_scores = tuple(job.scores)
        if request.keep_state:
            generation.state = self.decoder.export(slot)
        if request.keep_logits:
            generation.logits = logits.copy()
        self._news[generation] = None
        if request.options.num_beams is not None and request.options.max_tokens:
            beams = Beams(generation, self.tokenizer, job.samplers)
            beams.slots.append(slot)
            self._searching.append(beams)
            self._search(beams, logits)
            return
        task = self._tasks[generation]
        count = request.options.best_of or request.options.n
        task.samples = [
            Sample(
                generation, index, self.tokenizer, job.samplers,
                # Who may lose keeps its news to itself.
                deque() if request.options.best_of else generation.records,
            )
            for index in range(count)
        ]  # fmt: skip
        task.live = count
        if request.options.max_tokens:
            group = _Group(task.samples[0].sampler, task.samples)
            self._push(group, logits.repeat(count, axis=0))
            self._share(slot, [sample for sample in task.samples if not sample.is_done])
        else:
            for sample in task.samples:
                sample.end("length")
                self._ended(sample)
            self._share(slot, [])

    def _share(self, slot: int, samples: list[Sample]) -> None:
        """Let samples go on from one slot: the first in it, others in forks of it, the rest when there is room."""
        if not samples:
            self.decoder.close(slot)
            self._free += 1
            return
        samples[0].slot = slot
        forked = 1 + min(len(samples) - 1, self._free)
        for sample in samples[1:forked]:
            sample.slot = self.decoder.fork(slot)
            self._free -= 1
        if rest := samples[forked:]:
            snapshot = self.decoder.export(slot)
            for sample in rest:
                sample.wait(snapshot)
            self._waiting.extend(rest)
        self._running += samples[:forked]
        self._groups = None

    # -- drawing --------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Read the last token of everybody, and draw the next."""
        if self._groups is None:
            self._group()
            assert self._groups is not None
        slots, ids = self._slots, [sample.last for sample in self._running]
        if self._searching:
            slots = slots + [slot for beams in self._searching for slot in beams.slots]
            ids += [token for beams in self._searching for token in beams.last]
        logits = self.decoder.step(slots, ids)
        if self._searching:
            # They fork slots before all rows are used, which are good until the decoder's next call.
            logits = logits.copy()
        begin = 0
        for group in self._groups:
            end = begin + len(group.samples)
            if self._push(group, logits if end - begin == len(logits) else logits[begin:end]):
                for sample in group.samples:
                    if sample.is_done:
                        self._leave(sample)
            begin = end
        for beams in tuple(self._searching):
            end = begin + len(beams.slots)
            self._search(beams, logits[begin:end])
            begin = end

    def _group(self) -> None:
        """Put samples beside each other that one sampler can draw for."""
        groups: dict[object, list[Sample]] = {}
        for sample in self._running:
            groups.setdefault(sample.sampler.key, []).append(sample)
        self._groups = [_Group(samples[0].sampler, samples) for samples in groups.values()]
        self._running = [sample for group in self._groups for sample in group.samples]
        self._slots = [sample.slot for sample in self._running if sample.slot is not None]

    def _push(self, group: _Group, logits: Logits) -> bool:
        """Draw one token for each sample; True if that was the last of some."""
        tokens = group.sampler.draw(logits, group.contexts, (sample.random_number() for sample in group.samples))
        self._drawn += len(tokens)
        scores: Iterable[Score | None] = itertools.repeat(None)
        if group.alternatives >= 0:
            scores = score_rows(logits, tokens, group.alternatives)
        ended = False
        for sample, token, score in zip(group.samples, tokens, scores, strict=False):
            generation = sample.generation
            generation.usage.drawn_tokens += 1
            self._news[generation] = None
            if sample.push(token, score):
                self._ended(sample)
                ended = True
            elif sample.context.position == sample.sampler_change:
                self._groups = None
        return ended

    def _search(self, beams: Beams, logits: Logits) -> None:
        self._drawn += len(logits)
        if beams.advance(self.decoder, logits):
            self._leave(beams)
            self._over(beams.generation)

    # -- ends -----------------------------------------------------------------------------------

    def _ended(self, sample: Sample) -> None:
        task = self._tasks[sample.generation]
        task.live -= 1
        if not task.live:
            options = sample.generation.request.options
            if options.best_of is not None:
                best = sorted(task.samples, key=lambda each: -each.mean_logprob)[: options.n]
                for index, winner in enumerate(best):
                    sample.generation.records.extend(record._replace(index=index) for record in winner.records)
            self._over(sample.generation)

    def _over(self, generation: Generation) -> None:
        del self._tasks[generation]
        self._news[generation] = None
        generation.done = True

    def _drop_cancelled(self) -> None:
        self._take_in()
        cancelled = []
        while self._cancelled:
            cancelled.append(self._cancelled.popleft())
        self._drop(dict.fromkeys(generation for generation in cancelled if generation in self._tasks), "cancelled")

    def _drop(self, dropped: Iterable[Generation], reason: str) -> None:
        """End all that belongs to some generations, and free their slots."""
        gone = set(dropped)
        held: list[Job] = [*self._prompts.jobs, *self._running, *self._searching]
        held = [job for job in held if job.generation in gone]
        self._waiting = deque(job for job in self._waiting if job.generation not in gone)
        self._prompts.jobs = deque(job for job in self._prompts.jobs if job.generation not in gone)
        self._running = [job for job in self._running if job.generation not in gone]
        self._searching = [job for job in self._searching if job.generation not in gone]
        self._groups = None
        for generation in dropped:
            self._paused.pop(generation, None)
            samples = [sample for sample in self._tasks[generation].samples if not sample.is_done]
            for sample in samples:
                sample.end(reason)
                self._ended(sample)
            if not samples:
                for index in range(generation.request.options.n):
                    generation.records.append(Record(index, finish_reason=reason))
                self._over(generation)
        for job in held:
            self._free += job.slots_needed
            job.close(self.decoder)

    def _fail(self, error: BaseException) -> None:
        """Nobody can go on after the decoder failed."""
        self._take_in()
        for generation in self._tasks:
            generation.error = error
        # What it holds cannot be told any more: whoever catches the error makes a new decoder.
        with contextlib.suppress(Exception):
            self._drop(tuple(self._tasks), "error")
