"""Training next to a busy process: tokens per second as a share of the quiet speed.

    python -m benchmarks.load                    # the presets below, about a minute on 2 cores
    python -m benchmarks.load gru-char lstm-word

Each turn is trained twice, alone and next to one process that computes without end, in another session and bound to
one core. A turn that other programs disturbed is repeated; a share of 45 % or more is the target.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.suite import CORPUS, WORDS, say
from benchmarks.training import trainer_turns
from lm.config import compose
from lm.corpora import open_corpus, prepare

PRESETS = "gru-char", "transformer-char", "lstm-char", "gru-word", "lstm-word"
TARGET = 0.45
TURN_SECONDS = 1.5
MAX_OTHERS = 0.1
"""CPUs that other programs may have used in a turn that counts."""
TRIES = 8


def main() -> None:
    """Print the share of each preset."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as folder:
        for preset in given.presets:
            config = compose(WORDS if "word" in preset else CORPUS, preset=preset)
            prepared = prepare(
                open_corpus(config.corpus, data_dir=given.data_dir), config.tokenizer, cache=Path(folder)
            )
            training = config.training.model_copy(update={"device": "cpu"})
            turn = trainer_turns(config.model, training, prepared, TURN_SECONDS)
            turn()
            shares, others = [], 0.0
            for _ in range(given.rounds):
                quiet, loaded = undisturbed(turn), undisturbed(partial(with_load, turn))
                shares.append(loaded[1] / quiet[1])
                others = max(others, quiet[0], loaded[0])
            share = statistics.median(shares)
            note = "" if others < MAX_OTHERS else f"; of no use: other programs used {others:.1f} CPUs"
            say(f"{preset}: {share:.0%} ({min(shares):.0%} to {max(shares):.0%}), target {TARGET:.0%}{note}")


def undisturbed(turn: Callable[[], float]) -> tuple[float, float]:
    """CPUs that other programs used in a turn, and its figure: of the turn with the least, of at most `TRIES`."""
    found = []
    for _ in range(TRIES):
        used, own, begun = _used_by_all(), _used_by_us(), time.perf_counter()
        figure = turn()
        others = (_used_by_all() - used - (_used_by_us() - own)) / (time.perf_counter() - begun)
        found.append((others, figure))
        if others < MAX_OTHERS:
            break
    return min(found)


def with_load(turn: Callable[[], float]) -> float:
    """The figure of a turn next to a busy process."""
    with busy_process():
        return turn()


@contextmanager
def busy_process() -> Iterator[None]:
    """Inside, another process keeps the last core of this process busy."""
    core = max(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, [{core}])\nprint(flush=True)\nwhile True: pass"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def _used_by_all() -> float:
    """Seconds of CPU that all programs used so far."""
    fields = [int(field) for field in Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def _used_by_us() -> float:
    """The same of this process and its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
