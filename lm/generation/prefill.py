"""Prefill: reads prompts in chunks, in turns, and reads a prefix that several prompts share only once."""

from __future__ import annotations

from collections import deque

from lm.generation.decoder import Decoder, Logits
from lm.generation.prefix_cache import Key, PrefixCache
from lm.generation.request import Generation, Score
from lm.generation.sampler import Sampler
from lm.generation.token_scores import score_rows

PREFILL_CHUNK = 64
"""Tokens of a prompt that are read in one step. Chunks begin at multiples of it, counted from the first token of the
prompt: the logits of a prompt do not depend on other requests."""


class PromptJob:
    """A request whose prompt must be read. It gets its slot with its first chunk."""

    def __init__(self, generation: Generation, samplers: tuple[Sampler, Sampler]) -> None:
        self.generation = generation
        self.samplers = samplers
        """Before and after `min_tokens`."""
        options = generation.request.options
        self.slots_needed = options.num_beams if options.num_beams and options.max_tokens else 1
        self.slot: int | None = None
        self.done = 0
        """Tokens read so far."""
        self.scores: list[Score | None] = [None]
        self.keys: list[Key] = []
        """Of the prefixes that end at a chunk boundary."""
        self.boundaries_to_save: set[int] = set()
        """Chunk boundaries, counted from 1, at which a snapshot goes into the cache."""
        self.prefix_owner: PromptJob | None = None
        """Another job that reads the same prefix; this job waits for its snapshot."""
        self.shared_tokens = 0
        """Length of that prefix, in whole chunks."""

    def resume(self, decoder: Decoder) -> None:
        """Do nothing: the slot comes with the first chunk."""

    def close(self, decoder: Decoder) -> None:
        """Free the slot."""
        if self.slot is not None:
            decoder.close(self.slot)
            self.slot = None

    @property
    def must_wait(self) -> bool:
        """Whether the snapshot of the shared prefix is still missing."""
        return self.prefix_owner is not None and self.prefix_owner.done < self.shared_tokens


class Prompts:
    """The prompts that are being read."""

    def __init__(self, decoder: Decoder, cache: PrefixCache) -> None:
        self.jobs: deque[PromptJob] = deque()
        self.tokens = 0
        """Tokens read so far."""
        self._decoder = decoder
        self._cache = cache

    def add(self, job: PromptJob) -> None:
        """Add a prompt to the queue."""
        request = job.generation.request
        job.keys = self._cache.keys(request.prompt, request.state, PREFILL_CHUNK)
        if job.keys:
            job.boundaries_to_save = self._cache.boundaries_to_save(job.keys)
            if not request.score_prompt:
                self._find_prefix_owner(job)
        self.jobs.append(job)

    def _find_prefix_owner(self, job: PromptJob) -> None:
        """Find the job that will read the longest common prefix, and let it save a snapshot there."""
        cached, _ = self._cache.find(job.keys)
        for other in self.jobs:
            shared = sum(one == two for one, two in zip(job.keys, other.keys, strict=False))
            if shared > max(cached, job.shared_tokens // PREFILL_CHUNK) and shared * PREFILL_CHUNK > other.done:
                job.prefix_owner, job.shared_tokens = other, shared * PREFILL_CHUNK
        if job.prefix_owner is not None:
            job.prefix_owner.boundaries_to_save.add(job.shared_tokens // PREFILL_CHUNK)

    def read_chunk(self) -> tuple[PromptJob, Logits] | None:
        """Read one chunk of the next prompt; after the last chunk, return the job and the logits (1, V)."""
        # A job that waits lets the next one go first. The oldest job never waits.
        while self.jobs[0].must_wait and self.jobs[0].prefix_owner in self.jobs:
            self.jobs.rotate(-1)
        job = self.jobs[0]
        self.jobs.rotate(-1)
        request = job.generation.request
        slot = self._open(job) if job.slot is None else job.slot
        end = min(job.done + PREFILL_CHUNK, len(request.prompt))
        ids = request.prompt[job.done : end]
        logits = self._decoder.prefill(slot, ids, only_last=not request.score_prompt)
        self.tokens += len(ids)
        if request.score_prompt:
            following = request.prompt[job.done + 1 : end + 1]
            job.scores += score_rows(logits[: len(following)], following, request.options.logprobs or 0)
        job.done = end
        if end == len(request.prompt):
            self.jobs.remove(job)
            return job, logits[-1:]
        if (boundary := end // PREFILL_CHUNK) in job.boundaries_to_save:
            self._cache.save(job.keys[boundary - 1], self._decoder.export(slot))
        return None

    def _open(self, job: PromptJob) -> int:
        """Open a slot, from the cached snapshot of the longest prefix if there is one."""
        request = job.generation.request
        boundary, snapshot = 0, None
        # Scores need the logits of every token.
        if job.keys and not request.score_prompt:
            boundary, snapshot = self._cache.find(job.keys)
        snapshot = snapshot or request.state
        slot = job.slot = self._decoder.open() if snapshot is None else self._decoder.restore(snapshot)
        job.done, job.prefix_owner = boundary * PREFILL_CHUNK, None
        job.generation.usage.cached_tokens = job.done
        self._cache.found_tokens += job.done
        return slot
