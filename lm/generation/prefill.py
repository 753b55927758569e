"""Reading prompts: one chunk at a time, in turns, and equal starts only once."""

from __future__ import annotations

from collections import deque

from lm.generation.decoder import Decoder, Logits
from lm.generation.prefix_cache import Key, PrefixCache
from lm.generation.request import Generation, Score
from lm.generation.sampler import Sampler
from lm.generation.token_scores import score_rows

PREFILL_CHUNK = 64
"""Tokens of a prompt that are read in one step, while others draw. Chunks begin at its multiples, counted from the
first token of the prompt: so a prompt's logits never depend on what else was going on."""


class Reading:
    """A request whose prompt has yet to be read. It has its slot from its first chunk on."""

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
        self.to_keep: set[int] = set()
        """Borders, counted from 1, at which the state is kept for others."""
        self.leader: Reading | None = None
        """Reads the same start, which this one waits for."""
        self.led = 0
        """Tokens that both begin with, in whole chunks."""

    def resume(self, decoder: Decoder) -> None:
        """Nothing yet: a slot is taken at the first chunk."""

    def close(self, decoder: Decoder) -> None:
        """Free the slot."""
        if self.slot is not None:
            decoder.close(self.slot)
            self.slot = None


class Prompts:
    """The prompts that are being read."""

    def __init__(self, decoder: Decoder, cache: PrefixCache) -> None:
        self.jobs: deque[Reading] = deque()
        self.tokens = 0
        """Read so far."""
        self._decoder = decoder
        self._cache = cache

    def add(self, job: Reading) -> None:
        """Put a prompt in line."""
        request = job.generation.request
        job.keys = self._cache.keys(request.prompt, request.state, PREFILL_CHUNK)
        if job.keys:
            job.to_keep = self._cache.borders_to_keep(job.keys)
            if not request.score_prompt:
                self._follow(job)
        self.jobs.append(job)

    def _follow(self, job: Reading) -> None:
        """Find who is about to read most of the same start, and have its state kept there."""
        ready, _ = self._cache.find(job.keys)
        for other in self.jobs:
            shared = sum(one == two for one, two in zip(job.keys, other.keys, strict=False))
            if shared > max(ready, job.led // PREFILL_CHUNK) and shared * PREFILL_CHUNK > other.done:
                job.leader, job.led = other, shared * PREFILL_CHUNK
        if job.leader is not None:
            job.leader.to_keep.add(job.led // PREFILL_CHUNK)

    def read_chunk(self) -> tuple[Reading, Logits] | None:
        """Read one chunk of the prompt whose turn it is; where it was the last, the job and what follows, (1, V)."""
        # Who waits for another lets the next go first; the oldest of them waits for nobody.
        while self._waits(self.jobs[0]):
            self.jobs.rotate(-1)
        job = self.jobs[0]
        self.jobs.rotate(-1)
        request = job.generation.request
        if job.slot is None:
            self._open(job)
            assert job.slot is not None
        end = min(job.done + PREFILL_CHUNK, len(request.prompt))
        ids = request.prompt[job.done : end]
        logits = self._decoder.prefill(job.slot, ids, only_last=not request.score_prompt)
        self.tokens += len(ids)
        if request.score_prompt:
            following = request.prompt[job.done + 1 : end + 1]
            job.scores += score_rows(logits[: len(following)], following, request.options.logprobs or 0)
        job.done = end
        if end == len(request.prompt):
            self.jobs.remove(job)
            return job, logits[-1:]
        if (place := end // PREFILL_CHUNK) in job.to_keep:
            self._cache.keep(job.keys[place - 1], self._decoder.export(job.slot))
        return None

    def _waits(self, job: Reading) -> bool:
        return job.leader is not None and job.leader.done < job.led and job.leader in self.jobs

    def _open(self, job: Reading) -> None:
        request = job.generation.request
        place, snapshot = 0, None
        # Scores need the logits of every token.
        if job.keys and not request.score_prompt:
            place, snapshot = self._cache.find(job.keys)
        snapshot = snapshot or request.state
        job.slot = self._decoder.open() if snapshot is None else self._decoder.restore(snapshot)
        job.done, job.leader = place * PREFILL_CHUNK, None
        job.generation.usage.cached_tokens = job.done
        self._cache.found_tokens += job.done
