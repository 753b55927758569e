"""The text of a split, which runs keep as tokens: decoded, or read again from its source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm.comparison.compared_text import ComparedText, of_conversations, of_text
from lm.corpora import Corpus, PreparedCorpus, Progress, open_corpus
from lm.corpora.answers import AnswerMeasure
from lm.errors import CorpusError, LMError
from lm.runs.run import Run

MAX_TRAINING_CHARACTERS = 20_000_000
"""Of a training text, of which words are counted; limits time and memory."""


def split_text(
    runs: Iterable[Run],
    sha256: str,
    split: str,
    *,
    corpus: Path | str | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> ComparedText:
    """The whole text of a split with this hash, or its conversations, from the first run that has it.

    Args:
        runs: the runs.
        sha256: of the text.
        split: its name.
        corpus: where the text is now; None: where it was.
        data_dir: folder of the named corpora.
        progress: called while the text is read.

    Raises:
        CorpusError: no run has it any more.
    """
    problem = None
    for run in runs:
        if run.record["corpus"]["splits"].get(split, {}).get("sha256") != sha256:
            continue
        try:
            prepared = run.own_text(corpus, split=split, data_dir=data_dir, progress=progress)
        except LMError as error:
            problem = problem or error
            continue
        try:
            found, found_sha256 = _content(run, prepared, split, corpus, data_dir, progress)
        except (LMError, KeyError) as error:
            problem = problem or CorpusError(f"Run {run.name!r}: its text is needed, not its tokens alone. {error}")
            continue
        if found_sha256 == sha256:
            return found
        problem = problem or CorpusError(
            f"{run.config.corpus.source} is not the text that run {run.name!r} was trained on: restore that text, or "
            "give another one with --text FILE."
        )
    assert problem is not None, "the first run has this split"
    raise CorpusError(f"{problem} Or compare on another text: --text FILE.")


def _content(
    run: Run,
    prepared: PreparedCorpus,
    split: str,
    corpus: Path | str | None,
    data_dir: Path | None,
    progress: Progress | None,
) -> tuple[ComparedText, str]:
    """A split and its hash."""
    if prepared.splits[split].marks is None:
        text = _decoded(prepared, split)
        if text is None:
            # Words do not determine the text: read it again.
            text = "".join(_opened(run, corpus, data_dir, progress).splits[split].chunks())
        return of_text(text), hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    # Neither do the tokens of conversations: another run renders the turns in another way.
    opened, measure = _opened(run, corpus, data_dir, progress), AnswerMeasure()
    read = opened.splits[split].conversations
    if read is None:
        raise CorpusError(f"It learned conversations, and {opened.source} is plain text now: restore them.")
    found = of_conversations(read())
    for conversation in found.conversations or ():
        measure.update(conversation)
    return found, measure.sha256


def training_start(
    run: Run, prepared: PreparedCorpus, *, corpus: Path | str | None = None, data_dir: Path | None = None
) -> str | None:
    """The first `MAX_TRAINING_CHARACTERS` of a run's training text; None if it is not here.

    Args:
        run: the run.
        prepared: its tokens.
        corpus: where the text is now; None: where it was.
        data_dir: folder of the named corpora.
    """
    text = _decoded(prepared, "train", MAX_TRAINING_CHARACTERS)
    if text is None:
        try:
            chunks = _opened(run, corpus, data_dir, None).splits["train"].chunks()
            text = "".join(_first(chunks, MAX_TRAINING_CHARACTERS))
        except (LMError, KeyError):
            return None
    return text


def _opened(run: Run, corpus: Path | str | None, data_dir: Path | None, progress: Progress | None) -> Corpus:
    """The corpus of a run, at its new path if there is one."""
    where = run.config.corpus
    if corpus is not None:
        where = where.model_copy(update={"source": str(corpus)})
    return open_corpus(where, data_dir=data_dir, progress=progress)


def _first(chunks: Iterable[str], characters: int) -> Iterator[str]:
    """Chunks until there are so many characters."""
    size = 0
    for chunk in chunks:
        yield chunk
        size += len(chunk)
        if size >= characters:
            return


def _decoded(prepared: PreparedCorpus, split: str, most: int | None = None) -> str | None:
    """The text of a split from its tokens; None if they do not determine it."""
    part, tokenizer = prepared.splits[split], prepared.tokenizer
    if not tokenizer.lossless or part.counts.unknown_tokens or part.counts.spelling_nats != 0:
        return None
    ids = part.ids[1:] if most is None else part.ids[1 : most + 1]
    return tokenizer.decode(ids)
