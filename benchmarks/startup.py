"""From pressing Enter to an answer: whole processes, cold but for the machine's own file cache.

Ours is the `lm` program with the shipped model; peers are the imports without which their first line does nothing, and
nanoGPT's sample.py with a checkpoint of its CPU recipe. Contenders take turns.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machine import take_turns, versions
from benchmarks.nanogpt import NanoGPT, PeerError
from benchmarks.suite import CORPUS, NANOGPT, TRANSFORMERS, Record, Settings, Table, say, spread_rows, spreads_text
from lm.config import CorpusConfig, Section
from lm.corpora import open_corpus, prepare

RUN = "shakespeare-gru"
CHARACTERS = 200
LM = ("-m", "cli.main")
OURS: dict[str, tuple[str, ...]] = {
    "lm --help": (*LM, "--help"),
    "import lm": ("-c", "import lm"),
    f"lm sample, {CHARACTERS} characters": (*LM, "sample", RUN, "--max-tokens", str(CHARACTERS), "--seed", "1"),
}
IMPORTS = {
    "import torch": "import torch",
    "import transformers, Llama and tokenizer": "from transformers import AutoTokenizer, LlamaForCausalLM",
}


def run(settings: Settings) -> Record:
    """Ours and the peers in turn."""
    environment = settings.environment()
    contenders = {name: _whole(words, environment) for name, words in OURS.items()}
    contenders["lm sample, first text"] = lambda: first_text(
        (*LM, "sample", RUN, "--max-tokens", str(CHARACTERS), "--seed", "1"), environment
    )
    record = Record(options=settings.options(), versions=versions("numpy", "torch", "transformers"))
    for name, code in IMPORTS.items():
        if "transformers" in code and importlib.util.find_spec("transformers") is None:
            record.missing.append(TRANSFORMERS)
        else:
            contenders[name] = _whole(("-c", code), environment)
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as name:
        if settings.nanogpt is None:
            record.missing.append(NANOGPT)
        else:
            folder = Path(name)
            corpus = open_corpus(CorpusConfig(source=CORPUS), data_dir=settings.data_dir)
            peer = NanoGPT(
                settings.nanogpt, folder, corpus, prepare(corpus, Section(type="char"), cache=folder), settings
            )
            peer.train("sample", 20)
            contenders[f"nanoGPT sample.py, {CHARACTERS} characters"] = lambda: _seconds(
                lambda: peer.sample("sample", CHARACTERS)
            )
        figures = take_turns(contenders, settings.rounds)
    say(f"  {spreads_text(figures)} s")
    record.tables.append(Table("Whole processes", spread_rows(figures), "seconds"))
    return record


def first_text(command: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds from starting Python with these words to its first output; its end is waited for."""
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begun
        process.stdout.read()
    if process.returncode or not first:
        raise PeerError(f"python {' '.join(command)} printed nothing.")
    return seconds


def _whole(words: Sequence[str], environment: dict[str, str]) -> Callable[[], float]:
    command = [sys.executable, *words]
    return lambda: _seconds(lambda: subprocess.run(command, env=environment, capture_output=True, check=True))


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun
