"""lm sample."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import (
    DEFAULT_RUNS,
    Device,
    Json,
    Precision,
    RunName,
    RunsDir,
    StateName,
    Unknown,
    decode_precision,
    path_option,
    unknown_policy,
    with_sampling,
)
from cli.terminal import Shown, shown
from lm.config import validate
from lm.errors import ConfigError
from lm.generation.options import SamplingOptions

if TYPE_CHECKING:
    from cli.copies import CopyMarker
    from lm.generation.request import Score

POSITION = 2

SHOW_SECONDS = 0.02
"""Text that is ready within this time is printed together."""


@with_sampling("seed")
def command(
    run: RunName = None,
    source: Annotated[str | None, typer.Argument(metavar="[-]", help="- reads the prompt from stdin.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)] = "",
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed and options: same text. Default: a random seed, printed on stderr."),
    ] = None,
    state: StateName = None,
    unknown: Unknown = None,
    detokenize: Annotated[
        bool, typer.Option("--detokenize", help="Join the tokens of word models into normal text.")
    ] = False,
    echo: Annotated[bool, typer.Option(help="Print the prompt before the sample.")] = True,
    out: Annotated[
        Path | None,
        path_option(help="Also write the samples with options and seed to this file."),
    ] = None,
    mark_copies: Annotated[
        bool,
        typer.Option(
            "--mark-copies",
            help="Mark what stands word for word in the training text: underlined, or in [[ ]] with NO_COLOR and in a "
            "pipe. Each sample is printed when it is complete.",
        ),
    ] = False,
    min_copy: Annotated[
        int | None,
        typer.Option(
            min=1, help="Characters of the shortest run that --mark-copies marks. Default: 20.", show_default=False
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Use a running lm serve; RUN is one of its models.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="INKLING_API_KEY", help="Key for --server.", show_default=False)
    ] = None,
    device: Device = None,
    precision: Precision = "fp32",
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Generate text. The text goes to stdout, everything else to stderr.

    \b
    lm sample RUN --prompt "ROMEO:" --temperature 0.8 --top-k 40 --seed 7
    echo "O, for a" | lm sample RUN -
    """
    given = {**(sampling or {}), "seed": secrets.randbelow(2**31) if seed is None else seed}
    options = validate(SamplingOptions, given, where="sampling")
    policy, weights = unknown_policy(unknown), decode_precision(precision)
    if run == "-" and source is None:
        run, source = None, "-"
    prompt += _piped(source)
    _check_marks(mark_copies, min_copy, detokenize=detokenize)
    if out is not None:
        from lm.files import check_place

        check_place(out)
    if server is not None:
        local = {
            "--state": state, "--out": out, "--device": device, "--precision": weights != "fp32" or None,
            "--mark-copies": mark_copies or None,
        }  # fmt: skip
        loaded = _served(server, run, api_key, local)
    else:
        from lm.runs.run import load

        loaded = load(run, runs_dir=runs_dir, device=device, precision=weights)
    if detokenize and not hasattr(loaded.tokenizer, "detokenize"):
        raise ConfigError(f"--detokenize is for word models; run {loaded.name!r} uses {loaded.tokenizer.type} tokens.")
    if server is None:
        options = options.with_defaults(loaded.sampling_defaults())
    begin = loaded.snapshots.read(state) if state is not None else None
    request = loaded.request(prompt, options, unknown=policy, state=begin)
    marker = _marker(loaded, min_copy) if mark_copies else None
    screen = _Screen(loaded, prompt if echo else "", options, marker)
    if as_json:
        samples = _draw(loaded, request, lambda sample: screen.print_json(sample, prompt))
    elif detokenize:
        samples = _draw(loaded, request, screen.print_detokenized)
    elif marker is not None:
        samples = _draw(loaded, request, lambda sample: screen.print_marked(sample, prompt, echo=echo))
    else:
        samples = _draw(loaded, request, screen.end, begin=screen.begin, show=screen.show)
    if out is not None:
        loaded.save_sample(prompt, [sample.text for sample in samples], options, out, unknown=policy)


def _piped(source: str | None) -> str:
    """The prompt that - reads from stdin; "" without it."""
    if source is None:
        return ""
    if source != "-":
        raise ConfigError(f"Unexpected argument {source!r}: give the prompt with --prompt, or - to read it from stdin.")
    from lm.corpora.text import STDIN, decode_text

    piped = decode_text(sys.stdin.buffer.read(), STDIN)
    # The final newline of a shell is not part of the prompt.
    return piped.removesuffix("\r\n" if piped.endswith("\r\n") else "\n")


def _check_marks(mark_copies: bool, min_copy: int | None, *, detokenize: bool) -> None:
    """Raise ConfigError if the flags for copies contradict the others."""
    if min_copy is not None and not mark_copies:
        raise ConfigError("--min-copy is for --mark-copies: give both.")
    if mark_copies and detokenize:
        raise ConfigError("--mark-copies marks the text as the tokens give it: leave --detokenize out.")


def _served(server: str, run: str | None, api_key: str | None, local: dict[str, Any]) -> Any:
    """A model of a running server, with the methods of a run that a sample needs.

    Args:
        server: its URL.
        run: the name of its model.
        api_key: its key.
        local: flags for local runs alone, with their values; None: not given.

    Raises:
        ConfigError: one of them is given.
    """
    from cli.remote import Remote

    for flag, value in local.items():
        if value is not None:
            raise ConfigError(f"{flag} is for local runs: leave it out with --server.")
    return Remote(server, run, api_key=api_key)


def _marker(run: Any, min_copy: int | None) -> CopyMarker:
    from cli.copies import MIN_COPY, CopyMarker, check_training_text

    check_training_text(run, "--mark-copies")
    return CopyMarker(run, min_copy or MIN_COPY)


class _Sample:
    """One sample, as far as it is generated."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.tokens = 0
        self.scores: list[Score] = []
        self.finish_reason: str | None = None
        self.seconds = 0.0


def _draw(
    run: Any,
    request: Any,
    end: Callable[[_Sample], None],
    *,
    begin: Callable[[_Sample], None] = lambda sample: None,
    show: Callable[[str], None] = lambda text: None,
) -> list[_Sample]:
    """Generate all samples together and report them in order: the current one while it is generated."""
    samples = [_Sample(index) for index in range(request.options.n)]
    turn, started_at = 0, time.perf_counter()
    begin(samples[0])
    for event in run.events(request):
        sample = samples[event.index]
        sample.text += event.text
        sample.tokens += len(event.tokens)
        sample.scores += event.scores
        sample.finish_reason = event.finish_reason
        sample.seconds = time.perf_counter() - started_at
        if event.index == turn:
            show(event.text)
        while turn < len(samples) and samples[turn].finish_reason is not None:
            end(samples[turn])
            turn += 1
            if turn < len(samples):
                begin(samples[turn])
    return samples


class _Screen:
    """Prints text on stdout and everything else on stderr."""

    def __init__(self, run: Any, echoed: str, options: SamplingOptions, marker: CopyMarker | None = None) -> None:
        self._run = run
        self._marker = marker
        self._echoed = echoed
        self._options = options
        self._unshown = ""
        self._text = Shown(sys.stdout)
        self._shown_at = 0.0

    def begin(self, sample: _Sample) -> None:
        """Start to print a sample."""
        if sample.index:
            typer.echo("")
        typer.echo(self._text.feed(self._echoed), nl=False, color=True)
        self.show(sample.text)

    def show(self, text: str) -> None:
        """Print more text; short pieces are collected, because printing costs more than generating."""
        self._unshown += text
        if time.perf_counter() - self._shown_at > SHOW_SECONDS:
            self._flush()

    def _flush(self) -> None:
        typer.echo(self._text.feed(self._unshown), nl=False, color=True)
        sys.stdout.flush()
        self._unshown, self._shown_at = "", time.perf_counter()

    def end(self, sample: _Sample) -> None:
        """End a sample."""
        self._flush()
        typer.echo(self._text.end())
        self._print_facts(sample)

    def print_detokenized(self, sample: _Sample) -> None:
        """Print a finished sample as normal text."""
        typer.echo(shown(self._run.tokenizer.detokenize(self._echoed + sample.text), sys.stdout), color=True)
        self._print_facts(sample)

    def print_marked(self, sample: _Sample, prompt: str, *, echo: bool) -> None:
        """Print a finished sample with its copies marked, and their share."""
        assert self._marker is not None
        if sample.index:
            typer.echo("")
        copies = self._marker.find(prompt, sample.text)
        self._marker.print_text(copies, prompt, sample.text, echo=echo)
        self._print_facts(sample)
        self._marker.print_share(copies, prompt)

    def print_json(self, sample: _Sample, prompt: str) -> None:
        """Print a finished sample as JSON."""
        from cli.output import print_json

        facts = {
            "prompt": prompt, "text": sample.text, "index": sample.index, "seed": self._options.seed,
            "tokens": sample.tokens, "finish_reason": sample.finish_reason, "run": self._run.name,
            "state": self._run.checkpoint,
        }  # fmt: skip
        if self._marker is not None:
            facts["copies"] = self._marker.facts(self._marker.find(prompt, sample.text), prompt)
        if self._options.logprobs is not None:
            facts["logprobs"] = [
                {"token": score.token, "logprob": score.logprob, "top": [list(pair) for pair in score.top]}
                for score in sample.scores
            ]
            sample.scores = []
        print_json(facts)
        self._print_facts(sample)

    def _print_facts(self, sample: _Sample) -> None:
        from cli.output import say, score_lines

        for line in score_lines(self._run.tokenizer, sample.scores):
            typer.echo(line, err=True)
        which = f", sample {sample.index + 1} of {self._options.n}" if self._options.n > 1 else ""
        speed = sample.tokens / max(sample.seconds, 1e-9)
        say(
            f"{self._run.name}@{self._run.checkpoint} · seed {self._options.seed}{which} · {sample.tokens:,} tokens, "
            f"{speed:,.0f} tokens/s"
        )
