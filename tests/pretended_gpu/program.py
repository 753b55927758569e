"""Runs cases on the pretended GPU and prints one JSON line for each.

    python -m tests.pretended_gpu.program CASE …
    python -m tests.pretended_gpu.program steps:gru-char steps:transformer-char:bf16:O1 --table
    python -m tests.pretended_gpu.program steps:lstm-word:fp32::training.batch_size=8 --real --text shakespeare

A case is ACTION:PRESET:PRECISION:AMP:OVERRIDES; what is left out is the default, OVERRIDES are `section.field=value`
separated by ";". Actions are the functions of `ACTIONS`. Presets are made tiny (`TINY`) except with `--real`.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.pretended_gpu import gpu  # before torch

STEPS = 3
"""Steps that are counted one by one; the first ones allocate the optimizer's moments."""
TINY: dict[str, Any] = {"model.table_buckets": 64, "training.batch_size": 4, "training.bptt": 8}
TINY_RECURRENT = {"model.embedding_size": 12, "model.hidden_size": 16}
TINY_TRANSFORMER = {
    "model.context_length": 8, "model.hidden_size": 16, "model.num_heads": 2, "model.num_layers": 2,
}  # fmt: skip
COUNTED = ("ngram-char", "ngram-word")
"""Presets without steps."""


@dataclass
class Case:
    """One thing to do on the device."""

    action: str
    preset: str
    precision: str | None = None
    amp: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Case:
        """ACTION:PRESET:PRECISION:AMP:OVERRIDES."""
        parts = [*text.split(":", 4), "", "", "", ""]
        pairs = dict(pair.split("=", 1) for pair in parts[4].split(";") if pair)
        return cls(parts[0], parts[1], parts[2] or None, parts[3] or None, pairs)


class Bench:
    """Texts, and trials of presets on the device."""

    def __init__(self, text: str, *, real: bool) -> None:
        self.real = real
        self._prepared: dict[str, Any] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="pretended-gpu-"))
        self.source = text or str(self._write_text())

    def _write_text(self) -> Path:
        words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "den", "in fog")
        choose = random.Random(3)
        lines = (" ".join(choose.choice(words) for _ in range(9)) + ".\n" for _ in range(150))
        path = self.folder / "words.txt"
        path.write_text("".join(lines), "utf-8")
        return path

    def config(self, case: Case, **more: Any) -> Any:
        """The configuration of a case, on device cuda."""
        from lm.config import compose, read_preset

        tiny: dict[str, Any] = {}
        if not self.real:
            preset = read_preset(case.preset)
            model = preset["model"]
            tiny = {**TINY, **(TINY_TRANSFORMER if model["type"] == "transformer" else TINY_RECURRENT)}
            if "table_orders" not in model:
                tiny.pop("model.table_buckets")
            if "adaptive_cutoffs" in model:
                tiny["model.adaptive_cutoffs"] = [4, 10]
            if preset["tokenizer"]["type"] == "subword":
                tiny["tokenizer.size"] = 300
            if model["type"] == "hybrid":
                tiny["model.order"] = 3
        wanted = {"training.precision": case.precision, "training.amp": case.amp}
        given = {name: value for name, value in wanted.items() if value is not None}
        over = {**tiny, "training.device": "cuda", **given, **case.overrides, **more}
        return compose(self.source, preset=case.preset, overrides=over)

    def corpus(self, config: Any) -> Any:
        """The prepared corpus of a configuration; made once for each tokenizer."""
        from lm.config import CorpusConfig
        from lm.corpora import open_corpus, prepare

        key = repr(config.tokenizer)
        if key not in self._prepared:
            self._prepared[key] = prepare(open_corpus(CorpusConfig(source=config.corpus.source)), config.tokenizer)
        return self._prepared[key]

    def trial(self, case: Case) -> Any:
        """A `lm.profiling.trial.Trial` of a case."""
        from lm.profiling.trial import make_trial

        config = self.config(case)
        return make_trial(config, self.corpus(config), learns=True)


def steps(bench: Bench, case: Case, watch: gpu.Watch) -> dict[str, Any]:
    """Training steps without metrics: counts of the last one, losses of all."""
    trial = bench.trial(case)
    losses, found = [], {}
    for _ in range(STEPS):
        watch.reset()
        result = trial.run_step()
        found = watch.report()
        losses.append(result.loss)
    return {"format": str(trial.step.mixed.format), "losses": losses, **found}


ACTIONS: dict[str, Callable[[Bench, Case, gpu.Watch], dict[str, Any]]] = {"steps": steps}


def run(bench: Bench, text: str) -> dict[str, Any]:
    """The outcome of a case: its values, or error and traceback."""
    begun = time.perf_counter()
    try:
        case = Case.parse(text)
        with gpu.pretended() as watch:
            found = ACTIONS[case.action](bench, case, watch)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        found = {
            "error": message.splitlines()[0][:500],
            "traceback": "".join(traceback.format_tb(error.__traceback__))[-4000:],
        }
    return {"case": text, "seconds": round(time.perf_counter() - begun, 2), **found}


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Host waits and operators, a line a case."""
    yield f"{'case':<44} {'waits':>6} {'operators':>10}"
    for result in results:
        if "error" in result:
            yield f"{result['case']:<44} {result['error']}"
            continue
        yield f"{result['case']:<44} {result.get('waits', ''):>6} {result.get('operators', ''):>10}"


def main() -> None:
    """Read cases from the command line, or one a line from standard input if there are none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--text", default="", help="a corpus in place of the built-in words")
    parser.add_argument("--real", action="store_true", help="presets in their own size")
    parser.add_argument("--table", action="store_true", help="a table after the lines")
    parser.add_argument("--places", action="store_true", help="with --table: the places of waits")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="pretended-gpu-cache-") as cache:
        os.environ.setdefault("INKLING_CACHE", cache)
        bench = Bench(options.text, real=options.real)
        results = []
        for text in options.cases or [line.strip() for line in sys.stdin if line.strip()]:
            results.append(run(bench, text))
            if not options.table:
                print(json.dumps(results[-1]), flush=True)
    if options.table:
        print(*table(results), sep="\n")
    if options.places:
        for result in results:
            print(result["case"], *(f"\n  {n} {at}" for at, n in result.get("wait_places", {}).items()))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
