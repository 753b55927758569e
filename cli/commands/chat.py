"""lm chat."""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import (
    DEFAULT_RUNS,
    Device,
    Precision,
    RunName,
    RunsDir,
    StateName,
    Unknown,
    decode_precision,
    unknown_policy,
    with_sampling,
)
from cli.terminal import Shown
from lm.config import validate
from lm.errors import LMError
from lm.generation.options import SamplingOptions

if TYPE_CHECKING:
    from lm.generation.conversation import Conversation
    from lm.runs.run import Run
    from lm.tokenizers.base import UnknownPolicy

POSITION = 4

BLANK_LINE = "\n\n"
HELP = """\
The model continues your line and a newline, up to a blank line.
/probs        probability of each token of the last reply, and alternatives
/undo         remove your last line and its reply
/state NAME   save a snapshot; lm chat RUN --state NAME continues from it
/reset        start again
/help         print this
/quit         exit (as the end of the input does)"""


@with_sampling("seed", "n", "best_of", "num_beams")
def command(
    run: RunName = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, options and lines: same replies. Default: a random seed.")
    ] = None,
    state: StateName = None,
    unknown: Unknown = None,
    device: Device = None,
    precision: Precision = "fp32",
    runs_dir: RunsDir = DEFAULT_RUNS,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Write with a model in turns. Replies go to stdout.

    The model continues your line and a newline, up to a blank line (or --stop, --max-tokens). It keeps its state
    between your lines. A blank line follows each reply. /help lists the commands.

    \b
    lm chat RUN --max-tokens 200
    printf 'ROMEO:\\n/probs\\n' | lm chat RUN --seed 7
    """
    given = {"logprobs": 4, "stop": (BLANK_LINE, "\r\n\r\n"), **(sampling or {})}
    given["seed"] = secrets.randbelow(2**31) if seed is None else seed
    options = validate(SamplingOptions, given, where="sampling")
    policy = unknown_policy(unknown)

    from cli.output import say
    from lm.generation.conversation import Conversation
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir, device=device, precision=decode_precision(precision))
    begin = loaded.snapshots.read(state) if state is not None else loaded.read_text("")
    after_reply = loaded.tokenizer.encode(2 * loaded.newline).tolist()
    talk = Conversation(loaded.engine(), options, begin, after_reply=after_reply)
    say(f"{loaded.name}@{loaded.checkpoint} · seed {options.seed} · /help lists the commands")
    for line in _lines():
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return
        try:
            if name.startswith("/"):
                _do(name, rest.strip(), talk, loaded)
            else:
                _reply(talk, loaded, line, policy)
        except LMError as error:
            say(f"error: {error}")


def _lines() -> Any:
    """The lines of stdin, without the newline."""
    if sys.stdin.isatty():
        # Enables arrow keys and history.
        import readline  # noqa: F401

        while True:
            try:
                yield input("> ")
            except EOFError:
                return
    from cli.output import say
    from lm.corpora.text import decode_text

    for line in sys.stdin.buffer:
        try:
            yield decode_text(line, "The line").removesuffix("\n").removesuffix("\r")
        except LMError as error:
            say(f"error: {error}")


def _reply(talk: Conversation, run: Run, line: str, unknown: UnknownPolicy | None) -> None:
    ids, text = run.encode_prompt(line + run.newline, unknown).tolist(), Shown(sys.stdout)
    try:
        for event in talk.say(ids):
            typer.echo(text.feed(event.text), nl=False, color=True)
            sys.stdout.flush()
    except KeyboardInterrupt:
        # Ctrl-C ends the reply, not the conversation.
        pass
    typer.echo(text.end() + BLANK_LINE, nl=False)


def _do(name: str, argument: str, talk: Conversation, run: Run) -> None:
    """Run a command that starts with a slash."""
    from cli.output import say, score_lines
    from lm.registry import did_you_mean

    match name:
        case "/probs":
            for line in score_lines(run.tokenizer, talk.scores) or ["There is no reply yet."]:
                typer.echo(line)
        case "/undo":
            say("Removed." if talk.undo() else "There is no line to remove.")
        case "/state":
            path = run.snapshots.save(argument, talk.state)
            say(f"Saved snapshot {argument!r}: {talk.state.tokens:,} tokens, {path.stat().st_size:,} bytes.")
        case "/reset":
            talk.reset()
            say("Started again.")
        case "/help":
            say(HELP)
        case _:
            known = ("/probs", "/undo", "/state", "/reset", "/help", "/quit")
            say(f"Unknown command {name}.{did_you_mean(name, known)} See /help.")
