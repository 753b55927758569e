"""What a suite is asked, and what it answers.

Each suite is one file with a function `run(settings) -> Record`, and a line in `SUITES`. A record holds its figures as
tables, plots and claims, so that `benchmarks.report` can print any suite without knowing it.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import RESULTS, Spread

SUITES = {
    "training": "tokens a second of training, at equal architecture and batch",
    "time-to-loss": "how long until the loss that nanoGPT's CPU recipe reaches",
    "quality": "the loss after equal time",
    "words": "the perplexity by words after equal epochs",
    "formats": "training in bf16 and in fp32",
    "decoding": "tokens a second of generating",
    "imported": "an imported model and llama.cpp on the same file",
    "tokenizing": "megabytes a second of encoding",
    "startup": "from pressing Enter to the first text",
    "defaults": "the default after equal time, on texts of many kinds",
}
"""Name → what it measures; `time-to-loss` is in time_to_loss.py. In the order they are run in."""

CORPUS = "tiny-shakespeare"
WORDS = "wikitext-2"
QUICK = "--preset gru-char-small --max-steps 60"
"""What follows `lm train CORPUS` to reach nanoGPT's loss at once."""
BEST = ""
"""What follows `lm train CORPUS --minutes N` for the best of N minutes: nothing, the defaults."""
HYBRID = "--preset hybrid-char"
"""The same, for the hybrid of counts and a network."""
FLOOR = "--preset ngram-char"
"""What follows `lm train CORPUS` for the floor: counts alone."""
WORD = (
    "--preset lstm-word --set model.embedding_size=200 --set model.hidden_size=200 --set model.num_layers=2 "
    "--set training.batch_size=20 --set training.bptt=35 --set training.average_share=none"
)
"""What follows `lm train WORDS` for the model of PyTorch's example: an LSTM, 2 layers, 200 wide, tied; for an epoch."""

NANOGPT = "nanoGPT: git clone https://github.com/karpathy/nanoGPT, then --nanogpt PATH (make bench NANOGPT=PATH)"
WLM = (
    "PyTorch word-language-model example: git clone https://github.com/pytorch/examples, then "
    "--wlm PATH/word_language_model (make bench WLM=PATH/word_language_model)"
)
TRANSFORMERS = "Hugging Face transformers: pip install transformers"


@dataclass(frozen=True)
class Settings:
    """How a suite is run."""

    full: bool = False
    """Whole recipes in place of slices."""
    threads: int = 2
    """Of every contender."""
    nanogpt: Path | None = None
    wlm: Path | None = None
    data_dir: Path | None = None
    quick: str = QUICK
    best: str = BEST
    hybrid: str = HYBRID
    floor: str = FLOOR
    baseline: Path | None = None
    """A checkout whose default is compared."""
    losses: Path | None = None
    """A folder of `benchmarks.bf16`."""
    results: Path = RESULTS
    """The folder of the records."""

    turns: int | None = None

    @property
    def rounds(self) -> int:
        """Turns of each contender that count."""
        return self.turns or (5 if self.full else 3)

    def environment(self, **more: str) -> dict[str, str]:
        """For a contender in a separate process: as many threads as the others, and no GPU."""
        threads = str(self.threads)
        own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "-1", **more}
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        return {**os.environ, **own, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    def options(self) -> dict[str, Any]:
        """What to record of them; a path would name one machine."""
        return {"full": self.full, "threads": self.threads, "rounds": self.rounds}


@dataclass(frozen=True)
class Table:
    """Rows of figures; a figure is rounded only when it is shown."""

    title: str
    rows: list[dict[str, Any]]
    """Column → number, text, or None for what was not measured; the first row says which columns there are."""
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A target of the project, and what was measured of it."""

    what: str
    value: float | None
    target: float
    bound: Literal["at least", "at most"]
    unit: str = ""
    why: str = ""
    """Why there is no value, or a remark on it."""
    other: Mapping[str, Any] | None = None
    """A second claim, as a dict; the target is met where either holds."""


@dataclass(frozen=True)
class Plot:
    """Lines over a common axis."""

    name: str
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    level: tuple[str, float] | None = None
    """A dashed line across."""


@dataclass
class Record:
    """The answer of a suite."""

    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Peers that were not here, and how to get them."""
    notes: list[str] = field(default_factory=list)


def run_suite(name: str, settings: Settings) -> Record:
    """Run the suite of this name."""
    record: Record = importlib.import_module(f"benchmarks.{name.replace('-', '_')}").run(settings)
    return record


def spread_rows(spreads: Mapping[str, Spread], *, column: str = "contender") -> list[dict[str, Any]]:
    """A table's rows: a contender and its median, least and most."""
    return [{column: name, **each} for name, each in spreads.items()]


def spreads_text(figures: Mapping[str, Spread]) -> str:
    """The medians in one line."""
    return ", ".join(f"{name} {each['median']:,.{0 if each['median'] > 100 else 3}f}" for name, each in figures.items())


def say(line: str) -> None:
    """Tell whoever waits what is going on."""
    print(line, file=sys.stderr, flush=True)


def split(arguments: str) -> list[str]:
    """A command line's words."""
    return shlex.split(arguments)
