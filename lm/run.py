"""A trained run: load it, sample from it, evaluate it.

run = lm.load("tiny-shakespeare-gru-char")
print(run.sample("ROMEO:", temperature=0.8, seed=7))
print(run.evaluate(text="To be, or not to be").bits_per_byte)
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.checkpoint import CARD, REPORT, SAMPLES, RunFolder, find_run
from lm.config import DEFAULT_RUNS_DIR, RunConfig, validate
from lm.corpora import Progress, TokenSplit, encode_text, load_prepared, open_corpus, prepare
from lm.errors import CorpusError, CorruptRunError, RunNotFoundError
from lm.files import read_facts, read_json, write_file
from lm.generation.options import SamplingOptions
from lm.tokenizers.base import Ids, Tokenizer, UnknownPolicy
from lm.version import __version__

if TYPE_CHECKING:
    import torch

    from lm.device import Precision
    from lm.evaluation.report import Report
    from lm.generation.generate import Outcome
    from lm.models.base import LanguageModel

log = logging.getLogger(__name__)

_NUMBERS = (
    "loss", "standard_error", "perplexity", "word_perplexity", "bits_per_char", "bits_per_byte", "accuracy",
    "top5_accuracy", "tokens", "words", "characters", "bytes", "unknown_tokens", "unknown_rate",
)  # fmt: skip
_TEXTS = ("state", "context", "text_sha256")


def _is_report(value: Any) -> bool:
    """Whether a part of report.json holds what is shown of it; needs no torch."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), int | float) or _beyond_floats(name, value) for name in _NUMBERS)
        and all(isinstance(value.get(name), str) for name in _TEXTS)
        and isinstance(value.get("step"), int | None)
        and isinstance(value.get("notes"), list)
    )


def _beyond_floats(name: str, report: dict[str, Any]) -> bool:
    return name.endswith("perplexity") and report.get(name, 0) is None


def _watched(pieces: Iterator[str]) -> Iterator[str]:
    """The same pieces; running out of memory becomes a sentence."""
    from lm.device import enough_memory

    with enough_memory():
        yield from pieces


def load(run: str | None = None, *, runs_dir: Path | str = DEFAULT_RUNS_DIR, device: str | None = None) -> Run:
    """The run that `run` names.

    Args:
        run: a name under `runs_dir`, a path, or NAME@last, NAME@step-500 for a kept state; None is the newest.
        runs_dir: where the runs lie; the shipped ones are searched last.
        device: where the model computes; None picks a GPU when there is one.

    Raises:
        RunNotFoundError: no such run. What is wrong inside it is raised when it is first used.
    """
    folder, state = find_run(run, Path(runs_dir))
    folder.weights_path(state)
    return Run(folder, state, device=device)


class Run:
    """One run on disk; tokenizer and weights are read, and checked, when first needed."""

    def __init__(self, folder: RunFolder, state: str = "best", *, device: str | None = None) -> None:
        self.folder = folder
        self.state = state
        self._device = device

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return self.folder.read_record()

    @functools.cached_property
    def config(self) -> RunConfig:
        """Every option the run was made with."""
        return validate(RunConfig, self.record["config"], where="config.json: config")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self.folder.read_tokenizer()

    @functools.cached_property
    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.folder.read_weights(self.state)

    @property
    def step(self) -> int | None:
        """The optimizer step that the weights come from."""
        return self._weights[1].get("step")

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model with its weights, on its device, ready to predict."""
        from lm.models.base import build_model

        model = build_model(self.config.model, self.tokenizer.vocab_size)
        try:
            model.load_arrays(self._weights[0])
        except ValueError as error:
            raise CorruptRunError(f"Run {self.name!r}: {error}. Restore the files saved together.") from None
        return model.to(self._place(model)).eval()

    def _place(self, model: LanguageModel) -> torch.device:
        from lm.device import pick_device

        # Counts are looked up, not multiplied: a GPU would only be further away.
        return pick_device("cpu" if model.trained_by == "counting" else self._device)

    # -- sampling -----------------------------------------------------------------------------------

    def sample(self, prompt: str = "", *, index: int = 0, **options: Any) -> str:
        """The text that follows `prompt`.

        Args:
            prompt: any text; empty starts from the start token.
            index: which of several samples of one seed.
            **options: the fields of `SamplingOptions`: temperature, top_k, top_p, max_tokens, stop, seed, …

        Raises:
            ConfigError: an option is unknown or out of bounds.
        """
        return "".join(self.stream(prompt, validate(SamplingOptions, options, where="sampling"), index=index))

    def stream(
        self,
        prompt: str,
        options: SamplingOptions,
        *,
        index: int = 0,
        unknown: UnknownPolicy | None = None,
        outcome: Outcome | None = None,
    ) -> Iterator[str]:
        """The pieces of `sample`, as they are made; `outcome` is filled in on the way."""
        from lm.generation.decoder import TorchDecoder
        from lm.generation.generate import generate

        ids = self._encode_prompt(prompt, unknown)
        pieces = generate(TorchDecoder(self.model), self.tokenizer, ids, options, index=index, outcome=outcome)
        return _watched(pieces)

    def _encode_prompt(self, prompt: str, unknown: UnknownPolicy | None) -> Ids:
        met: Counter[str] = Counter()
        ids = self.tokenizer.encode(prompt, unknown=unknown, met=met)
        if met:
            shown = ", ".join(repr(symbol) for symbol, _ in met.most_common(8))
            done = "left out" if (unknown or self.tokenizer.options.unknown) == "skip" else "read as unknown"
            log.warning("The prompt has symbols that the model never saw, %s: %s.", done, shown)
        return ids

    def save_sample(
        self,
        prompt: str,
        texts: list[str],
        options: SamplingOptions,
        path: Path | None = None,
        *,
        unknown: UnknownPolicy | None = None,
    ) -> Path:
        """Write the first samples of a seed with what reproduces them, under `samples/` unless `path` says where."""
        if path is None:
            path = self.folder.path / SAMPLES / f"{self.state}-step-{self.step}-seed-{options.seed}.txt"
        facts = {
            "run": self.name,
            "state": self.state,
            "step": self.step,
            "prompt": prompt,
            "options": options.model_dump(mode="json"),
            "unknown": unknown or self.tokenizer.options.unknown,
            "device": str(self._place(self.model)),
            "inkling": __version__,
        }
        parts = [f"# {json.dumps(facts, ensure_ascii=False)}\n"]
        for index, text in enumerate(texts):
            parts.append(f"\n# sample {index + 1} of {len(texts)}\n\n{prompt}{text}\n")
        # A prompt may hold halves of surrogate pairs, which UTF-8 cannot express.
        write_file(path, "".join(parts).encode("utf-8", "replace"))
        return path

    # -- evaluation ---------------------------------------------------------------------------------

    def evaluate(
        self,
        split: str | None = None,
        *,
        text: str | None = None,
        name: str = "text",
        stride: int | None = None,
        precision: Precision = "fp32",
        progress: Callable[[int, int], None] | None = None,
        reading: Progress | None = None,
        data_dir: Path | None = None,
    ) -> Report:
        """The perplexity report of a split of the run's own corpus, or of any text.

        Args:
            split: train, valid or test; None takes test where there is one, else valid.
            text: a text of your own instead.
            name: what to call that text in the report.
            stride: how far a window slides; None: half the context length. A carried state has no window.
            precision: number format of the matrix products; fp32 is the reference.
            progress: called with tokens done and tokens in all.
            reading: called while the corpus is read.
            data_dir: where named corpora lie.

        Raises:
            CorpusError: the split does not exist, or the corpus is not the text that the run was trained on.
        """
        from lm.device import enough_memory
        from lm.evaluation.perplexity import score
        from lm.evaluation.report import make_report

        if text is not None:
            part = replace(encode_text(name, text, self.tokenizer), name="text")
            corpus = name
        else:
            part = self._split(split, data_dir, reading)
            corpus = str(self.record["corpus"]["name"])
        with enough_memory():
            scores = score(self.model, part.ids, precision=precision, stride=stride, progress=progress)
        return make_report(
            scores,
            part.counts,
            run=self.name,
            state=self.state,
            step=self.step,
            corpus=corpus,
            split=part.name,
            text_sha256=part.sha256,
            device=str(self._place(self.model)),
            precision=precision,
            version=__version__,
        )

    def _split(self, split: str | None, data_dir: Path | None, reading: Progress | None) -> TokenSplit:
        known = self.record["corpus"]["splits"]
        split = split or ("test" if "test" in known else "valid")
        if split not in known:
            raise CorpusError(f"Run {self.name!r} has no {split!r} split: its corpus has {', '.join(known)}.")
        prepared = load_prepared(self.record["corpus"]["key"])
        if prepared is None or prepared.tokenizer.sha256 != self.tokenizer.sha256:
            corpus = open_corpus(self.config.corpus, data_dir=data_dir, progress=reading)
            prepared = prepare(corpus, self.tokenizer, progress=reading)
        part = prepared.splits.get(split)
        if part is None or part.sha256 != known[split]["sha256"]:
            raise CorpusError(
                f"{self.config.corpus.source} is not the text that run {self.name!r} was trained on (its {split} split "
                "has another hash): give the text back, or evaluate the new one with --text."
            )
        return part

    def reports(self) -> dict[str, dict[str, Any]]:
        """The reports saved with the run, by split; another state than the best is SPLIT@STATE.

        A report of weights that training has replaced since is left out.

        Raises:
            CorruptRunError: report.json holds something else.
        """
        path = self.folder.path / REPORT
        try:
            saved = read_json(path)
        except RunNotFoundError:
            return {}
        if not isinstance(saved, dict) or not all(_is_report(report) for report in saved.values()):
            raise CorruptRunError(f"{path} holds no reports: delete it, lm eval {self.name} writes it again.")
        return {key: report for key, report in saved.items() if self._measured(report)}

    def _measured(self, report: dict[str, Any]) -> bool:
        try:
            facts = read_facts(self.folder.weights_path(report["state"]))
        except RunNotFoundError:
            return False
        return bool(facts.get("step") == report["step"])

    def save_report(self, report: Report) -> None:
        """Add a report to `report.json`, in place of an earlier one of the same split and state."""
        key = report.split if report.state == "best" else f"{report.split}@{report.state}"
        reports = {**self.reports(), key: report.model_dump(mode="json")}
        write_file(self.folder.path / REPORT, json.dumps(reports, indent=2, ensure_ascii=False) + "\n")
        self.save_card()

    def save_card(self) -> None:
        """Write the run's README.md."""
        from lm.card import card

        write_file(self.folder.path / CARD, card(self))
