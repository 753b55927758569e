"""The text that a run was trained on, as tokens: from the cache, or read again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lm.config import CorpusConfig
from lm.corpora import PreparedCorpus, Progress, load_prepared_or_prepare, open_corpus, prepare, prepared_key
from lm.errors import CorpusError, LMError
from lm.runs.run_folder import RunFolder
from lm.tokenizers.base import Tokenizer


def cached_text(corpus: dict[str, Any], tokenizer: Tokenizer) -> PreparedCorpus | None:
    """The training text of a run, if its tokens are in the cache.

    Args:
        corpus: the entry "corpus" of the run's record.
        tokenizer: of the run.
    """
    if not corpus["splits"]:
        return None
    hashes = {name: part["sha256"] for name, part in corpus["splits"].items()}
    # The key of the training, and the key of a text that was encoded again later.
    return load_prepared_or_prepare((corpus["key"], prepared_key(hashes, tokenizer)), tokenizer.sha256)


def check_has_corpus(folder: RunFolder, record: dict[str, Any]) -> None:
    """Refuse an imported run, whose training text is unknown.

    Raises:
        CorpusError: the run has no corpus.
    """
    if not record["corpus"]["splits"]:
        raise CorpusError(
            f"Run {folder.name!r} was imported, so it has no corpus: give a text (--text FILE), or leave out what "
            "needs the text of its training."
        )


def training_text(
    folder: RunFolder,
    record: dict[str, Any],
    where: CorpusConfig,
    tokenizer: Tokenizer,
    *,
    source: Path | str | None = None,
    split: str | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """The training text of a run, once at `where`; arguments and errors are those of `Run.own_text`."""
    check_has_corpus(folder, record)
    known, hint = record["corpus"], ""
    if source is not None:
        where = where.model_copy(update={"source": str(source)})
    else:
        hint = f" If the text is elsewhere now: lm eval {folder.argument} --corpus PATH"

    def read_again() -> PreparedCorpus:
        return prepare(open_corpus(where, data_dir=data_dir, progress=progress), tokenizer, progress=progress)

    prepared = cached_text(known, tokenizer) if source is None else None
    if prepared is None:
        try:
            prepared = read_again()
        except CorpusError as error:
            raise type(error)(f"{error}{hint}") from None
    elif not prepared.is_measured and where.source != "-":
        # An older Inkling prepared the tokens and did not measure their spelling: do it now if the text is there.
        with contextlib.suppress(LMError):
            again = read_again()
            prepared = again if again.sha256 == prepared.sha256 else prepared
    other = f"{where.source} is not the text that run {folder.name!r} was trained on"
    if split is None and prepared.sha256 != known["sha256"]:
        raise CorpusError(f"{other}: restore that text, or train on the new one with --init {folder.argument}.{hint}")
    if split is not None and (
        split not in prepared.splits or prepared.splits[split].sha256 != known["splits"][split]["sha256"]
    ):
        raise CorpusError(
            f"{other} (its {split} split has another hash): restore that text, or evaluate the new one with "
            f"--text.{hint}"
        )
    return prepared
