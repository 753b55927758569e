"""The flags of `lm eval` that add to the report: --per-token, --calibration, --convention, --adapt, --cache."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from cli.copies import check_training_text
from cli.options import choice
from cli.output import facts_table, print_sentence, say, scoring, wide_table
from cli.terminal import shown
from lm.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from lm.corpora import PreparedCorpus, Progress
    from lm.evaluation.calibration import Calibration, CalibrationSums
    from lm.evaluation.conventions import WordSums
    from lm.evaluation.per_token import Scored, Watcher
    from lm.evaluation.report import Report
    from lm.evaluation.signature import Signature
    from lm.runs.eval_extras import ChangingFigures
    from lm.runs.run import Run

BAR = 24
"""Columns of a bar from 0 to 1."""
SURE = 0.005
"""A difference of confidence and accuracy that a sentence reports."""
LABELS = {
    "dynamic evaluation": "the model learns from each segment after it is scored",
    "cache": "tokens that followed the same context earlier in this text are more likely",
}
OPTION_NOTES = {
    "rate": "of a step, for a gradient of the usual size",
    "decay": "share of the way back to the trained weights, each step",
    "segment": "tokens that are scored, then learned",
    "order": "tokens of an n-gram of the cache",
    "window": "last tokens that the cache counts",
    "weight": "of the cache where it knows the context",
}
CONVENTION_NOTES = {
    "lm-eval": "as lm-evaluation-harness counts one document, tokens alone",
    "kenlm": "as KenLM's query counts, but with the context of the report",
    "srilm": "as SRILM's ngram -ppl counts, but with the context of the report",
}


@dataclass
class Extras:
    """What the flags ask for, and then the results."""

    per_token: Path | None = None
    calibration: bool = False
    out: Path | None = None
    convention: str = "inkling"
    adapt: bool = False
    cache: bool = False

    signature: Signature | None = None
    """Of the convention's figure; None without a convention, or if the figure is infinite or unknown."""
    _own: PreparedCorpus | None = None
    _sums: CalibrationSums | None = None
    _words: WordSums | None = None
    _notes: list[str] = field(default_factory=list)
    _targets: list[npt.NDArray[Any]] = field(default_factory=list)
    _nats: list[npt.NDArray[Any]] = field(default_factory=list)
    _results: dict[str, Any] = field(default_factory=dict)
    """By key of the JSON object."""

    def check(self, precision: str) -> None:
        """Check the flags before long work.

        Raises:
            ConfigError: they do not fit together, or a value is unknown.
            MissingExtraError, RunError: a file cannot be written.
        """
        from lm.evaluation.conventions import CONVENTIONS

        choice("--convention", self.convention, *CONVENTIONS)
        for flag, given in (("--calibration", self.calibration), ("--adapt", self.adapt), ("--cache", self.cache)):
            if given and precision != "fp32":
                raise ConfigError(f"{flag} is measured in fp32: leave --precision {precision} out.")
        if self.per_token is not None:
            from lm.evaluation.per_token import check_token_file

            check_token_file(self.per_token)
        if self.out is not None:
            if not self.calibration:
                raise ConfigError("--out is the picture of --calibration: give both.")
            from lm.inspection.drawing.files import check_output

            check_output(self.out)

    def check_run(self, run: Run) -> None:
        """Check that the flags fit the run.

        Raises:
            ConfigError: they do not.
        """
        if self.convention in ("kenlm", "srilm") and run.tokenizer.options.unknown == "skip":
            raise ConfigError(
                f"--convention {self.convention}: run {run.name!r} leaves unknown symbols out (tokenizer.unknown = "
                "skip), so unknown words cannot be counted."
            )
        for flag, given in (("--adapt", self.adapt), ("--cache", self.cache)):
            if given:
                check_training_text(run, flag)
        if self.adapt:
            from lm.evaluation.adaptation import check_adaptable

            check_adaptable(run.model, "--cache instead of --adapt")

    def refuse_conversations(self, where: str) -> None:
        """Refuse what reads a text as one whole, without marks of its answers.

        Args:
            where: the text of conversations.

        Raises:
            ConfigError: such a flag is given.
        """
        flags = {"--calibration": self.calibration, "--adapt": self.adapt, "--cache": self.cache}
        for flag, given in flags.items():
            if given:
                raise ConfigError(
                    f"{flag} reads a text as one whole, and {where} holds conversations, of which the answers alone "
                    f"are scored: leave {flag} out."
                )

    def stride(self, given: int | None, run: Run) -> int | None:
        """The stride of a sliding window: that of --stride, or the convention's."""
        if self.convention == "lm-eval" and given is None:
            # lm-evaluation-harness reads windows without overlap; None for a carried state.
            return run.model.context_length
        return given

    @contextlib.contextmanager
    def watching(
        self, run: Run, *, stride: int | None, corpus: str | None, data_dir: Path | None, reading: Progress
    ) -> Iterator[list[Watcher]]:
        """Do what comes before the scoring, and give the watchers of the scored tokens.

        Args:
            run: the run.
            stride: of its sliding window.
            corpus: where its text is now.
            data_dir: folder of the named corpora.
            reading: called while the text is read.
        """
        watchers: list[Watcher] = []
        if self.calibration or self.adapt or self.cache:
            try:
                self._own = run.own_text(corpus, data_dir=data_dir, progress=reading)
            except CorpusError as error:
                if self.adapt or self.cache:
                    raise
                self._notes.append(f"There is no temperature without the run's validation text. {error}")
            if self._own is not None and self._own.splits["valid"].marks is not None:
                self.refuse_conversations(self._own.source)
        if self.calibration:
            from lm.evaluation.calibration import CalibrationSums
            from lm.runs.eval_extras import run_temperature

            temperature = None
            if self._own is not None:
                with scoring("fitting the temperature") as progress:
                    temperature = run_temperature(run, self._own, stride=stride, progress=progress)
            self._sums = CalibrationSums(temperature)
            watchers.append(self._sums.add)
        if self.convention in ("kenlm", "srilm"):
            from lm.evaluation.conventions import WordSums

            self._words = WordSums(run.tokenizer)
            watchers.append(self._words.add)
        if self.adapt or self.cache:
            watchers.append(self._keep)
        if self.per_token is None:
            yield watchers
            return
        from lm.evaluation.per_token import token_file

        with token_file(self.per_token, run.tokenizer) as watcher:
            yield [*watchers, watcher]
        say(f"Wrote {self.per_token}.")

    def _keep(self, scored: Scored) -> None:
        self._targets.append(scored.targets.cpu().numpy())
        self._nats.append(scored.nats.cpu().double().numpy())

    def finish(self, run: Run, report: Report, *, stride: int | None) -> dict[str, Any]:
        """Do what comes after the scoring; the results by key of the JSON object."""
        results: dict[str, Any] = {}
        if self._sums is not None:
            from lm.runs.eval_extras import run_samples, tuned_on_itself

            with scoring(f"sampling from {run.name}"):
                samples = run_samples(run)
            results["calibration"] = self._sums.result(samples, [*self._notes, *tuned_on_itself(run, report)])
        if self.convention != "inkling":
            from lm.evaluation import conventions
            from lm.evaluation.signature import convention_signature, parse

            if self._words is None:
                figures = conventions.lm_eval(report)
            else:
                made = {"kenlm": conventions.kenlm, "srilm": conventions.srilm}[self.convention]
                figures = made(self._words.end())
            assert report.signature is not None
            self.signature = convention_signature(parse(report.signature), self.convention, figures)
            line = None if self.signature is None else str(self.signature)
            results["conventions"] = {self.convention: {**figures, "signature": line}}
        if self.adapt or self.cache:
            ids = np.concatenate([[run.tokenizer.start_id], *self._targets])
            results |= self._changing(run, report, ids, stride)
        self._results = results
        if self.out is not None:
            self._draw(run, report, results["calibration"])
        return {key: value if isinstance(value, dict) else value.to_json() for key, value in results.items()}

    def _changing(self, run: Run, report: Report, ids: npt.NDArray[Any], stride: int | None) -> dict[str, Any]:
        from lm.runs.eval_extras import run_adapted, run_cached

        assert self._own is not None, "it is read before the scoring"
        results: dict[str, Any] = {}
        if self.adapt:
            with scoring(f"adapting {run.name}") as progress:
                results["adapted"] = run_adapted(run, self._own, ids, report, progress=progress)
        if self.cache:
            with scoring("choosing the cache") as progress:
                results["cached"] = run_cached(
                    run, self._own, ids, np.concatenate(self._nats), report, stride=stride, progress=progress
                )
        return results

    def _draw(self, run: Run, report: Report, calibration: Calibration) -> None:
        from lm.inspection.drawing import calibration as drawing
        from lm.inspection.drawing.files import write_view

        assert self.out is not None
        where = report.corpus if report.split == "text" else f"{report.corpus}, split {report.split}"
        title = f"Calibration of {run.name} on {where}"
        write_view(self.out, title, lambda: drawing.figure(calibration, title))
        say(f"Wrote {self.out}.")

    def measured(self, report: Report, expected: Signature) -> Signature:
        """The signature of the figure that an expected one is compared with: of the report, or of the convention.

        Raises:
            ConfigError: the convention's figure is infinite or unknown.
        """
        from lm.evaluation.signature import parse

        if expected.convention is None:
            assert report.signature is not None
            return parse(report.signature)
        if self.signature is None:
            raise ConfigError(f"--check: the figure of {self.convention} is infinite or unknown on this text.")
        return self.signature

    def print(self, screen: Console) -> None:
        """Print a table for each result, after the report's."""
        for key, result in self._results.items():
            screen.print()
            if key == "calibration":
                _print_calibration(screen, result)
            elif key == "conventions":
                _print_convention(screen, self.convention, result[self.convention])
            else:
                _print_changing(screen, result)


def _heading(screen: Console, name: str, sentence: str) -> None:
    screen.print(Text.assemble((name, "bold"), f": {sentence}"))


def _print_calibration(screen: Console, found: Calibration) -> None:
    _heading(screen, "calibration", "is the first choice as often right as its probability says?")
    table = wide_table("probability", "tokens", "mean", "right", "gap", "right (bar), probability (│)", left=(
        "right (bar), probability (│)",
    ))  # fmt: skip
    for each in found.equal_mass.bins:
        table.add_row(
            f"{each.low:.2f} to {each.high:.2f}", f"{each.tokens:,}", f"{each.confidence:.3f}",
            f"{each.accuracy:.3f}", f"{each.confidence - each.accuracy:+.3f}", _bar(each.accuracy, each.confidence),
        )  # fmt: skip
    screen.print(table)
    mass, width = found.equal_mass, found.equal_width
    rows = [
        ("error", f"{mass.error:.4f}",
         f"mean gap, {len(mass.bins)} bins of equal mass; {width.error:.4f} with {len(width.bins)} of equal width"),
        ("expected loss", f"{found.expected_loss:.4f}",
         f"nats per token that the model expects of this text; it has {found.loss:.4f}"),
    ]  # fmt: skip
    if found.samples is not None:
        drawn = found.samples
        rows.append(
            ("  of samples", f"{drawn.entropy:.4f}",
             f"± {drawn.standard_error:.4f}, over {drawn.samples} samples, {drawn.tokens:,} tokens")
        )  # fmt: skip
    if (fitted := found.temperature) is not None:
        rows += [
            ("temperature", f"{fitted.value:.3f}",
             f"lowest loss on {fitted.text}, {fitted.tokens:,} tokens: {fitted.loss_before:.4f} → "
             f"{fitted.loss_after:.4f}"),
            ("  loss", f"{found.loss_at_temperature:.4f}", "nats per token of this text at that temperature"),
            ("  error", f"{found.error_at_temperature:.4f}", "at that temperature"),
        ]  # fmt: skip
    screen.print(facts_table(rows))
    confidence, accuracy = (
        sum(each.tokens * getattr(each, name) for each in mass.bins) / found.tokens
        for name in ("confidence", "accuracy")
    )
    if abs(confidence - accuracy) >= SURE:
        sure = "too sure" if confidence > accuracy else "not sure enough"
        _note(screen, f"The model is {sure}: its first choices have {confidence:.1%}, and {accuracy:.1%} are right.")
    for note in found.notes:
        _note(screen, note)


def _bar(share: float, mark: float) -> str:
    cells = ["█" if column < round(share * BAR) else " " for column in range(BAR + 1)]
    cells[min(round(mark * BAR), BAR)] = "│"
    return shown("".join(cells).rstrip(), sys.stdout)


def _print_convention(screen: Console, name: str, figures: dict[str, Any]) -> None:
    _heading(screen, name, CONVENTION_NOTES[name])
    if name == "lm-eval":
        rows = [
            ("word_perplexity", _number(figures["word_perplexity"]),
             f"over {figures['words']:,} parts of re.split(r'\\s+')"),
            ("byte_perplexity", _number(figures["byte_perplexity"]), f"over {figures['bytes']:,} bytes"),
            ("bits_per_byte", _number(figures["bits_per_byte"]), "the same in bits"),
        ]  # fmt: skip
    elif name == "kenlm":
        rows = [
            ("Perplexity including OOVs", _number(figures["perplexity_including_oovs"]),
             "10^(-log10 / tokens)"),
            ("Perplexity excluding OOVs", _number(figures["perplexity_excluding_oovs"]),
             "without unknown words"),
            ("OOVs", f"{figures['oovs']:,}", "unknown words"),
            ("Tokens", f"{figures['tokens']:,}", "words and one </s> for each newline"),
        ]  # fmt: skip
    else:
        rows = [
            ("sentences", f"{figures['sentences']:,}", "lines with a word, that end with a newline"),
            ("words", f"{figures['words']:,}", ""),
            ("OOVs", f"{figures['oovs']:,}", "unknown words, which are not scored"),
            ("zeroprobs", f"{figures['zeroprobs']:,}", "words of probability 0"),
            ("logprob", f"{figures['logprob']:.6g}", "log10"),
            ("ppl", _number(figures["ppl"]), "over words - OOVs - zeroprobs + sentences"),
            ("ppl1", _number(figures["ppl1"]), "over words - OOVs - zeroprobs"),
        ]
    screen.print(facts_table(rows))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4f}"


def _print_changing(screen: Console, found: ChangingFigures) -> None:
    _heading(screen, found.method, LABELS[found.method])
    rows = [
        ("loss", f"{found.loss:.4f}", f"nats per token; without it {found.static_loss:.4f}"),
        ("bits per byte", _number(found.bits_per_byte), f"without it {_number(found.static_bits_per_byte)}"),
        *(
            (name, "all" if value is None else f"{value:.4g}", OPTION_NOTES[name])
            for name, value in found.options.items()
        ),
        ("chosen on", found.tuned_on,
         f"{found.tuned_tokens:,} tokens: {found.tuned_static_loss:.4f} → {found.tuned_loss:.4f}"),
    ]  # fmt: skip
    screen.print(facts_table(rows))
    for note in ("Compare these figures only with figures of the same method.", *found.notes):
        _note(screen, note)


def _note(screen: Console, sentence: str) -> None:
    print_sentence(screen, f"note: {sentence}", "yellow")
