"""The engine: generates text for many requests at once. Each text is the same as if it were alone.

    engine = Engine(decoder, tokenizer)
    for event in engine.run(Request(prompt=(tokenizer.start_id, *ids), options=SamplingOptions(seed=7))):
        print(event.text, end="")

A server calls `submit` from any thread, `step` on one thread until it returns False, and `Generation.take` for the
events. Requests join and leave at any step.

    waiting ──► prefill (64 tokens a step, in turns) ──► running (a token a step, all together) ──► done
       ▲                                                  │ generated QUANTUM tokens while others wait
       └──────────────────────────────────────────────────┘

`pause` removes the samples of a request from the batch until `resume`: the client does not read its events.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lm.errors import ConfigError
from lm.generation.beams import Beams
from lm.generation.decoder import Decoder, Draw, DrawingDecoder, Logits
from lm.generation.options import SamplingOptions
from lm.generation.prefill import PREFILL_CHUNK, PromptJob, Prompts
from lm.generation.prefix_cache import PrefixCache
from lm.generation.request import Event, Generation, Request, Score, Usage
from lm.generation.sampler import Sampler
from lm.generation.sequence import Sample, stop_tokens_of
from lm.generation.token_scores import score_rows
from lm.tokenizers.base import Tokenizer

__all__ = ["PREFILL_CHUNK", "QUANTUM", "Engine", "EngineStats", "Event", "Generation", "Request", "Score", "Usage"]

QUANTUM = 256
"""Tokens that a sample generates before it gives up its slot, if others wait."""

Job = PromptJob | Sample | Beams


class EngineStats(NamedTuple):
    """The load of an engine after its last step, and its totals."""

    running: int = 0
    """Samples and beam searches that generate tokens."""
    prefilling: int = 0
    """Requests whose prompt is read."""
    waiting: int = 0
    """Requests that have not started, and samples without a slot."""
    slots: int = 0
    """Slots in use; at most `Engine.max_batch`."""
    steps: int = 0
    drawn_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of prompts that came from the prefix cache."""
    cache_bytes: int = 0


class _Group:
    """Samples for which one sampler draws."""

    def __init__(self, samples: list[Sample]) -> None:
        self.sampler = samples[0].sampler
        self.samples = samples
        self.contexts = [sample.context for sample in samples]
        self.alternatives = max(sample.alternatives for sample in samples)
        """The most alternatives that a sample scores; -1 if none has scores."""

    def numbers(self) -> Sequence[float]:
        """The random numbers of the next tokens."""
        return () if self.sampler.greedy else [sample.random_number() for sample in self.samples]

    def draw(self, decoder: DrawingDecoder) -> Draw:
        """What the decoder does with the rows of the samples."""
        plan = self.sampler.plan
        if plan is None or not decoder.can_draw(plan):
            return Draw(len(self.samples))
        return Draw(len(self.samples), plan, self.numbers(), needs_logits=self.alternatives >= 0)


class Engine:
    """Generates text for many requests at once.

    Any thread may call `submit`, `cancel`, `resume` and `stats`. Only one thread at a time may call `step`, `run` and
    `pause`.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, *, max_batch: int = 32, prefix_cache_bytes: int = 64 * 2**20
    ) -> None:
        """Create an engine without requests.

        Args:
            decoder: of the model.
            tokenizer: of the model.
            max_batch: samples that are computed together, each in a slot of the decoder.
            prefix_cache_bytes: memory for snapshots of prompt prefixes.
        """
        self.decoder = decoder
        self._drawing = decoder if isinstance(decoder, DrawingDecoder) and decoder.draws else None
        self.tokenizer = tokenizer
        self.max_batch = max_batch if decoder.max_slots is None else min(max_batch, decoder.max_slots)
        # Other threads append to these: the ends of a deque are thread-safe.
        self._submitted: deque[PromptJob] = deque()
        self._cancelled: deque[Generation] = deque()
        self._resumed: deque[Generation] = deque()
        self._submitted_count = self._accepted_count = 0
        self._submit_lock = threading.Lock()
        self._stats = EngineStats(), 0
        """The figures after the last step, and the accepted requests at that time."""
        self._samplers: tuple[SamplingOptions, tuple[Sampler, Sampler]] | None = None
        """Those of the last request: the prompts of one API request share their options."""

        self._samples: dict[Generation, list[Sample]] = {}
        """Of each unfinished request; empty before the prompt is read, and for a beam search."""
        self._waiting: deque[Job] = deque()
        self._paused: dict[Generation, list[Job]] = {}
        self._cache = PrefixCache(prefix_cache_bytes)
        self._prompts = Prompts(decoder, self._cache)
        self._running: list[Sample] = []
        self._searches: list[Beams] = []
        self._groups: list[_Group] | None = None
        """The running samples by sampler; None after a change."""
        self._slots: list[int] = []
        """Of the running samples, in the order of the groups."""
        self._free_slots = self.max_batch
        self._updated: dict[Generation, None] = {}
        """Requests with new events in this step."""
        self._steps = self._drawn = 0

    # -- from any thread ------------------------------------------------------------------------

    def submit(self, request: Request, on_event: Callable[[Generation], None] | None = None) -> Generation:
        """Add a request to the queue.

        Args:
            request: a prompt and its options.
            on_event: called on the stepping thread after each step in which the request has new events.

        Raises:
            ConfigError: the request is not possible with this model.
        """
        generation = Generation(request, on_event)
        job = PromptJob(generation, self._samplers_of(request))
        with self._submit_lock:
            # Counted first: an accepted request was counted.
            self._submitted_count += 1
            self._submitted.append(job)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request; its slots are free at the next step."""
        self._cancelled.append(generation)

    def pause(self, generation: Generation) -> None:
        """Stop a request until `resume`; its samples free their slots and lose nothing.

        Call it on the stepping thread, between steps or in `on_event`, after the first event. It does nothing for a
        request that is done.
        """
        if generation not in self._samples or generation in self._paused:
            return
        running = [sample for sample in self._running if sample.generation is generation]
        for sample in running:
            sample.park(self.decoder)
            self._remove(sample)
        waiting = [job for job in self._waiting if job.generation is generation]
        self._waiting = deque(job for job in self._waiting if job.generation is not generation)
        self._paused[generation] = [*running, *waiting]
        self._update_stats()

    def resume(self, generation: Generation) -> None:
        """Continue a paused request."""
        self._resumed.append(generation)

    def stats(self) -> EngineStats:
        """The figures after the last step. Each unfinished request and sample counts once."""
        stats, accepted = self._stats
        return stats._replace(waiting=stats.waiting + self._submitted_count - accepted)

    def _update_stats(self) -> None:
        """Publish the figures: during a step, a job can be between two lists."""
        stats = EngineStats(
            len(self._running) + len(self._searches), len(self._prompts.jobs),
            len(self._waiting) + sum(map(len, self._paused.values())), self.max_batch - self._free_slots,
            self._steps, self._drawn, self._prompts.tokens, self._cache.found_tokens, self._cache.nbytes,
        )  # fmt: skip
        self._stats = stats, self._accepted_count

    def _samplers_of(self, request: Request) -> tuple[Sampler, Sampler]:
        """Check a request, and make its samplers before and after `min_tokens`."""
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
        last = self._samplers
        if last is not None and last[0] is options:
            return last[1]
        late = early = Sampler(options, self.tokenizer)
        stop_tokens = stop_tokens_of(options, self.tokenizer)
        if stop_tokens and options.min_tokens:
            early = Sampler(options, self.tokenizer, banned=stop_tokens)
        self._samplers = options, (early, late)
        return early, late

    # -- the loop -------------------------------------------------------------------------------

    def run(self, request: Request) -> Iterator[Event]:
        """Yield the events of one request as they occur; other requests of the engine continue too.

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
                self._update_stats()

    def step(self) -> bool:
        """Start waiting jobs, read a chunk of a prompt, and generate one token of each running sample.

        Returns:
            False if there was no work.
        """
        try:
            if self._cancelled:
                self._drop_cancelled()
            while self._resumed:
                self._waiting.extend(self._paused.pop(self._resumed.popleft(), ()))
            if self._submitted or self._waiting:
                self._admit()
            busy = bool(self._prompts.jobs or self._running or self._searches)
            if self._prompts.jobs:
                self._prefill()
            if self._running or self._searches:
                self._decode()
            self._steps += busy
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._update_stats()
            if self._updated:
                self._notify()
        return busy

    def _notify(self) -> None:
        updated, self._updated = self._updated, {}
        for generation in updated:
            if generation.on_event is not None and generation.records:
                generation.on_event(generation)

    # -- admission ------------------------------------------------------------------------------

    def _accept(self) -> None:
        """Move submitted requests to the queue of this thread."""
        while self._submitted:
            job = self._submitted.popleft()
            self._accepted_count += 1
            self._samples[job.generation] = []
            self._waiting.append(job)

    def _admit(self) -> None:
        """Give slots to waiting jobs, in order."""
        self._accept()
        while self._waiting:
            job = self._waiting[0]
            if job.slots_needed > self._free_slots:
                self._preempt(job.slots_needed)
            if job.slots_needed > self._free_slots:
                # No job overtakes another: a search for many slots would wait forever.
                return
            self._waiting.popleft()
            self._free_slots -= job.slots_needed
            if isinstance(job, PromptJob):
                self._prompts.add(job)
                continue
            job.resume(self.decoder)
            if isinstance(job, Beams):
                self._searches.append(job)
            else:
                self._running.append(job)
                self._groups = None

    def _preempt(self, slots: int) -> None:
        """Park the jobs with the longest turns, if that frees enough slots."""
        running: list[Sample | Beams] = [*self._running, *self._searches]
        long = [job for job in running if job.turn_tokens >= QUANTUM]
        long.sort(key=lambda job: -job.turn_tokens)
        if self._free_slots + sum(job.slots_needed for job in long) < slots:
            return
        for job in long:
            if self._free_slots < slots:
                job.park(self.decoder)
                self._remove(job)
                self._waiting.append(job)

    def _remove(self, job: Sample | Beams) -> None:
        """Remove a running job and free its slots."""
        if isinstance(job, Beams):
            self._searches.remove(job)
        else:
            self._running.remove(job)
            self._groups = None
        job.close(self.decoder)
        self._free_slots += job.slots_needed

    # -- prefill --------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Read a chunk of a prompt, or several short prompts of about that length."""
        limit = self._prompts.tokens + PREFILL_CHUNK
        while self._prompts.jobs and self._prompts.tokens < limit:
            finished = self._prompts.read_chunk()
            if finished is not None:
                self._start(*finished)

    def _start(self, job: PromptJob, logits: Logits) -> None:
        """Start the samples or the search of a request from the logits (1, V) after its prompt."""
        generation, slot = job.generation, job.slot
        request = generation.request
        options = request.options
        assert slot is not None, "a prompt that was read has a slot"
        if request.score_prompt:
            generation.prompt_scores = tuple(job.scores)
        if request.keep_state:
            generation.state = self.decoder.export(slot)
        if request.keep_logits:
            generation.logits = logits.copy()
        self._updated[generation] = None
        if options.num_beams is not None and options.max_tokens:
            beams = Beams(generation, self.tokenizer, job.samplers)
            beams.slots.append(slot)
            self._searches.append(beams)
            self._search(beams, logits)
            return
        samples = self._samples[generation] = [
            # A sample that `best_of` may drop has its own records.
            Sample(generation, index, self.tokenizer, job.samplers, deque() if options.best_of else generation.records)
            for index in range(options.best_of or options.n)
        ]
        if options.max_tokens:
            self._push(_Group(samples), logits.repeat(len(samples), axis=0))
        else:
            for sample in samples:
                sample.end("length")
            self._finish_if_done(generation)
        self._share_slot(slot, [sample for sample in samples if not sample.is_done])

    def _share_slot(self, slot: int, samples: list[Sample]) -> None:
        """Start samples from one slot: the first in it, others in forks; the rest wait with a snapshot."""
        if not samples:
            self.decoder.close(slot)
            self._free_slots += 1
            return
        samples[0].slot = slot
        started = 1 + min(len(samples) - 1, self._free_slots)
        for sample in samples[1:started]:
            sample.slot = self.decoder.fork(slot)
            self._free_slots -= 1
        if waiting := samples[started:]:
            snapshot = self.decoder.export(slot)
            for sample in waiting:
                sample.snapshot = snapshot
            self._waiting.extend(waiting)
        self._running += samples[:started]
        self._groups = None

    # -- decode ---------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Read the last token of each running text, and draw the next."""
        groups = self._grouped() if self._groups is None else self._groups
        slots, ids = self._slots, [sample.last for sample in self._running]
        if self._searches:
            slots = slots + [slot for beams in self._searches for slot in beams.slots]
            ids += [token for beams in self._searches for token in beams.last]
        if self._drawing is not None:
            self._decode_drawing(self._drawing, slots, ids, groups)
            return
        logits = self.decoder.step(slots, ids)
        if self._searches:
            # A search forks slots, and these logits are valid only until the next call of the decoder.
            logits = logits.copy()
        begin = 0
        for group in groups:
            end = begin + len(group.samples)
            if self._push(group, logits if end - begin == len(logits) else logits[begin:end]):
                self._remove_done(group)
            begin = end
        for beams in tuple(self._searches):
            end = begin + len(beams.slots)
            self._search(beams, logits[begin:end])
            begin = end

    def _decode_drawing(self, decoder: DrawingDecoder, slots: list[int], ids: list[int], groups: list[_Group]) -> None:
        """`_decode` with a decoder that draws what it can."""
        searches = tuple(self._searches)
        draws = [*(group.draw(decoder) for group in groups), *(Draw(len(beams.slots)) for beams in searches)]
        drawn = iter(decoder.step_and_draw(slots, ids, draws))
        for group, (tokens, logits) in zip(groups, drawn, strict=False):
            if self._push(group, logits, tokens):
                self._remove_done(group)
        for beams, (_, logits) in zip(searches, drawn, strict=True):
            assert logits is not None
            self._search(beams, logits)

    def _remove_done(self, group: _Group) -> None:
        for sample in group.samples:
            if sample.is_done:
                self._remove(sample)

    def _grouped(self) -> list[_Group]:
        """Sort the running samples by sampler."""
        by_key: dict[object, list[Sample]] = {}
        for sample in self._running:
            by_key.setdefault(sample.sampler.key, []).append(sample)
        self._groups = [_Group(samples) for samples in by_key.values()]
        self._running = [sample for group in self._groups for sample in group.samples]
        self._slots = [sample.slot for sample in self._running if sample.slot is not None]
        return self._groups

    def _push(self, group: _Group, logits: Logits | None, tokens: list[int] | None = None) -> bool:
        """Append one token to each sample, drawn from the logits if it is not given; True if a sample ended."""
        if tokens is None:
            assert logits is not None
            tokens = group.sampler.draw(logits, group.contexts, group.numbers())
        self._drawn += len(tokens)
        scores: Iterable[Score | None] = itertools.repeat(None)
        if group.alternatives >= 0 and logits is not None:
            scores = score_rows(logits, tokens, group.alternatives)
        ended = False
        for sample, token, score in zip(group.samples, tokens, scores, strict=False):
            generation = sample.generation
            generation.usage.drawn_tokens += 1
            self._updated[generation] = None
            if sample.push(token, score):
                self._finish_if_done(generation)
                ended = True
            elif sample.context.position == sample.sampler_change:
                self._groups = None
        return ended

    def _search(self, beams: Beams, logits: Logits) -> None:
        """Advance a beam search by one token."""
        self._drawn += len(logits)
        if beams.advance(self.decoder, logits):
            self._remove(beams)
            self._finish(beams.generation)

    # -- ends -----------------------------------------------------------------------------------

    def _finish_if_done(self, generation: Generation) -> None:
        """Finish a request if all its samples have ended."""
        samples, options = self._samples[generation], generation.request.options
        if not all(sample.is_done for sample in samples):
            return
        if options.best_of is not None:
            best = sorted(samples, key=lambda sample: -sample.mean_logprob)[: options.n]
            for index, sample in enumerate(best):
                generation.records.extend((index, *record[1:]) for record in sample.records)
        self._finish(generation)

    def _finish(self, generation: Generation) -> None:
        del self._samples[generation]
        self._updated[generation] = None
        generation.done = True

    def _drop_cancelled(self) -> None:
        self._accept()
        cancelled = []
        while self._cancelled:
            cancelled.append(self._cancelled.popleft())
        self._drop([*dict.fromkeys(each for each in cancelled if each in self._samples)], "cancelled")

    def _drop(self, dropped: list[Generation], reason: str) -> None:
        """End requests, and free their slots."""
        gone = set(dropped)
        held: list[Job] = [*self._prompts.jobs, *self._running, *self._searches]
        held = [job for job in held if job.generation in gone]
        self._waiting = deque(job for job in self._waiting if job.generation not in gone)
        self._prompts.jobs = deque(job for job in self._prompts.jobs if job.generation not in gone)
        self._running = [sample for sample in self._running if sample.generation not in gone]
        self._searches = [beams for beams in self._searches if beams.generation not in gone]
        self._groups = None
        for generation in dropped:
            self._paused.pop(generation, None)
            if samples := [sample for sample in self._samples[generation] if not sample.is_done]:
                for sample in samples:
                    sample.end(reason)
                self._finish_if_done(generation)
            else:
                for index in range(generation.request.options.n):
                    generation.records.append((index, "", None, None, 0, reason))
                self._finish(generation)
        for job in held:
            self._free_slots += job.slots_needed
            job.close(self.decoder)

    def _fail(self, error: BaseException) -> None:
        """End all requests: the decoder failed."""
        self._accept()
        for generation in self._samples:
            generation.error = error
        # The slots may be lost: the caller makes a new decoder.
        with contextlib.suppress(Exception):
            self._drop([*self._samples], "error")
