"""Perplexity by words after equal epochs, and that of PyTorch's example: an LSTM of 2 layers of 200, tied, WikiText-2.

Both read the same files and have the same vocabulary; the project's evaluator scores every token of the validation text
for both. Without --full they train on the first words alone. Nothing here depends on the speed of the machine.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch

from benchmarks import ours
from benchmarks.machine import versions
from benchmarks.suite import WLM, WORD, WORDS, Claim, Record, Settings, Table
from benchmarks.wlm import WordLanguageModel, write_texts
from lm.config import CorpusConfig
from lm.corpora import open_corpus
from lm.evaluation.perplexity import score

TRAIN_WORDS, VALID_WORDS = 60_000, 20_000
"""How much of WikiText-2 without --full."""
EPOCHS = 1
SAME_PERPLEXITY = 1.02


def run(settings: Settings) -> Record:
    """Train both, and score both."""
    torch.set_num_threads(settings.threads)
    record = Record(
        options={**settings.options(), "words": WORDS, "epochs": EPOCHS}, versions=versions("numpy", "torch")
    )
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as name:
        _compare(settings, Path(name), record)
    return record


def _compare(settings: Settings, folder: Path, record: Record) -> None:
    what = f"words of {WORDS}: perplexity at equal epochs, ours over the PyTorch example's"
    if settings.wlm is None:
        record.missing.append(WLM)
        record.claims.append(Claim(what, None, SAME_PERPLEXITY, "at most", "×", "the example is not here"))
        return
    cut = (None, None) if settings.full else (TRAIN_WORDS, VALID_WORDS)
    corpus = open_corpus(CorpusConfig(source=WORDS), data_dir=settings.data_dir)
    texts = write_texts(corpus, folder / "words", train_words=cut[0], valid_words=cut[1])
    trained = ours.train(
        f"{WORD} --epochs {EPOCHS}", str(texts), "words", folder, settings,
        extra=("--set", "training.evaluate_every=1000000"),
    )  # fmt: skip
    peer = WordLanguageModel(settings.wlm, folder, settings)
    saved = peer.train(texts, EPOCHS)
    theirs = score(peer.load(saved, texts, trained.run.tokenizer), trained.ids("valid"))
    rows = [
        {"contender": name, "perplexity": math.exp(loss), "loss": loss, "context": context}
        for name, loss, context in (
            ("ours", trained.loss, trained.context),
            ("PyTorch example", theirs.loss, theirs.context),
        )
    ]
    whole = (
        "the whole text" if settings.full else f"the first {TRAIN_WORDS:,} words, and {VALID_WORDS:,} to validate on"
    )
    record.tables.append(
        Table(
            f"{WORDS}, words: validation perplexity after one epoch of {whole}",
            rows,
            f"`{WORD}`; for both one <eos> a line, <unk> for words that the training text lacks, every token scored",
        )
    )
    why = "" if settings.full else f"one epoch of {whole}"
    record.claims.append(
        Claim(what, math.exp(trained.loss - theirs.loss), SAME_PERPLEXITY, "at most", "×", why)
    )  # fmt: skip
