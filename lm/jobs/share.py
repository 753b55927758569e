"""The same prepared job in several processes, which may run on several machines."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lm.config import CorpusConfig, Section
from lm.corpora import PreparedCorpus, load_prepared_or_prepare
from lm.errors import CorpusError
from lm.jobs.prepared_job import PreparedJob
from lm.jobs.resolve import ResumeRequest, TrainRequest
from lm.runs.run import load
from lm.tokenizers.base import Tokenizer
from lm.training.distributed import ReadOnlyRunFolder, World


@dataclass(frozen=True)
class PreparedCorpusRef:
    """Names a prepared corpus; its tokens are in the cache of each machine."""

    key: str
    sha256: str
    tokenizer_sha256: str
    name: str
    source: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, corpus: PreparedCorpus) -> PreparedCorpusRef:
        """The reference to a corpus."""
        return cls(corpus.key, corpus.sha256, corpus.tokenizer.sha256, corpus.name, corpus.source, corpus.notes)

    def load(self, tokenizer: Tokenizer | Section, config: CorpusConfig, data_dir: Path | None) -> PreparedCorpus:
        """The corpus from this machine's cache, or encoded here.

        Raises:
            CorpusError: this machine has another text.
        """
        found = load_prepared_or_prepare(
            [self.key], self.tokenizer_sha256, corpus=config, tokenizer=tokenizer, data_dir=data_dir
        )
        assert found is not None
        if (found.sha256, found.tokenizer.sha256) != (self.sha256, self.tokenizer_sha256):
            raise CorpusError(
                f"{self.source} on {platform.node()} is not the text that the first process has. Give all machines the "
                "same file, or let them share INKLING_CACHE."
            )
        return replace(found, name=self.name, source=self.source, notes=self.notes)


def share_job(world: World, request: TrainRequest | ResumeRequest, make: Callable[[], PreparedJob]) -> PreparedJob:
    """The job that `make` returns in the first process, in all processes. Its tokens are not sent.

    Raises:
        LMError: `make` raised it in the first process, or this machine has another text.
    """
    own: list[PreparedJob] = []

    def decide() -> tuple[PreparedJob, PreparedCorpusRef | None, list[str | None]]:
        own.append(job := make())
        ref = None if job.corpus is None else PreparedCorpusRef.of(job.corpus)
        runs = [f"{run.folder.path}@{run.checkpoint}" if run else None for run in (job.init, job.teacher)]
        return replace(job, corpus=None, init=None, teacher=None), ref, runs

    job, ref, names = world.broadcast_from_rank0(decide)
    if ref is None:
        return job
    init, teacher = (own[0].init, own[0].teacher) if own else (load(name) if name else None for name in names)

    def tokens() -> PreparedCorpus:
        if own:
            return own[0].tokens
        assert job.path is not None
        if job.resume is not None:
            folder = ReadOnlyRunFolder(job.path)
            folder.await_record()
            return ref.load(folder.read_tokenizer(), job.config.corpus, request.data_dir)
        return ref.load(init.tokenizer if init else job.config.tokenizer, job.config.corpus, request.data_dir)

    return replace(job, corpus=world.local_rank0_first(tokens), init=init, teacher=teacher)
