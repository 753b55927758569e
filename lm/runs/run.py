"""A trained run: load it, sample from it, evaluate it.

run = lm.load("tiny-shakespeare-gru-char")
print(run.sample("ROMEO:", temperature=0.8, seed=7))
for text in run.samples("ROMEO:", n=3): print(text)
for token in run.score("To be, or not to be"): print(token.text, token.nats)
print(run.evaluate(text="To be, or not to be").bits_per_byte)
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lm.config import RunConfig, runs_folder, validate
from lm.corpora import PreparedCorpus, Progress, TokenSplit, encode_text, load_prepared, open_corpus, prepare
from lm.corpora.cache import cache_folder
from lm.corpora.prepared import is_measured, prepared_key
from lm.errors import ConfigError, CorpusError, CorruptRunError, LMError, RunError, RunNotFoundError
from lm.files import read_facts, read_json, write_file
from lm.generation.open_decoder import STATE_BYTES, open_decoder
from lm.generation.options import SamplingOptions
from lm.registry import TOKENIZERS
from lm.runs.run_folder import CARD, REPORT, SAMPLES, RunFolder, find_run
from lm.tokenizers.base import Ids, Tokenizer, UnknownPolicy
from lm.version import __version__

if TYPE_CHECKING:
    import torch

    from lm.device import Precision
    from lm.evaluation.floor import Floor
    from lm.evaluation.report import Report
    from lm.generation.decoder import Decoder
    from lm.generation.engine import Engine
    from lm.generation.request import Event, Request
    from lm.generation.snapshots import NamedSnapshot, Snapshots
    from lm.kernels.decoding import DecodePrecision
    from lm.models.base import LanguageModel

log = logging.getLogger(__name__)

STATES = "states"
"""The folder of named states."""
MOST_AT_ONCE = 32
"""Samples of one request that are computed together."""

_NUMBERS = (
    "loss", "standard_error", "perplexity", "word_perplexity", "bits_per_char", "bits_per_byte", "accuracy",
    "top5_accuracy", "tokens", "words", "characters", "bytes", "unknown_tokens", "unknown_rate",
)  # fmt: skip
_TEXTS = ("state", "context", "text_sha256")


def _is_report(value: Any) -> bool:
    """Whether a part of report.json holds what is shown of it; needs no torch."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), int | float) or _may_be_null(name, value) for name in _NUMBERS)
        and all(isinstance(value.get(name), str) for name in _TEXTS)
        and isinstance(value.get("step"), int | None)
        and isinstance(value.get("notes"), list)
    )


def _may_be_null(name: str, report: dict[str, Any]) -> bool:
    """Where a figure is beyond the range of floats, or not known."""
    return name.endswith(("perplexity", "_per_char", "_per_byte")) and report.get(name, 0) is None


def _watched(events: Callable[[], Iterator[Event]]) -> Iterator[Event]:
    """What `events` gives; running out of memory on the way becomes a sentence."""
    try:
        yield from events()
    except (MemoryError, RuntimeError):
        # Not before: it loads torch, which a native decoder does without.
        from lm.device import TO_USE, enough_memory

        with enough_memory(TO_USE):
            raise


def load(
    run: str | None = None,
    *,
    runs_dir: Path | str | None = None,
    device: str | None = None,
    precision: DecodePrecision = "fp32",
) -> Run:
    """The run that `run` names.

    Args:
        run: a name under `runs_dir`, a path, or NAME@last, NAME@step-500 for a kept state; None is the newest.
        runs_dir: where the runs lie, default: INKLING_RUNS, else checkpoints; the shipped ones are searched last.
        device: where the model computes; None picks a GPU when there is one, but decodes natively on the CPU where the
            model has a kernel.
        precision: of the weights in decoding; int8 is faster and a little less exact.

    Raises:
        RunNotFoundError: no such run. What is wrong inside it is raised when it is first used.
    """
    folder, state = find_run(run, runs_folder(runs_dir))
    folder.weights_path(state)
    return Run(folder, state, device=device, precision=precision)


class TokenScore(NamedTuple):
    """A token of a text under a model."""

    text: str
    """What it stands for; "" where a later token ends the character. All of a text's, joined, are the text."""
    id: int
    nats: float
    """Minus the natural logarithm of its probability."""


def _refuse_logprobs(method: str, options: SamplingOptions) -> None:
    if options.logprobs is not None:
        raise ConfigError(
            f"{method} gives texts without logprobs: run.events(run.request(prompt, options)) gives the scores of "
            "drawn tokens, and run.score(text) those of a text."
        )


class Run:
    """One run on disk; tokenizer and weights are read, and checked, when first needed."""

    def __init__(
        self,
        folder: RunFolder,
        state: str = "best",
        *,
        device: str | None = None,
        precision: DecodePrecision = "fp32",
    ) -> None:
        self.folder = folder
        self.state = state
        self._device = device
        self._precision = precision

    def __repr__(self) -> str:
        try:
            made = self.record
            score = self.reports().get("valid" if self.state == "best" else f"valid@{self.state}")
        except RunError as error:
            return f"<Run {self.name!r}: {error}>"
        bits = f", {score['bits_per_byte']:.4f} bits per byte on valid" if score else ""
        return (
            f"<Run {self.name!r}, state {self.state!r}: {made['config'].get('preset') or self.config.model.type}, "
            f"{made['parameters']:,} parameters, trained on {made['corpus']['name']}{bits}>"
        )

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
        config = self.record["config"]
        if isinstance(config.get("corpus"), dict):
            # A run recorded before there was a choice cut its text at characters.
            config = {**config, "corpus": {"split_at": "character", **config["corpus"]}}
        return validate(RunConfig, config, where="config.json: config")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self.folder.read_tokenizer()

    @functools.cached_property
    def newline(self) -> str:
        r"""What ends the lines of its text: "\n" or "\r\n"."""
        recorded = self.record["corpus"].get("newline")
        if recorded is None and self.tokenizer.type == "char":
            # A run from before this was recorded: its characters are those of its text.
            return "\r\n" if len(self.tokenizer.encode("\r", unknown="skip")) else "\n"
        return "\r\n" if recorded == "\r\n" else "\n"

    @functools.cached_property
    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays, facts = self.folder.read_weights(self.state)
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CorruptRunError(
                    f"Run {self.name!r}: the weights {name} have values that are not finite (NaN or infinity), so the "
                    "model predicts nothing. The training probably diverged: take a state that was kept before "
                    f"({self.name}@step-N), or train again."
                )
        return arrays, facts

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

    def decoder(
        self,
        *,
        precision: DecodePrecision | None = None,
        max_slots: int = 1,
        state_bytes: int = STATE_BYTES,
        threads: int | None = None,
    ) -> Decoder:
        """What generation steps through; see `lm.generation.open_decoder.open_decoder`, which chooses it.

        Raises:
            DeviceError: the precision or the memory does not do.
        """
        opened = open_decoder(
            self.config.model.model_dump(),
            lambda: self._weights[0],
            lambda: self.model,
            device=self._device,
            precision=precision or self._precision,
            max_slots=max_slots,
            state_bytes=state_bytes,
            threads=threads,
        )
        if opened.vocab_size != self.tokenizer.vocab_size:
            raise CorruptRunError(
                f"Run {self.name!r}: the model has {opened.vocab_size} tokens, its tokenizer "
                f"{self.tokenizer.vocab_size}. Restore the files saved together."
            )
        return opened

    def engine(
        self,
        *,
        max_batch: int = 1,
        prefix_cache_bytes: int = 0,
        state_bytes: int = STATE_BYTES,
        threads: int | None = None,
    ) -> Engine:
        """An engine over a decoder of its own: many requests at once, each with the text it would have alone.

        Args:
            max_batch: samples computed together.
            prefix_cache_bytes: memory for the states of prompt starts, so that equal ones are read once.
            state_bytes: memory for the states of all samples.
            threads: of a native decoder.
        """
        from lm.generation.engine import Engine

        opened = self.decoder(max_slots=max_batch, state_bytes=state_bytes, threads=threads)
        return Engine(opened, self.tokenizer, max_batch=max_batch, prefix_cache_bytes=prefix_cache_bytes)

    def request(
        self,
        prompt: str,
        options: SamplingOptions,
        *,
        unknown: UnknownPolicy | None = None,
        state: NamedSnapshot | None = None,
    ) -> Request:
        """What an engine is asked for, of a text.

        Args:
            prompt: any text; empty starts from the start token, or from where the state ends.
            options: how to draw.
            unknown: what symbols that the model never saw become.
            state: go on from it.
        """
        from lm.generation.request import Request

        begin = (self.tokenizer.start_id,) if state is None else state.unread
        ids = self.encode_prompt(prompt, unknown).tolist()
        return Request((*begin, *ids), options, state=None if state is None else state.snapshot)

    def sample(self, prompt: str = "", **options: Any) -> str:
        """The text that follows `prompt`.

        Args:
            prompt: any text; empty starts from the start token.
            **options: the fields of `SamplingOptions`: temperature, top_k, top_p, max_tokens, stop, seed, …

        Raises:
            ConfigError: an option is unknown or out of bounds, or asks for what is no text.
        """
        checked = validate(SamplingOptions, options, where="sampling")
        if checked.n > 1:
            raise ConfigError(
                f"sample gives one text, and n is {checked.n}: run.samples(prompt, n={checked.n}) gives all."
            )
        _refuse_logprobs("sample", checked)
        return "".join(self.stream(prompt, checked))

    def samples(self, prompt: str = "", n: int = 1, **options: Any) -> list[str]:
        """The texts of `n` samples that follow `prompt`, drawn together; the first is the one that `sample` gives.

        Args:
            prompt: any text; empty starts from the start token.
            n: how many.
            **options: as for `sample`.

        Raises:
            ConfigError: as `sample`.
        """
        checked = validate(SamplingOptions, {"n": n, **options}, where="sampling")
        _refuse_logprobs("samples", checked)
        texts = [""] * checked.n
        for event in self.events(self.request(prompt, checked)):
            texts[event.index] += event.text
        return texts

    def stream(self, prompt: str, options: SamplingOptions, *, unknown: UnknownPolicy | None = None) -> Iterator[str]:
        """The pieces of `sample`, as they are made."""
        request = self.request(prompt, options.model_copy(update={"n": 1}), unknown=unknown)
        return (event.text for event in self.events(request) if event.text)

    def events(self, request: Request) -> Iterator[Event]:
        """What an engine of its own tells of a request, as it is made."""
        options = request.options
        wanted = options.num_beams or min(options.best_of or options.n, MOST_AT_ONCE)
        return _watched(lambda: self.engine(max_batch=wanted).run(request))

    # -- named states -------------------------------------------------------------------------------

    @functools.cached_property
    def states(self) -> Snapshots:
        """The named states kept for these weights: with the run, or in the cache folder where that is shipped."""
        from lm.generation.snapshots import Snapshots

        weights = str(read_facts(self.folder.weights_path(self.state)).get("sha256"))
        place = cache_folder() / STATES / self.name if self.folder.shipped else self.folder.path / STATES
        return Snapshots(
            place, self.name, self.folder.argument, weights_sha256=weights, tokenizer_sha256=self.tokenizer.sha256
        )

    def read_text(self, text: str, *, unknown: UnknownPolicy | None = None) -> NamedSnapshot:
        """The state after a text, to be saved or gone on from."""
        from lm.generation.request import Request
        from lm.generation.snapshots import NamedSnapshot

        options = SamplingOptions(max_tokens=0)
        prompt = self.request(text, options, unknown=unknown).prompt
        if len(prompt) == 1:
            return NamedSnapshot(prompt, tokens=1)
        engine = self.engine()
        generation = engine.submit(Request(prompt[:-1], options, keep_state=True))
        while engine.step():
            pass
        assert generation.state is not None, "what was asked for is there"
        return NamedSnapshot(prompt[-1:], len(prompt), generation.state)

    def encode_prompt(self, prompt: str, unknown: UnknownPolicy | None = None) -> Ids:
        """Ids (N,) of a prompt; a warning names the symbols that the model never saw."""
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
        decoder: str | None = None,
    ) -> Path:
        """Write the samples of a seed with what reproduces them, under `samples/` unless `path` says where.

        `decoder` names what drew them; None is the run's usual one.
        """
        if path is None:
            path = self.folder.path / SAMPLES / f"{self.state}-step-{self.step}-seed-{options.seed}.txt"
        facts = {
            "run": self.name,
            "state": self.state,
            "step": self.step,
            "prompt": prompt,
            "options": options.model_dump(mode="json"),
            "unknown": unknown or self.tokenizer.options.unknown,
            "decoder": decoder or self.decoder().name,
            "inkling": __version__,
        }
        parts = [f"# {json.dumps(facts, ensure_ascii=False)}\n"]
        for index, text in enumerate(texts):
            parts.append(f"\n# sample {index + 1} of {len(texts)}\n\n{prompt}{text}\n")
        # A prompt may hold halves of surrogate pairs, which UTF-8 cannot express.
        write_file(path, "".join(parts).encode("utf-8", "replace"))
        return path

    # -- looking at tokens --------------------------------------------------------------------------

    def score(self, text: str) -> list[TokenScore]:
        """How many nats each token of a text costs the model: the fewer, the better it is predicted.

        The first token is predicted from the start token, each other one from all before it (by a Transformer, from
        its window). The mean of the nats is the loss of `evaluate(text=text)`.

        Raises:
            CorpusError: the text has no token.
        """
        from lm.device import TO_USE, enough_memory
        from lm.evaluation.perplexity import score

        ids = encode_text("text", text, self.tokenizer).ids
        parts: list[npt.NDArray[np.float64]] = []
        with enough_memory(TO_USE):
            score(self.model, ids, each=parts.append)
        stream, tokens = self.tokenizer.stream(), ids[1:].tolist()
        texts = [stream.feed(token) for token in tokens]
        texts[-1] += stream.end()
        return [TokenScore(*found) for found in zip(texts, tokens, np.concatenate(parts).tolist(), strict=True)]

    def logits(self, text: str, *, unknown: UnknownPolicy | None = None) -> npt.NDArray[np.float32]:
        """The logits (N + 1, V) of what follows the start token, and then each of the N tokens of a text.

        Args:
            text: any text that fits into the model's context; empty: what begins a text.
            unknown: what symbols that the model never saw become.

        Raises:
            ConfigError: the text is longer than the model's context.
        """
        import torch

        from lm.device import TO_USE, enough_memory

        ids = [self.tokenizer.start_id, *self.encode_prompt(text, unknown).tolist()]
        most = self.model.context_length
        if most is not None and len(ids) > most:
            raise ConfigError(
                f"The text and the start token are {len(ids):,} tokens, the model reads {most:,} at most."
            )
        with torch.inference_mode(), enough_memory(TO_USE):
            logits, _ = self.model(torch.tensor([ids], device=self._place(self.model)))
        found: npt.NDArray[np.float32] = logits[0].float().cpu().numpy()
        return found

    # -- evaluation ---------------------------------------------------------------------------------

    def evaluate(
        self,
        split: str | None = None,
        *,
        text: str | None = None,
        name: str = "text",
        stride: int | None = None,
        precision: Precision | Literal["int8"] = "fp32",
        progress: Callable[[int, int], None] | None = None,
        reading: Progress | None = None,
        data_dir: Path | None = None,
        corpus: Path | str | None = None,
    ) -> Report:
        """The perplexity report of a split of the run's own corpus, or of any text.

        Args:
            split: train, valid or test; None takes test where there is one, else valid.
            text: a text of your own instead.
            name: what to call that text in the report.
            stride: how far a window slides; None: half the context length. A carried state has no window.
            precision: number format of the matrix products; fp32 is the reference. int8 scores what the native
                decoder computes with rounded weights, so that its loss is known.
            progress: called with tokens done and tokens in all.
            reading: called while the corpus is read.
            data_dir: where named corpora lie.
            corpus: where the run's text lies now, if it has moved; it must be the same text.

        Raises:
            CorpusError: the split does not exist, or the corpus is not the text that the run was trained on.
        """
        if text is None:
            split = self._known_split(split)
        from lm.device import TO_USE, enough_memory
        from lm.evaluation.perplexity import score
        from lm.evaluation.report import make_report
        from lm.spelling import spelling_rule

        if text is not None:
            part = replace(encode_text(name, text, self.tokenizer), name="text")
            source = name
        else:
            assert split is not None
            part = self.own_text(corpus, split=split, data_dir=data_dir, progress=reading).splits[split]
            source = str(self.record["corpus"]["name"])
        floor, unknown = self.floor(part), self.tokenizer.unknown_id
        with enough_memory(TO_USE):
            if precision == "int8":
                from lm.generation.decoder_model import Decoded

                decoded = Decoded(self.decoder(precision="int8"))
                scores, device = score(decoded, part.ids, stride=stride, unknown_id=unknown, progress=progress), "cpu"
            else:
                device = str(self._place(self.model))
                scores = score(
                    self.model, part.ids, precision=precision, stride=stride, unknown_id=unknown, progress=progress
                )
        return make_report(
            scores,
            part.counts,
            floor,
            spelling=spelling_rule(self.tokenizer),
            run=self.name,
            kind=self.record.get("kind"),
            state=self.state,
            step=self.step,
            corpus=source,
            split=part.name,
            text_sha256=part.sha256,
            device=device,
            precision=precision,
            version=__version__,
        )

    def floor(self, part: TokenSplit, *, most_tokens: int | None = None) -> Floor | None:
        """What n-gram counts of the training text reach on the same tokens; None where that text is not at hand.

        Args:
            part: a text in tokens of this run's tokenizer.
            most_tokens: do without a loss where more than these would have to be counted.
        """
        from lm.evaluation.floor import find_floor

        prepared = self._cached_text()
        if prepared is None:
            return None
        return find_floor(prepared, part, most_tokens=most_tokens)

    def _known_split(self, split: str | None) -> str:
        """The name of a split that this run's corpus has; None takes test where there is one, else valid."""
        known = self.record["corpus"]["splits"]
        split = split or ("test" if "test" in known else "valid")
        if split not in known:
            raise CorpusError(f"Run {self.name!r} has no {split!r} split: its corpus has {', '.join(known)}.")
        return split

    def _cached_text(self) -> PreparedCorpus | None:
        """The text that the run was trained on, where the cache has its tokens."""
        known = self.record["corpus"]
        hashes = {name: part["sha256"] for name, part in known["splits"].items()}
        # As training left it, or as it was encoded again from a text that was read later.
        for key in (known["key"], prepared_key(hashes, self.tokenizer)):
            found = load_prepared(key)
            if found is not None and found.tokenizer.sha256 == self.tokenizer.sha256:
                return found
        return None

    def own_text(
        self,
        source: Path | str | None = None,
        *,
        split: str | None = None,
        data_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> PreparedCorpus:
        """The text that the run was trained on, as tokens: from the cache, or read again.

        Args:
            source: where the text lies now; None: in the cache, or where it was.
            split: the one that has to be the same; None: all.
            data_dir: where named corpora lie.
            progress: called while the text is read.

        Raises:
            CorpusError: there is no text, or another one.
        """
        known, where, elsewhere = self.record["corpus"], self.config.corpus, ""
        if source is not None:
            where = where.model_copy(update={"source": str(source)})
        else:
            elsewhere = f" If the text lies elsewhere now: lm eval {self.folder.argument} --corpus PATH"

        def read_again() -> PreparedCorpus:
            return prepare(open_corpus(where, data_dir=data_dir, progress=progress), self.tokenizer, progress=progress)

        prepared = self._cached_text() if source is None else None
        if prepared is None:
            try:
                prepared = read_again()
            except CorpusError as error:
                raise type(error)(f"{error}{elsewhere}") from None
        elif not is_measured(prepared) and where.source != "-":
            # An older Inkling prepared the tokens. Where the text is still there, it says what these leave out.
            with contextlib.suppress(LMError):
                again = read_again()
                prepared = again if again.sha256 == prepared.sha256 else prepared
        hashes = {name: part.sha256 for name, part in prepared.splits.items()}
        if split is None and prepared.sha256 != known["sha256"]:
            raise CorpusError(
                f"{where.source} is not the text that run {self.name!r} was trained on: give that text back, or "
                f"train on the new one with --init {self.folder.argument}.{elsewhere}"
            )
        if split is not None and hashes.get(split) != known["splits"][split]["sha256"]:
            raise CorpusError(
                f"{where.source} is not the text that run {self.name!r} was trained on (its {split} split has another "
                f"hash): give the text back, or evaluate the new one with --text.{elsewhere}"
            )
        return prepared

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
            raise CorruptRunError(
                f"{path} holds no reports: delete it, lm eval {self.folder.argument} writes it again."
            )
        from lm.evaluation.report import as_measured_now

        # By the options in the record: the tokenizer itself need not be read for it.
        options = self.config.tokenizer.resolve("tokenizer")
        lossless = TOKENIZERS.resolve(options.type).lossless and options.unknown != "skip"
        return {
            key: as_measured_now(report, lossless=lossless) for key, report in saved.items() if self._measured(report)
        }

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
        from lm.runs.card import card

        write_file(self.folder.path / CARD, card(self))
