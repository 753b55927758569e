"""The index of a run's training text, and the text of its splits as the tokenizer gives it back."""

from __future__ import annotations

import numpy as np

from lm import host
from lm.copies import CopyIndex
from lm.corpora import PreparedCorpus
from lm.errors import DeviceError

BYTES_PER_BYTE = 26
"""Memory per byte of the training text, while its tokens become text and the text is indexed; measured."""


def split_text(corpus: PreparedCorpus, split: str) -> str:
    """The text of a split as its tokens give it back.

    For byte, char and subword tokens it is the text itself. Words have single spaces between them, and `<unk>` in
    place of unknown ones, as in a sample.
    """
    ids = corpus.splits[split].ids
    return corpus.tokenizer.decode(np.asarray(ids[1:]))


def index_training_text(corpus: PreparedCorpus) -> CopyIndex:
    """An exact index of the training split.

    Raises:
        DeviceError: the memory is too small.
    """
    needed, free = BYTES_PER_BYTE * corpus.splits["train"].counts.bytes, host.memory()["available"]
    if needed > free:
        raise DeviceError(
            f"The search for copies in {corpus.name} needs about {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free: use a machine with more memory."
        )
    return CopyIndex(split_text(corpus, "train"))
