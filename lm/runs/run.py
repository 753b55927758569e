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
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lm.config import RunConfig, runs_folder, validate
from lm.corpora import PreparedCorpus, Progress, TokenSplit, encode_text
from lm.corpora.answers import Marks, encode_conversations
from lm.corpora.cache import cache_folder
from lm.corpora.text import Text
from lm.errors import ConfigError, CorpusError, CorruptRunError, FormatVersionError, LMError, RunError
from lm.files import read_facts, write_file
from lm.generation.open_decoder import STATE_BYTES, open_decoder
from lm.generation.options import CHAT_SAMPLING, JoinedDecoding, SamplingOptions
from lm.runs.adapters import find_base, read_whole_weights
from lm.runs.card import model_card, origin, run_facts, run_summary
from lm.runs.film import Frame, read_film
from lm.runs.run_folder import CARD, SAMPLES, SNAPSHOTS, RunFolder, find_run
from lm.runs.training_text import cached_text, check_has_corpus, training_text
from lm.tokenizers.base import Ids, Tokenizer, UnknownPolicy
from lm.version import __version__

if TYPE_CHECKING:
    import torch

    from lm.copies import Copies, CopyIndex
    from lm.device import Precision
    from lm.evaluation.copying import CopyReport
    from lm.evaluation.per_token import Watcher
    from lm.evaluation.report import Floor, Report
    from lm.generation.decoder import Decoder
    from lm.generation.engine import Engine
    from lm.generation.request import Event, Request
    from lm.generation.snapshots import NamedSnapshot, Snapshots
    from lm.kernels.decoding import DecodePrecision
    from lm.models.base import LanguageModel

log = logging.getLogger(__name__)

MAX_BATCH = 32
"""Samples of one request that are computed together."""
MAX_SYMBOLS_IN_WARNING = 8


def load(
    run: str | None = None,
    *,
    runs_dir: Path | str | None = None,
    device: str | None = None,
    precision: DecodePrecision = "fp32",
) -> Run:
    """Load a run by name.

    Args:
        run: a name under `runs_dir`, a path, or NAME@last, NAME@step-500 for another checkpoint; RUN+ADAPTER for an
            adapter over a base; None is the newest.
        runs_dir: folder of the runs, default: INKLING_RUNS, else checkpoints; the shipped runs are searched last.
        device: of the model; None picks a GPU if there is one, but decodes natively on the CPU if the model has a
            kernel.
        precision: of the weights in decoding; bf16, int8 and int4 are faster and less exact.

    Raises:
        RunNotFoundError: no such run, or the base of an adapter is missing.
        VocabMismatchError: the base of an adapter has other weights. Errors in files are raised on first use.
    """
    folder, checkpoint = find_run(run, runs_folder(runs_dir))
    folder.weights_path(checkpoint)
    # Not on first use: by then a command has printed the prompt.
    with contextlib.suppress(CorruptRunError, FormatVersionError):
        find_base(folder)
    return Run(folder, checkpoint, device=device, precision=precision)


class TokenScore(NamedTuple):
    """A token of a text under a model."""

    text: str
    """Its text; "" if a later token completes the character. The texts of all tokens, joined, are the whole text."""
    id: int
    nats: float
    """Minus the natural logarithm of its probability."""


class Run:
    """One run on disk; tokenizer and weights are read, and checked, on first use.

    Args:
        folder: of the run.
        checkpoint: "best", "last", or a name under steps/.
        device: as in `load`.
        precision: as in `load`.
    """

    def __init__(
        self,
        folder: RunFolder,
        checkpoint: str = "best",
        *,
        device: str | None = None,
        precision: DecodePrecision = "fp32",
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self._device = device
        self._precision = precision
        self._copy_index: CopyIndex | None = None

    def __repr__(self) -> str:
        try:
            record = self.record
            report = self.reports().get("valid" if self.checkpoint == "best" else f"valid@{self.checkpoint}")
        except RunError as error:
            return f"<Run {self.name!r}: {error}>"
        bits = f", {report['bits_per_byte']:.4f} bits per byte on valid" if report else ""
        return (
            f"<Run {self.name!r}, checkpoint {self.checkpoint!r}: "
            f"{record['config'].get('preset') or self.config.model.type}, {record['parameters']:,} parameters, "
            f"{origin(record.get('imported'), record['corpus']['name'])}{bits}>"
        )

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @property
    def state(self) -> str:
        """Old name of `checkpoint`, to remove in 0.3."""
        warnings.warn("Run.state is now Run.checkpoint; the old name goes in 0.3.", DeprecationWarning, stacklevel=2)
        return self.checkpoint

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return self.folder.read_record()

    @functools.cached_property
    def config(self) -> RunConfig:
        """All options of the run."""
        config = self.record["config"]
        if isinstance(config.get("corpus"), dict):
            # Before this option existed, a text was split between any two characters.
            config = {**config, "corpus": {"split_at": "character", **config["corpus"]}}
        return validate(RunConfig, config, where="config.json: config")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self.folder.read_tokenizer()

    @functools.cached_property
    def newline(self) -> str:
        r"""The line end of its text: "\n" or "\r\n"."""
        recorded = self.record["corpus"].get("newline")
        if recorded is None and self.tokenizer.type == "char":
            # An older run, without a record of it: its characters are those of its text.
            return "\r\n" if len(self.tokenizer.encode("\r", unknown="skip")) else "\n"
        return "\r\n" if recorded == "\r\n" else "\n"

    @functools.cached_property
    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays, facts = read_whole_weights(self.folder, self.checkpoint)
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CorruptRunError(
                    f"Run {self.name!r}: the weights {name} have values that are not finite (NaN or infinity), so the "
                    "model predicts nothing. The training probably diverged: use an earlier checkpoint "
                    f"({self.name}@step-N), or train again."
                )
        return arrays, facts

    @property
    def arrays(self) -> dict[str, Any]:
        """The weights, by the names of the model; of an adapter run, the base's with the adapter's added.

        Raises:
            CorruptRunError: the file is damaged, or a value is not finite.
        """
        return self._weights[0]

    @property
    def step(self) -> int | None:
        """The optimizer step of the weights."""
        return self._weights[1].get("step")

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model with its weights, on its device, in evaluation mode."""
        from lm.models.base import build_model

        model = build_model(self.config.model, self.tokenizer.vocab_size)
        try:
            model.load_arrays(self._weights[0])
        except ValueError as error:
            raise CorruptRunError(f"Run {self.name!r}: {error}. Restore the files saved together.") from None
        return model.to(self._device_of(model)).eval()

    def _device_of(self, model: LanguageModel) -> torch.device:
        from lm.device import pick_device

        # Counts are looked up, not multiplied: a GPU does not help.
        return pick_device("cpu" if model.training_method().in_one_pass else self._device)

    # -- sampling -----------------------------------------------------------------------------------

    def sampling_defaults(self, *, chat: bool = False) -> dict[str, Any]:
        """The sampling options for what a request does not give; {}: those of `SamplingOptions`.

        An imported model has those that its source gives, and so has a model that was trained from it.

        Args:
            chat: for a reply by the chat template, which has `CHAT_SAMPLING` if the source gives none.
        """
        given: dict[str, Any] = self.record.get("sampling") or {}
        return given or (dict(CHAT_SAMPLING) if chat and self.tokenizer.chat_template is not None else {})

    def decoder(
        self,
        *,
        precision: DecodePrecision | None = None,
        max_slots: int = 1,
        state_bytes: int = STATE_BYTES,
        threads: int | None = None,
        joined: JoinedDecoding = "auto",
    ) -> Decoder:
        """A new decoder; see `lm.generation.open_decoder.open_decoder`, which chooses it.

        Raises:
            DeviceError: the precision is not supported, or the memory is too small.
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
            joined=joined,
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
        joined: JoinedDecoding = "auto",
    ) -> Engine:
        """An engine with its own decoder: many requests at once, each with the same text as alone.

        Args:
            max_batch: samples computed together.
            prefix_cache_bytes: memory for the states of prompt prefixes, so that equal prefixes are prefilled once.
            state_bytes: memory for the states of all samples.
            threads: of a native decoder.
            joined: whether a torch decoder computes all samples in one call; see
                `lm.generation.options.JoinedDecoding`.
        """
        from lm.generation.engine import Engine

        opened = self.decoder(max_slots=max_batch, state_bytes=state_bytes, threads=threads, joined=joined)
        return Engine(opened, self.tokenizer, max_batch=max_batch, prefix_cache_bytes=prefix_cache_bytes)

    def request(
        self,
        prompt: str,
        options: SamplingOptions,
        *,
        unknown: UnknownPolicy | None = None,
        state: NamedSnapshot | None = None,
    ) -> Request:
        """A request to an engine.

        Args:
            prompt: any text; empty starts from the start token, or from the end of the snapshot.
            options: of sampling.
            unknown: policy for symbols outside the vocabulary.
            state: the snapshot to continue from.
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
            ConfigError: an option is unknown or out of bounds, or gives more than one text.
        """
        checked = validate(SamplingOptions, {**self.sampling_defaults(), **options}, where="sampling")
        if checked.n > 1:
            raise ConfigError(
                f"sample gives one text, and n is {checked.n}: run.samples(prompt, n={checked.n}) gives all."
            )
        _refuse_logprobs("sample", checked)
        return "".join(self.stream(prompt, checked))

    def samples(self, prompt: str = "", n: int = 1, **options: Any) -> list[str]:
        """The texts of `n` samples that follow `prompt`, drawn together; the first is the text of `sample`.

        Args:
            prompt: any text; empty starts from the start token.
            n: number of samples.
            **options: as for `sample`.

        Raises:
            ConfigError: as `sample`.
        """
        checked = validate(SamplingOptions, {"n": n, **self.sampling_defaults(), **options}, where="sampling")
        _refuse_logprobs("samples", checked)
        texts = [""] * checked.n
        for event in self.events(self.request(prompt, checked)):
            texts[event.index] += event.text
        return texts

    def stream(self, prompt: str, options: SamplingOptions, *, unknown: UnknownPolicy | None = None) -> Iterator[str]:
        """The pieces of `sample`, as they are generated."""
        request = self.request(prompt, options.model_copy(update={"n": 1}), unknown=unknown)
        return (event.text for event in self.events(request) if event.text)

    def events(self, request: Request) -> Iterator[Event]:
        """The events of a request in a new engine, as they are generated."""
        options = request.options
        batch = options.num_beams or min(options.best_of or options.n, MAX_BATCH)
        return _with_memory_errors(lambda: self.engine(max_batch=batch).run(request))

    # -- snapshots ----------------------------------------------------------------------------------

    @functools.cached_property
    def snapshots(self) -> Snapshots:
        """The snapshots saved for these weights: in the run's folder, or in the cache folder for a shipped run."""
        from lm.generation.snapshots import Snapshots

        weights = str(read_facts(self.folder.weights_path(self.checkpoint)).get("sha256"))
        folder = cache_folder() / SNAPSHOTS / self.name if self.folder.shipped else self.folder.path / SNAPSHOTS
        return Snapshots(
            folder, self.name, self.folder.argument, weights_sha256=weights, tokenizer_sha256=self.tokenizer.sha256
        )

    @property
    def states(self) -> Snapshots:
        """Old name of `snapshots`, to remove in 0.3."""
        warnings.warn("Run.states is now Run.snapshots; the old name goes in 0.3.", DeprecationWarning, stacklevel=2)
        return self.snapshots

    def read_text(self, text: str, *, unknown: UnknownPolicy | None = None) -> NamedSnapshot:
        """A snapshot of the state after a text."""
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
        assert generation.state is not None, "keep_state gives a state"
        return NamedSnapshot(prompt[-1:], len(prompt), generation.state)

    def encode_prompt(self, prompt: str, unknown: UnknownPolicy | None = None) -> Ids:
        """Ids (N,) of a prompt; a warning names the symbols outside the vocabulary."""
        counts: Counter[str] = Counter()
        ids = self.tokenizer.encode(prompt, unknown=unknown, unknown_counts=counts)
        if counts:
            symbols = ", ".join(repr(symbol) for symbol, _ in counts.most_common(MAX_SYMBOLS_IN_WARNING))
            action = "left out" if (unknown or self.tokenizer.options.unknown) == "skip" else "read as unknown"
            log.warning("The prompt has symbols that the model never saw, %s: %s.", action, symbols)
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
        """Write samples, with the options that reproduce them, to `path` or to a new file under `samples/`.

        `decoder` is the name of the decoder that drew them; None is the run's default.
        """
        if path is None:
            path = self.folder.path / SAMPLES / f"{self.checkpoint}-step-{self.step}-seed-{options.seed}.txt"
        facts = {
            "run": self.name,
            "state": self.checkpoint,
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

    # -- scores -------------------------------------------------------------------------------------

    def score(self, text: str) -> list[TokenScore]:
        """The nats of each token of a text; lower means better predicted.

        The first token is predicted from the start token, every other token from all tokens before it (a Transformer:
        from those in its window). The mean of the nats is the loss of `evaluate(text=text)`.

        Raises:
            CorpusError: the text has no token.
        """
        return self.score_ids(encode_text("text", text, self.tokenizer).ids)

    def score_ids(self, ids: Ids, marks: Marks | None = None) -> list[TokenScore]:
        """The nats of each token: `score` of (N + 1,) ids, the start token first.

        With the marks (N + 1,) of conversations, tokens that are context alone have NaN for nats.
        """
        from lm.runs.scoring import score_tokens

        return [TokenScore(*token) for token in score_tokens(self.model, self.tokenizer, ids, marks)]

    def logits(self, text: str, *, unknown: UnknownPolicy | None = None) -> npt.NDArray[np.float32]:
        """The logits (N + 1, V) after the start token and after each of the N tokens of a text.

        Args:
            text: any text that fits into the model's context; empty: the logits of a first token.
            unknown: policy for symbols outside the vocabulary.

        Raises:
            ConfigError: the text is longer than the model's context.
        """
        from lm.runs.scoring import logits_of

        ids = [self.tokenizer.start_id, *self.encode_prompt(text, unknown).tolist()]
        return logits_of(self.model, ids, self._device_of(self.model))

    # -- evaluation ---------------------------------------------------------------------------------

    def evaluate(
        self,
        split: str | None = None,
        *,
        text: str | Text | None = None,
        name: str = "text",
        stride: int | None = None,
        precision: Precision | Literal["int8", "int4"] = "fp32",
        progress: Callable[[int, int], None] | None = None,
        reading: Progress | None = None,
        data_dir: Path | None = None,
        corpus: Path | str | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> Report:
        """The perplexity report of a split of the run's own corpus, or of any text.

        Args:
            split: train, valid or test; None is test if the corpus has one, else valid.
            text: another text instead; of conversations (`lm.corpora.open_text` of instruction data) the answers alone
                are scored.
            name: of that text in the report.
            stride: of the sliding window; None: half the context length. A carried state has no window.
            precision: number format of the matrix products; fp32 is the reference. int8 and int4 score the native
                decoder with rounded weights.
            progress: called with tokens done and tokens in all.
            reading: called while the corpus is read.
            data_dir: folder of the named corpora.
            corpus: where the run's text is now, if it has moved; it must be the same text.
            watchers: called with the scored tokens, in the order of the text.

        Raises:
            CorpusError: the split does not exist, the corpus is not the text that the run was trained on, or the run
                was imported and has no corpus.
        """
        if text is None:
            split = self.existing_split(split)
        from lm.device import TO_USE, enough_memory
        from lm.evaluation.perplexity import score
        from lm.evaluation.report import make_report
        from lm.evaluation.signature import signature_of
        from lm.spelling import spelling_rule

        if text is not None:
            part = replace(self.encode(name, text), name="text")
            source = name
        else:
            assert split is not None
            part = self.own_text(corpus, split=split, data_dir=data_dir, progress=reading).splits[split]
            source = str(self.record["corpus"]["name"])
        floor, unknown = self.floor(part), self.tokenizer.unknown_id
        with enough_memory(TO_USE):
            if precision == "int8" or precision == "int4":
                from lm.generation.decoder_model import DecoderModel

                decoded = DecoderModel(self.decoder(precision=precision))
                device = "cpu"
                scores = score(
                    decoded, part.ids, stride=stride, unknown_id=unknown, progress=progress, watchers=watchers,
                    marks=part.marks,
                )  # fmt: skip
            else:
                device = str(self._device_of(self.model))
                scores = score(
                    self.model, part.ids, precision=precision, stride=stride, unknown_id=unknown, progress=progress,
                    watchers=watchers, marks=part.marks,
                )  # fmt: skip
        report = make_report(
            scores,
            part.counts,
            floor,
            spelling=spelling_rule(self.tokenizer),
            run=self.name,
            kind=self.record.get("kind"),
            state=self.checkpoint,
            step=self.step,
            corpus=source,
            split=part.name,
            text_sha256=part.sha256,
            device=device,
            precision=precision,
            version=__version__,
        )
        signature = signature_of(
            report, unknown=self.tokenizer.options.unknown, tokenizer_sha256=self.tokenizer.sha256
        )  # fmt: skip
        return report.model_copy(update={"signature": str(signature)})

    def encode(self, name: str, text: str | Text) -> TokenSplit:
        """The tokens of a text or of conversations; `name` is for errors.

        Raises:
            CorpusError: it has no token.
        """
        if isinstance(text, str):
            return encode_text(name, text, self.tokenizer)
        if text.conversations is None:
            return encode_text(name, text.chunks(), self.tokenizer)
        return encode_conversations(name, text.conversations(), self.tokenizer)

    def floor(self, part: TokenSplit, *, most_tokens: int | None = None) -> Floor | None:
        """The n-gram floor of a text; None if the training text is not in the cache.

        Args:
            part: a text in tokens of this run's tokenizer.
            most_tokens: give no loss if more training tokens than these must be counted.
        """
        from lm.evaluation.floor import find_floor

        prepared = cached_text(self.record["corpus"], self.tokenizer)
        return None if prepared is None else find_floor(prepared, part, most_tokens=most_tokens)

    # -- copies -------------------------------------------------------------------------------------

    def copies(self, text: str) -> Copies:
        """The parts of a text that stand word for word in the training text; exact.

        The training text is indexed at the first call.

        Raises:
            CorpusError: the training text is not available.
            DeviceError: the memory is too small.
        """
        return self.copy_index().find(text)

    def copy_index(self, *, data_dir: Path | None = None, progress: Progress | None = None) -> CopyIndex:
        """The index of the training text, made at the first call; arguments and errors as `own_text`."""
        from lm.runs.copying import index_training_text

        if self._copy_index is None:
            self._copy_index = index_training_text(self.own_text(split="train", data_dir=data_dir, progress=progress))
        return self._copy_index

    def copy_report(
        self,
        prompt: str = "",
        samples: int = 20,
        *,
        data_dir: Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> CopyReport:
        """How much of this many samples stands word for word in the training text, against validation text.

        Args:
            prompt: of the samples; empty starts from the start token.
            samples: number of samples, at least 2.
            data_dir: folder of the named corpora.
            progress: called while the text is read.
            **options: as for `sample`; best of all max_tokens, temperature and seed.

        Raises:
            CorpusError: the training text is not available.
            ConfigError: an option is unknown or out of bounds.
        """
        from lm.evaluation.copying import copy_report
        from lm.runs.copying import split_text

        # With the defaults of the model's source, which are recorded with the others.
        checked = validate(SamplingOptions, {**self.sampling_defaults(), **options, "n": samples}, where="sampling")
        if samples < 2:
            raise ConfigError("A comparison with held-out text needs at least 2 samples.")
        index = self.copy_index(data_dir=data_dir, progress=progress)
        # Every corpus of a run has a validation split.
        held_out = split_text(self.own_text(split="valid", data_dir=data_dir, progress=progress), "valid")
        texts = self.samples(prompt, **checked.model_dump(exclude_unset=True))
        return copy_report(index, texts, held_out, split="valid", prompt=prompt, options=checked)

    def existing_split(self, split: str | None) -> str:
        """The name of a split of this run's corpus; None is test if there is one, else valid."""
        check_has_corpus(self.folder, self.record)
        known = self.record["corpus"]["splits"]
        split = split or ("test" if "test" in known else "valid")
        if split not in known:
            raise CorpusError(f"Run {self.name!r} has no {split!r} split: its corpus has {', '.join(known)}.")
        return split

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
            source: where the text is now; None: in the cache, or where it was.
            split: the split that must be the same; None: all.
            data_dir: folder of the named corpora.
            progress: called while the text is read.

        Raises:
            CorpusError: there is no text, or another one.
        """
        return training_text(
            self.folder, self.record, self.config.corpus, self.tokenizer, source=source, split=split,
            data_dir=data_dir, progress=progress,
        )  # fmt: skip

    def film(self) -> list[Frame]:
        """What the weights wrote at moments of the training, by rising step; empty if the run has no film."""
        return read_film(self.folder)

    def reports(self) -> dict[str, dict[str, Any]]:
        """The reports saved with the run, by split; another checkpoint than the best is SPLIT@CHECKPOINT.

        Reports of weights that training has replaced since are left out.

        Raises:
            CorruptRunError: report.json holds something else.
        """
        from lm.runs.reports import read_reports

        return read_reports(self.folder, self.config)

    def save_report(self, report: Report) -> None:
        """Add a report to `report.json` and update the card; it replaces one of the same split and checkpoint."""
        from lm.runs.reports import write_report

        write_report(self.folder, self.config, report)
        self.save_card()

    # -- card ---------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The facts that `lm show` and the card give, in order."""
        return run_facts(self.folder, self.record, self.config, self.reports())

    def summary(self) -> dict[str, Any]:
        """A line of `lm list`; of a run that cannot be read, "problem" is the reason."""
        try:
            return run_summary(self.facts(), self.folder.weights_path(self.checkpoint))
        except (LMError, KeyError, TypeError, AttributeError) as error:
            return {"name": self.name, "path": str(self.folder.path), "problem": f"cannot be read: {error}"}

    def card(self, *, name: str | None = None) -> str:
        """The model card, Markdown; `name` is that of the run, if its folder has another one now."""
        facts = self.facts()
        return model_card(facts if name is None else {**facts, "name": name})

    def save_card(self, *, name: str | None = None) -> None:
        """Write the run's README.md; `name` as in `card`."""
        write_file(self.folder.path / CARD, self.card(name=name))


def _refuse_logprobs(method: str, options: SamplingOptions) -> None:
    if options.logprobs is not None:
        raise ConfigError(
            f"{method} gives texts without logprobs: run.events(run.request(prompt, options)) gives the scores of "
            "drawn tokens, and run.score(text) those of a text."
        )


def _with_memory_errors(events: Callable[[], Iterator[Event]]) -> Iterator[Event]:
    """The events; if memory runs out, a DeviceError."""
    try:
        yield from events()
    except (MemoryError, RuntimeError):
        # Imported only here: it loads torch, which a native decoder does not need.
        from lm.device import TO_USE, enough_memory

        with enough_memory(TO_USE):
            raise
