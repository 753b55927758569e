"""lm chat."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
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
from lm.errors import ConfigError, LMError
from lm.generation.options import SamplingOptions

if TYPE_CHECKING:
    from lm.evaluation.adaptation import Learner
    from lm.generation.conversation import Conversation
    from lm.generation.engine import Engine
    from lm.generation.template_turns import TemplateTurns
    from lm.runs.run import Run
    from lm.tokenizers.base import UnknownPolicy

POSITION = 5

CONTINUES = "The model continues your line and a newline, up to a blank line."
ANSWERS = "The model answers your line; its chat template puts both into its text."
HELP = """\
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
    learn: Annotated[
        bool, typer.Option("--learn", help="Learn from each turn that you do not /undo, in memory alone.")
    ] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Write with a model in turns. Replies go to stdout.

    A model with a chat template answers your line. Another continues your line and a newline, up to a blank line (or
    --stop, --max-tokens). It keeps its state between your lines. A blank line follows each reply. /help lists the
    commands.

    \b
    lm chat RUN --max-tokens 200
    printf 'ROMEO:\\n/probs\\n' | lm chat RUN --seed 7
    """
    from lm.tokenizers.turns import BLANK_LINE

    given = {"logprobs": 4, "stop": (BLANK_LINE, "\r\n\r\n"), **(sampling or {})}
    given["seed"] = secrets.randbelow(2**31) if seed is None else seed
    options = validate(SamplingOptions, given, where="sampling")
    policy = unknown_policy(unknown)
    if learn and decode_precision(precision) != "fp32":
        raise ConfigError(f"--learn changes fp32 weights: leave --precision {precision} out.")

    from cli.output import say
    from lm.generation.conversation import Conversation
    from lm.generation.snapshots import NamedSnapshot
    from lm.generation.template_turns import TemplateTurns
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir, device=device, precision=decode_precision(precision))
    if learn:
        from cli.copies import check_training_text

        check_training_text(loaded, "--learn")
    options = options.with_defaults(loaded.sampling_defaults(chat=True))
    turns = None
    if loaded.tokenizer.chat_template is not None:
        turns = TemplateTurns(loaded.tokenizer, continues=state is not None)
        if "stop" not in (sampling or {}):
            options = options.model_copy(update={"stop": ()})
    if state is not None:
        begin = loaded.snapshots.read(state)
    else:
        # A template begins with its own special tokens.
        begin = loaded.read_text("") if turns is None else NamedSnapshot((), 0)
    after_reply = loaded.tokenizer.encode(2 * loaded.newline).tolist()
    engine, learning = (loaded.engine(), None) if not learn else _learning(loaded)
    talk = Conversation(engine, options, begin, after_reply=after_reply if turns is None else turns.reply)
    label = " · learns from each turn, in memory" if learn else ""
    say(f"{loaded.name}@{loaded.checkpoint} · seed {options.seed}{label} · /help lists the commands")
    for line in _lines():
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return
        try:
            if name.startswith("/"):
                _do(name, rest.strip(), talk, loaded, turns)
                if learning is not None:
                    learning.after_command(name)
            else:
                if learning is not None:
                    learning.accept()
                ids = _reply(talk, loaded, line, policy, turns)
                if learning is not None:
                    learning.turn = (*ids, *talk.state.unread)
        except LMError as error:
            say(f"error: {error}")


class _Learning:
    """Learns from a turn when the next line accepts it."""

    def __init__(self, learner: Learner, start: int) -> None:
        self._learner = learner
        self._start = start
        learner.read_on([start])
        self.turn: tuple[int, ...] = ()
        """The tokens of the last turn, if nothing was learned from it yet."""

    def accept(self) -> None:
        """Learn from the last turn."""
        from cli.output import say

        if self.turn:
            nats = self._learner.read_on(self.turn)
            say(f"Learned from {len(nats):,} tokens of {nats.mean():.2f} nats.")
        self.turn = ()

    def after_command(self, name: str) -> None:
        """Forget what /undo or /reset removed."""
        from cli.output import say

        if name == "/undo":
            if not self.turn:
                say("What the model has learned stays; /reset forgets it.")
            self.turn = ()
        elif name == "/reset":
            self._learner.restore()
            self._learner.read_on([self._start])
            self.turn = ()


def _learning(run: Run) -> tuple[Engine, _Learning]:
    """An engine on the model in memory, and what changes that model."""
    from lm.generation.engine import Engine
    from lm.generation.torch_decoder import TorchDecoder
    from lm.runs.eval_extras import chat_learner

    learner = chat_learner(run)
    # Without stored states of prefixes, which would be those of earlier weights.
    engine = Engine(TorchDecoder(run.model), run.tokenizer, max_batch=1, prefix_cache_bytes=0)
    return engine, _Learning(learner, run.tokenizer.start_id)


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


def _reply(
    talk: Conversation, run: Run, line: str, unknown: UnknownPolicy | None, turns: TemplateTurns | None
) -> Sequence[int]:
    """Print the reply to a line; returns the tokens that the model read before it."""
    from lm.tokenizers.turns import BLANK_LINE

    ids: Sequence[int]
    if turns is None:
        ids, from_begin = run.encode_prompt(line + run.newline, unknown).tolist(), False
    else:
        ids, from_begin = turns.user(line)
    before, text = talk.state, Shown(sys.stdout)
    try:
        for event in talk.say(ids, from_begin=from_begin):
            typer.echo(text.feed(event.text), nl=False, color=True)
            sys.stdout.flush()
    except KeyboardInterrupt:
        # Ctrl-C ends the reply, not the conversation.
        pass
    finally:
        if turns is not None and talk.state is before:
            turns.undo()
    typer.echo(text.end() + BLANK_LINE, nl=False)
    return ids


def _do(name: str, argument: str, talk: Conversation, run: Run, turns: TemplateTurns | None) -> None:
    """Run a command that starts with a slash."""
    from cli.output import say, score_lines
    from lm.registry import did_you_mean

    match name:
        case "/probs":
            for line in score_lines(run.tokenizer, talk.scores) or ["There is no reply yet."]:
                typer.echo(line)
        case "/undo":
            removed = talk.undo()
            if removed and turns is not None:
                turns.undo()
            say("Removed." if removed else "There is no line to remove.")
        case "/state":
            path = run.snapshots.save(argument, talk.state)
            say(f"Saved snapshot {argument!r}: {talk.state.tokens:,} tokens, {path.stat().st_size:,} bytes.")
        case "/reset":
            talk.reset()
            if turns is not None:
                turns.reset()
            say("Started again.")
        case "/help":
            say(CONTINUES if turns is None else ANSWERS)
            say(HELP)
        case _:
            known = ("/probs", "/undo", "/state", "/reset", "/help", "/quit")
            say(f"Unknown command {name}.{did_you_mean(name, known)} See /help.")
