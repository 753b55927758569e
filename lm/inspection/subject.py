"""A model together with the tokens of a text, for views that compare several models.

subjects = [fresh("gru-char", text), fresh("lstm-char", text)]
subjects = [untrained(run, text), subject(run, text)]             # before and after training
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from lm.config import compose
from lm.corpora import TokenSplit, encode_text, open_corpus
from lm.corpora.named import BUILTIN
from lm.models.base import build_model
from lm.registry import TOKENIZERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from lm.models.base import LanguageModel
    from lm.runs.run import Run

SEED = 0
"""Of fresh weights, so that the same command gives the same numbers."""


class Subject(NamedTuple):
    """A model and a text."""

    name: str
    model: LanguageModel
    ids: npt.NDArray[np.int64]
    """(N + 1,) the start token, then the N tokens of the text."""


def subject(run: Run, text: str | TokenSplit | None = None) -> Subject:
    """A run with a text, or with tokens of it; None: the validation split of the run's text.

    Raises:
        CorpusError: the text has no token, or the run's text is not there.
    """
    return Subject(run.name, run.model, _ids(run, text))


def untrained(run: Run, text: str | TokenSplit | None = None, *, seed: int = SEED) -> Subject:
    """The same with fresh weights in place of the run's."""
    model = build_model(run.config.model, run.tokenizer.vocab_size, seed=seed)
    return Subject(f"{run.name}, untrained", model, _ids(run, text))


def fresh(
    preset: str, text: str | None = None, *, overrides: Mapping[str, Any] | None = None, seed: int = SEED
) -> Subject:
    """A preset's model with fresh weights.

    Args:
        preset: its name.
        text: also the text that the tokenizer learns from; None: the built-in corpus.
        overrides: options by name, such as {"model.hidden_size": 64}.
        seed: of the weights.

    Raises:
        ConfigError: no such preset or option.
    """
    config = compose(BUILTIN, preset=preset, overrides=overrides)
    if text is None:
        text = "".join(open_corpus(config.corpus).splits["valid"].chunks())
    tokenizer = TOKENIZERS.resolve(config.tokenizer.type).train([text], config.tokenizer.resolve("tokenizer"))
    model = build_model(config.model, tokenizer.vocab_size, seed=seed)
    return Subject(f"{preset}, untrained", model, encode_text("the text", text, tokenizer).ids.astype(np.int64))


def text_ids(run: Run, text: str | TokenSplit, name: str = "the text") -> npt.NDArray[np.int64]:
    """(N + 1,) the start token, then the N tokens of a text, which may be in tokens of the run already.

    Conversations are in tokens, because a chat template writes special tokens that no text gives.

    Raises:
        CorpusError: the text has no token.
    """
    part = encode_text(name, text, run.tokenizer) if isinstance(text, str) else text
    return np.asarray(part.ids, dtype=np.int64)


def _ids(run: Run, text: str | TokenSplit | None) -> npt.NDArray[np.int64]:
    return text_ids(run, run.own_text().splits["valid"] if text is None else text)
