"""What `make gpu` measures, one function a part; each adds its tables as it goes, so that a time limit loses little."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoding, loops, nanogpt
from benchmarks.machine import spread, take_turns
from benchmarks.suite import NANOGPT, TRANSFORMERS, Claim, Record, Settings, Table, spread_rows
from benchmarks.training import loop_turns, ratio, trainer_turns
from lm.config import CorpusConfig, RunConfig, Section, TrainingConfig, compose, merge, read_preset
from lm.corpora import PreparedCorpus, open_corpus, prepare
from lm.generation.torch_decoder import TorchDecoder
from lm.machine import wait
from lm.models.base import build_model
from lm.profiling.trial import Trial, make_trial
from lm.training.precision import Format, formats

CUDA = torch.device("cuda")
STEPS = 20
"""Of a model at each level."""
EQUAL_STEPS = 6
RECIPE = (
    "--device=cuda", "--compile=True", "--eval_iters=1", "--log_interval=1", "--block_size=256", "--batch_size=64",
    "--n_layer=6", "--n_head=6", "--n_embd=384", "--dropout=0.2",
)  # fmt: skip
"""nanoGPT's own configuration for Shakespeare on a GPU."""
BABY = {
    # As many weights as nanoGPT's: 2/3 of its inner width for three matrices in place of two.
    "type": "transformer", "context_length": 256, "hidden_size": 384, "num_layers": 6, "num_heads": 6,
    "mlp_size": 1024, "qk_norm": False, "tie_weights": True, "dropout": 0.2,
}  # fmt: skip
DRY_MODEL = {"model.embedding_size": 12, "model.hidden_size": 16, "training.batch_size": 4, "training.bptt": 8}
DRY_TRANSFORMER = {"model.context_length": 8, "model.num_heads": 2, "model.num_layers": 2, "model.hidden_size": 16}


class GpuSettings(Settings):
    """Settings of the benchmarks whose peers see the GPU."""

    def environment(self, **more: str) -> dict[str, str]:
        """As `Settings.environment`, without hiding the GPU."""
        return {name: value for name, value in super().environment(**more).items() if name != "CUDA_VISIBLE_DEVICES"}


@dataclass
class Job:
    """The conditions of a part, and its results so far."""

    seconds: float
    """Its time limit."""
    folder: Path
    """For files that are thrown away."""
    save: Callable[[Record], None] = lambda record: None
    """Called after each addition."""
    dry: bool = False
    """Everything tiny: to find mistakes in this program."""
    nanogpt: Path | None = None
    data_dir: Path | None = None
    text: str = "tiny-shakespeare"
    words: str = "wikitext-2"
    record: Record = field(default_factory=Record)
    begun: float = field(default_factory=time.perf_counter)

    def size(self, real: Any, dry: Any) -> Any:
        """`real`, or `dry` in a dry run."""
        return dry if self.dry else real

    def left(self) -> float:
        """Seconds until the time limit."""
        return self.seconds - (time.perf_counter() - self.begun)

    def table(self, title: str, note: str = "") -> list[dict[str, Any]]:
        """The rows of a new table, for `add`."""
        self.record.tables.append(Table(title, [], note))
        return self.record.tables[-1].rows

    def add(self, rows: list[dict[str, Any]], **row: Any) -> None:
        """Add a row and save."""
        rows.append(row)
        self.save(self.record)

    def claim(self, claim: Claim) -> None:
        """Add a target and save."""
        self.record.claims.append(claim)
        self.save(self.record)

    def config(self, preset: str, **overrides: Any) -> RunConfig:
        """A preset on the GPU, tiny in a dry run."""
        kind = read_preset(preset)["model"]["type"]
        words = "word" in preset
        tiny = {**DRY_MODEL, **(DRY_TRANSFORMER if kind == "transformer" else {})}
        if kind == "transformer":
            tiny.pop("model.embedding_size")
        if words:
            tiny["model.adaptive_cutoffs"] = [4, 10]
        elif read_preset(preset)["model"].get("table_orders"):
            tiny["model.table_buckets"] = 64
        source = self.words if words else self.text
        over = {**(tiny if self.dry else {}), "training.device": "cuda", **overrides}
        return compose(source, preset=preset, overrides=over)

    def corpus(self, config: RunConfig) -> PreparedCorpus:
        """The text of a configuration as tokens."""
        source = CorpusConfig(source=config.corpus.source)
        return prepare(open_corpus(source, data_dir=self.data_dir), config.tokenizer)


def device_name() -> str:
    """The product name of the GPU."""
    return str(torch.cuda.get_device_name(CUDA))


# -- right --------------------------------------------------------------------------------------------


def equality(job: Job) -> None:
    """Results of both devices, and every level without a host wait."""
    _equal_steps(job)
    _levels_without_waits(job)


def _equal_steps(job: Job) -> None:
    rows = job.table("Steps in fp32 without dropout, GPU against CPU", "largest relative difference")
    worst = 0.0
    for preset in ("gru-char-small", "hybrid-char", "lstm-word", "transformer-char"):
        config = job.config(preset, **{"training.precision": "fp32", "training.batch_size": 8})
        model = config.model.model_dump()
        off = {f"model.{name}": 0 for name, value in model.items() if name.endswith("dropout") and value is not None}
        if "locked_dropout" in model:
            off["model.locked_dropout"] = False
        corpus = job.corpus(config)
        both = []
        for device in ("cuda", "cpu"):
            trial = make_trial(merge(config, {**off, "training.device": device}), corpus, learns=True)
            both.append([trial.run_step() for _ in range(EQUAL_STEPS)])
        loss, norm = (
            max(abs(getattr(a, name) / getattr(b, name) - 1) for a, b in zip(*both, strict=True))
            for name in ("loss", "grad_norm")
        )
        worst = max(worst, loss)
        job.add(rows, preset=preset, loss=loss, gradient_norm=norm)
    job.claim(Claim("largest relative difference of a loss between GPU and CPU, fp32", worst, 1e-3, "at most"))


def _levels_without_waits(job: Job) -> None:
    rows = job.table("Steps under torch.cuda.set_sync_debug_mode('error')", f"{STEPS} steps")
    waiting = 0
    for preset, each in itertools.product(("gru-char", "lstm-word", "transformer-char", "hybrid-char"), _formats(job)):
        trial = _trial(job, preset, each)
        first = [trial.run_step() for _ in range(3)][0]
        waits = "none"
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(job.size(STEPS, 2)):
                trial.run_step()
        except RuntimeError as error:
            waits, waiting = str(error).splitlines()[0][:120], waiting + 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        last = trial.run_step(with_metrics=True)
        job.add(rows, preset=preset, level=str(each), waits=waits, first_loss=first.loss, last_loss=last.loss)
    job.claim(Claim("presets and levels with a host wait between log lines", waiting, 0, "at most"))


def _formats(job: Job) -> list[Format]:
    found = formats(CUDA)
    return list(job.size(found, [found[0], found[-1]]))


def _trial(job: Job, preset: str, level: Format, **overrides: Any) -> Trial:
    """Training steps of a preset at a level."""
    amp = {} if level.level == "O0" else {"training.amp": level.level}
    config = job.config(preset, **{"training.precision": level.precision, **amp, **overrides})
    return make_trial(config, job.corpus(config), learns=True)


# -- fast ---------------------------------------------------------------------------------------------


def levels(job: Job) -> None:
    """Speed, loss and memory at each level of the presets for a GPU."""
    for preset in ("gru-char-gpu", "transformer-char-gpu"):
        rows = job.table(f"{preset} at each level", f"after {STEPS} steps")
        for each in _formats(job):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            trial = _trial(job, preset, each)
            times, result = [], None
            for _ in range(job.size(STEPS, 4)):
                before = time.perf_counter()
                result = trial.run_step()
                wait(CUDA)
                times.append(time.perf_counter() - before)
            job.add(
                rows, level=str(each), tokens_per_second=trial.batches.tokens_per_step / statistics.median(times[3:]),
                loss=result.loss, memory_gb=torch.cuda.max_memory_allocated() / 1e9,
            )  # fmt: skip


def throughput(job: Job) -> None:
    """Beside nanoGPT and loops over torch's own layers."""
    corpus = job.corpus(job.config("gru-char"))
    _recurrent(job, corpus)
    _transformer(job, corpus)


def _recurrent(job: Job, corpus: PreparedCorpus) -> None:
    hidden, bptt, seconds = job.size((512, 128, 2.0), (16, 8, 0.05))
    vocabulary = corpus.tokenizer.vocab_size
    shapes: Iterator[tuple[Any, int]] = itertools.product(("gru", "lstm"), job.size((256, 1024), (4,)))
    for kind, batch in shapes:
        training = TrainingConfig(batch_size=batch, bptt=bptt, device="cuda", precision="bf16")
        section = Section(type=kind, embedding_size=hidden, hidden_size=hidden)
        module = loops.PlainRecurrent(kind, vocabulary, hidden, hidden, 1).to(CUDA)
        step = loops.recurrent_steps(
            module, corpus.splits["train"].ids, batch_size=batch, bptt=bptt, low=torch.bfloat16
        )
        contenders = {
            "ours": trainer_turns(section, training, corpus, seconds),
            f"plain nn.{kind.upper()}": loop_turns(step, batch * bptt, seconds),
        }
        _turns(job, f"{kind.upper()} {hidden}, batch {batch}, bptt {bptt}, bf16", contenders, target=1.0)


def _transformer(job: Job, corpus: PreparedCorpus) -> None:
    batch, seconds = job.size((64, 4.0), (2, 0.05))
    shape = {**BABY, **job.size({}, {"context_length": 16, "hidden_size": 16, "num_layers": 2, "num_heads": 2})}
    shape["mlp_size"] = job.size(1024, 32)
    training = TrainingConfig(batch_size=batch, device="cuda", precision="bf16", batching="random")
    compiled = {"compile": "on"} if "compile" in TrainingConfig.model_fields and not job.dry else {}
    contenders = {
        "ours": trainer_turns(Section(**shape), training.model_copy(update=compiled), corpus, seconds),
        "ours, not compiled": trainer_turns(
            Section(**shape), training.model_copy(update={"compile": "off"} if compiled else {}), corpus, seconds
        ),
    }
    if job.nanogpt is None:
        job.record.missing.append(NANOGPT)
    else:
        text = open_corpus(CorpusConfig(source=job.text), data_dir=job.data_dir)
        peer = nanogpt.NanoGPT(job.nanogpt, job.folder, text, corpus, GpuSettings(threads=os.cpu_count() or 1))

        def turn() -> float:
            times = peer.train("turn", 200, save=False, recipe=RECIPE).step_seconds
            return 64 * 256 / statistics.median(times[nanogpt.SETTLED :])

        # Once: its compiler alone takes most of a minute.
        contenders["nanoGPT, compiled"] = _once(turn)
    _turns(job, "Transformer 6 × 384, context 256, batch 64, bf16", contenders, target=1.0)


def _once(measure: Callable[[], float]) -> Callable[[], float]:
    """`measure`, which is called at the first turn alone."""
    found: list[float] = []

    def turn() -> float:
        if not found:
            found.append(measure())
        return found[0]

    return turn


def _turns(job: Job, title: str, contenders: dict[str, Callable[[], float]], *, target: float) -> None:
    figures = take_turns(contenders, job.size(2, 1), warm_up=1)
    rows = job.table(title, "tokens/s")
    for row in spread_rows(figures):
        job.add(rows, **row)
    medians = {name: each["median"] for name, each in figures.items()}
    peer = next((name for name in contenders if not name.startswith("ours")), "nanoGPT, compiled")
    job.claim(ratio(title, medians, peer, target, "" if peer in contenders else "it is not here"))


def decode(job: Job) -> None:
    """Tokens a second of the engine on the device, beside generate of transformers and a loop over nn.GRU."""
    if importlib.util.find_spec("transformers") is None:
        job.record.missing.append(TRANSFORMERS)
    tokens = job.size(200, 3)
    for shape, weights in decoding.SHAPES.items():
        small: dict[str, Any] = {"hidden_size": 48}
        small |= {"embedding_size": 16} if "gru" in shape else {"num_heads": 2, "num_layers": 1}
        model = build_model(Section(**{**weights, **job.size({}, small)}), decoding.V, seed=1).to(CUDA).eval()
        for batch in job.size((1, decoding.BATCH, 128), (1, 2)):
            contenders = {"engine": decoding.requests(TorchDecoder(model), batch, tokens)}
            if "gru" in shape:
                contenders["nn.GRU loop, top_k 40"] = decoding.gru_loop(model, batch, tokens, sample=True)
            elif not job.record.missing:
                contenders["transformers generate"] = decoding.hugging_face(model, batch, tokens)
            rows = job.table(f"{shape}, batch {batch}", "tokens/s over the whole batch")
            for name, run in contenders.items():
                rates = []
                for _ in range(job.size(3, 1)):
                    begun = time.perf_counter()
                    done = run()
                    wait(CUDA)
                    rates.append(done / (time.perf_counter() - begun))
                job.add(rows, contender=name, **spread(rates))


# -- good ---------------------------------------------------------------------------------------------


def quality(job: Job) -> None:
    """The default model on tiny-shakespeare, and the Transformer for a GPU."""
    import lm

    rows = job.table("tiny-shakespeare, whole validation split", "the time limit shared by two runs")
    share = _training_minutes(job, runs=2)
    for name, options in {"default": {}, "transformer-char-gpu": {"preset": "transformer-char-gpu"}}.items():
        tiny = {"training.device": "cuda"}
        if job.dry:
            tiny |= {"model.hidden_size": 16, **({} if options else {"training.batch_size": 4})}
            tiny |= {name: DRY_TRANSFORMER[name] for name in DRY_TRANSFORMER if options}
            tiny |= {"training.batch_size": 2} if options else {}
        run = lm.train(
            job.text, minutes=share, overrides=tiny, name=name, runs_dir=job.folder / "runs", data_dir=job.data_dir,
            **options,
        )  # fmt: skip
        _add_run(job, rows, run, name)


def words(job: Job) -> None:
    """WikiText-2 by words."""
    import lm

    rows = job.table("wikitext-2 by words, whole validation split", "lstm-word-gpu")
    config = job.config("lstm-word-gpu", **({"model.num_layers": 2, "model.dropout": 0} if job.dry else {}))
    run = lm.train(
        config.corpus.source, config, minutes=_training_minutes(job, runs=1), name="words",
        runs_dir=job.folder / "runs", data_dir=job.data_dir,
    )  # fmt: skip
    perplexity = _add_run(job, rows, run, "lstm-word-gpu")
    job.claim(Claim("wikitext-2, perplexity per word on valid", perplexity, 65.0, "at most"))


def _training_minutes(job: Job, *, runs: int) -> float:
    """Of each run: what is left, without time for preparation and reports, at most five minutes."""
    return float(job.size(min(5.0, max(0.2, (job.left() * 0.85 - 10) / runs / 60)), 0.01))


def _add_run(job: Job, rows: list[dict[str, Any]], run: Any, name: str) -> float:
    report = run.reports()["valid"]
    lines = run.folder.read_metrics()
    job.add(
        rows, run=name, nats_per_token=report["loss"], perplexity=math.exp(report["loss"]),
        bits_per_byte=report["bits_per_byte"], steps=lines[-1]["step"] if lines else None,
        training_seconds=lines[-1]["seconds"] if lines else None,
        tokens_per_second=lines[-1]["tokens_per_second"] if lines else None,
    )  # fmt: skip
    return math.exp(report["loss"])


PARTS: dict[str, Callable[[Job], None]] = {
    "equality": equality, "levels": levels, "throughput": throughput, "decode": decode, "quality": quality,
    "words": words,
}  # fmt: skip
