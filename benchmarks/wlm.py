"""The PyTorch word-language-model example, run from a copy: its own main.py, on our text.

How it counts: it appends <eos> to every line, as our word tokenizer reads every newline, so that both have the same
tokens. Its own perplexity leaves out the first token of the split and what does not fill its ten rows; here all tokens
are scored by the project's evaluator, for both.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters import Adapted, ids_of, word_language_model
from benchmarks.nanogpt import PeerError
from benchmarks.suite import Settings, say
from lm.corpora import Corpus
from lm.tokenizers import Tokenizer

MODEL = ("--model", "LSTM", "--emsize", "200", "--nhid", "200", "--nlayers", "2", "--tied")
"""As its README's examples have it; batch 20 and bptt 35 are its defaults."""
TOKENS_PER_STEP = 20 * 35
LOG_INTERVAL = 10
_LINE = re.compile(r"\|\s*epoch.*ms/batch\s+([\d.]+)")


class WordLanguageModel:
    """A copy of the example with a folder of text."""

    def __init__(self, clone: Path, folder: Path, settings: Settings) -> None:
        """Copy it; PeerError where the path is not the example."""
        for name in ("main.py", "model.py", "data.py"):
            if not (clone / name).is_file():
                raise PeerError(f"--wlm {clone}: there is no {name}; give the path of examples/word_language_model.")
        self.folder = folder / "word_language_model"
        self.folder.mkdir()
        for path in clone.glob("*.py"):
            shutil.copy(path, self.folder)
        self._environment = settings.environment()

    def tokens_per_second(self, texts: Path, seconds: float) -> float:
        """Speed of training, once it is warm; the program is stopped after about so many seconds of training."""
        rates: list[float] = []
        begun: float | None = None
        with self._main(texts, "--epochs", "1", "--log-interval", str(LOG_INTERVAL)) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if found := _LINE.match(line):
                    # The first line includes cold steps.
                    rates += [TOKENS_PER_STEP / float(found[1]) * 1000] if begun is not None else []
                    begun = begun or time.perf_counter()
                    if rates and time.perf_counter() - begun > seconds:
                        break
            process.terminate()
        if not rates:
            raise PeerError("The word-language-model example did not report its speed.")
        return statistics.median(rates)

    def train(self, texts: Path, epochs: int) -> Path:
        """Train for whole epochs; the saved model."""
        say(f"  word-language-model example: {epochs} epochs")
        saved = self.folder / "model.pt"
        with self._main(texts, "--epochs", str(epochs), "--save", str(saved)) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            if process.wait():
                raise PeerError(f"The word-language-model example failed:\n{printed[-2000:]}")
        return saved

    def load(self, saved: Path, texts: Path, tokenizer: Tokenizer) -> Adapted:
        """The saved model behind our contract, numbered as our tokenizer numbers."""
        model, data = self._module("model"), self._module("data")
        kinds = [model.RNNModel, torch.nn.Dropout, torch.nn.Linear, torch.nn.LSTM, torch.nn.Embedding]
        with torch.serialization.safe_globals(kinds):
            module = torch.load(saved, map_location="cpu", weights_only=True)
        module.rnn.flatten_parameters()
        return word_language_model(module, ids_of(tokenizer, data.Corpus(str(texts)).dictionary.idx2word))

    def _main(self, texts: Path, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "main.py", "--data", str(texts), *MODEL, *arguments], cwd=self.folder,
            env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _module(self, name: str) -> Any:
        # Under its own name, since that is what the saved model says of its class.
        spec = importlib.util.spec_from_file_location(name, self.folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def write_texts(
    corpus: Corpus, folder: Path, *, train_words: int | None = None, valid_words: int | None = None
) -> Path:
    """train.txt, valid.txt and test.txt, whole or cut after a line, for both programs.

    Words of valid and test that the training text lacks become <unk>, so that the peer, which numbers the words of
    all three files, has the vocabulary that we have. The test text is the validation text again.
    """
    folder.mkdir()
    train = _cut(corpus, "train", train_words)
    known = {word for line in train for word in line.split()}
    valid = [
        " ".join(word if word in known else "<unk>" for word in line.split()) + "\n"
        for line in _cut(corpus, "valid", valid_words)
    ]
    for name, lines in (("train", train), ("valid", valid), ("test", valid)):
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def _cut(corpus: Corpus, split: str, words: int | None) -> list[str]:
    lines: list[str] = []
    count = 0
    for line in _lines(corpus, split):
        lines.append(line)
        count += len(line.split()) + 1
        if words is not None and count >= words:
            break
    return lines


def _lines(corpus: Corpus, split: str) -> Iterator[str]:
    """Each with a newline, the last one too."""
    for line in "".join(corpus.splits[split].chunks()).split("\n")[:-1]:
        yield line + "\n"
