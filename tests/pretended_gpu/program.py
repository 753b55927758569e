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
            sizes = {"transformer": TINY_TRANSFORMER, "ngram": {}}.get(model["type"], TINY_RECURRENT)
            tiny = {**TINY, **sizes}
            if "table_orders" not in model:
                tiny.pop("model.table_buckets")
            if "adaptive_cutoffs" in model:
                tiny["model.adaptive_cutoffs"] = [4, 10]
            if preset["tokenizer"]["type"] == "subword":
                tiny["tokenizer.size"] = 300
            if "gradient_accumulation" in preset.get("training", {}):
                tiny["training.gradient_accumulation"] = 2
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
    """Training steps without metrics: counts of the last one, losses of all; then one step with metrics."""
    trial = bench.trial(case)
    losses, found = [], {}
    for _ in range(STEPS):
        watch.reset()
        result = trial.run_step()
        found = watch.report()
        losses.append(result.loss)
    with_metrics = trial.run_step(with_metrics=True)
    accuracy = with_metrics.accuracy
    return {"format": str(trial.step.mixed.format), "losses": losses, "accuracy": accuracy, **found}


def job(bench: Bench, case: Case, watch: gpu.Watch) -> dict[str, Any]:
    """A whole run: train, validate, save, stop and resume, evaluate, score and sample; what it did to the device."""
    import lm

    _shorten_samples()
    config = bench.config(case, **{"training.max_steps": 4, "training.log_every": 2, "training.sample_tokens": 3})
    starts = _Starts()
    with tempfile.TemporaryDirectory(dir=bench.folder) as runs:
        shared: dict[str, Any] = {"config": config, "runs_dir": runs, "callbacks": [starts.callback()]}
        whole = lm.train(config.corpus.source, name="whole", **shared)
        lm.train(config.corpus.source, name="part", stop_after=2, **shared)
        part, _ = lm.resume("part", runs_dir=runs, callbacks=[starts.callback()])
        run = lm.load("whole", runs_dir=runs, device="cuda")
        report = run.evaluate("valid")
        sample = run.sample("the cat", max_tokens=6, seed=1)
        differing = [] if config.model.type == "ngram" else _differing(whole, part)
        scored = [token.nats for token in run.score("the cat sat")]
    devices = sorted({start.device for start in starts.seen})
    formats = sorted({start.precision for start in starts.seen})
    return {
        "devices": devices, "formats": formats, "differing": differing, "loss": report.loss,
        "sample": sample, "scored": sum(scored), **watch.report(),
    }  # fmt: skip


def _shorten_samples() -> None:
    """The sample of a finished run is 300 tokens long, which takes seconds here."""
    from lm.generation.options import SamplingOptions
    from lm.jobs import report

    report.SAMPLE = SamplingOptions(max_tokens=4)


class _Starts:
    """Remembers the `Start` of each training."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def callback(self) -> Any:
        from lm.training.callbacks import Callback

        seen = self.seen

        class Starts(Callback):
            def on_start(self, start: Any) -> None:
                seen.append(start)

        return Starts()


def _differing(one: Any, other: Any) -> list[str]:
    """Names of weights of the last checkpoints that differ."""
    first, second = (run.folder.read_weights("last")[0] for run in (one, other))
    return sorted(name for name in first if first[name].tobytes() != second[name].tobytes())


def equal(bench: Bench, case: Case, watch: gpu.Watch) -> dict[str, Any]:
    """Losses of the same steps on both devices, without dropout."""
    from lm.config import merge
    from lm.profiling.trial import make_trial

    config = bench.config(case)
    model = config.model.model_dump()
    off = {f"model.{name}": 0 for name, value in model.items() if name.endswith("dropout") and value is not None}
    off |= {"model.locked_dropout": False} if "locked_dropout" in model else {}
    losses: dict[str, list[float]] = {}
    for device in ("cuda", "cpu"):
        same = merge(config, {**off, "training.device": device})
        trial = make_trial(same, bench.corpus(same), learns=True)
        results = [trial.run_step() for _ in range(6)]
        losses[device] = [result.loss for result in results]
        losses[f"{device} norms"] = [result.grad_norm for result in results]
    return losses


def loop(bench: Bench, case: Case, watch: gpu.Watch) -> dict[str, Any]:
    """The trainer's loop without validations: waits from one `on_step` to the next, without those of log lines."""
    from lm.models.base import build_model
    from lm.runs.record import run_record
    from lm.runs.run_folder import RunFolder
    from lm.training.callbacks import Callback
    from lm.training.plan import Plan
    from lm.training.trainer import Trainer

    steps, every = {}, 4

    class Steps(Callback):
        def on_start(self, start: Any) -> None:
            watch.reset()

        def on_step(self, tick: Any) -> None:
            steps[tick.step] = watch.report()
            watch.reset()

        def on_log(self, row: Any) -> None:
            watch.reset()

    config = bench.config(case, **{"training.log_every": every})
    corpus = bench.corpus(config)
    model = build_model(config.model, corpus.tokenizer.vocab_size, seed=1)
    if model.trained_by == "both":
        model.fit(corpus.splits["train"].ids)
    with tempfile.TemporaryDirectory(dir=bench.folder) as runs:
        folder = RunFolder(Path(runs) / "run")
        folder.create(run_record(config, corpus, model, None), corpus.tokenizer)
        trainer = Trainer(folder, config.training, model, corpus, callbacks=[Steps()])
        trainer.train(Plan(steps=8, evaluate_every=1000))
    # The first step allocates, and the one after a log line may settle what the line left.
    between = {step: found for step, found in steps.items() if step > 1 and step % every > 1}
    return {
        "steps": {step: found["waits"] for step, found in between.items()},
        "wait_places": {place: n for found in between.values() for place, n in found["wait_places"].items()},
    }


def explain(bench: Bench, case: Case, watch: gpu.Watch) -> dict[str, Any]:
    """What `lm train --explain --dry-run` prints of the default model."""
    import typer
    from typer.testing import CliRunner

    from cli.commands import train

    app = typer.Typer(rich_markup_mode=None)
    app.command()(train.command)
    result = CliRunner().invoke(app, [bench.source, "--device", "cuda", "--explain", "--dry-run", "--max-steps", "40"])
    return {"exit_code": result.exit_code, "printed": result.output}


def counting(bench: Bench, case: Case, watch: gpu.Watch) -> dict[str, Any]:
    """Waits and launches of single operations, by name."""
    import torch

    host = torch.arange(6.0)
    pinned, device, mask = host.pin_memory(), host.to("cuda"), (host > 2).to("cuda")
    operations: dict[str, Callable[[], Any]] = {
        "add": lambda: device + 1,
        "view": lambda: device[1:].view(5, 1),
        "foreach": lambda: torch._foreach_mul([device, device], 2.0),
        "item": lambda: device.sum().item(),
        "if": lambda: bool(mask[0]),
        "tolist": lambda: device.tolist(),
        "nonzero": lambda: mask.nonzero(),
        "boolean mask": lambda: device[mask],
        "unique": lambda: device.unique(),
        "to the host": lambda: device.cpu(),
        "to a pinned tensor": lambda: pinned.copy_(device, non_blocking=True),
        "to a pageable tensor": lambda: host.clone().copy_(device, non_blocking=True),
        "to the device": lambda: host.to("cuda"),
        "to the device, pageable": lambda: host.to("cuda", non_blocking=True),
        "to the device, pinned": lambda: pinned.to("cuda", non_blocking=True),
        "made of a list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "synchronize": torch.cuda.synchronize,
        "float64": lambda: device.double(),
    }
    found = {}
    for name, operation in operations.items():
        for mode in (torch.enable_grad, torch.inference_mode):
            watch.reset()
            with mode():
                operation()
            found[f"{name}, {mode.__name__}"] = [sum(watch.waits.values()), sum(watch.operators.values())]
    return {"found": found, "float64": watch.report()["float64"]}


def mixing(bench: Bench, case: Case, watch: gpu.Watch) -> dict[str, Any]:
    """A step of a model that has a weight on the other device."""
    import torch

    name = case.overrides.pop("part")
    trial = bench.trial(case)
    model = trial.step.model
    part = model.get_submodule(name)
    part.weight = torch.nn.Parameter(part.weight.detach().cpu())
    trial.run_step()
    return {}


ACTIONS: dict[str, Callable[[Bench, Case, gpu.Watch], dict[str, Any]]] = {
    "steps": steps, "job": job, "equal": equal, "loop": loop, "explain": explain, "counting": counting,
    "mixing": mixing,
}  # fmt: skip


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
