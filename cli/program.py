"""The `lm` program: finds the commands, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import importlib
import io
import logging
import os
import pkgutil
import sys
from typing import Annotated, Any, ClassVar, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from cli import commands
from cli.options import ANY_OPTION, set_instead
from cli.terminal import shown
from lm.config import wanted
from lm.errors import LMError
from lm.version import __version__

USAGE_ERROR: Any = typer.BadParameter.__base__
"""Typer's error for an unknown flag and similar mistakes; it has no public name."""


class _Commands(TyperGroup):
    """Lists the commands by their POSITION, and treats a broken pipe as success."""

    order: ClassVar[list[str]] = []

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.order.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            flag, command = getattr(error, "option_name", None), getattr(error.ctx, "command", None)
            if flag and any(each.metavar == ANY_OPTION for each in getattr(command, "params", ())):
                error.message += set_instead(flag, sys.argv)
            if isinstance(error.__cause__, ValidationError):
                error.message = "; ".join(f"{each['input']!r}: {wanted(each)}" for each in error.__cause__.errors())
            raise
        except BrokenPipeError:
            # The reader closed the pipe, as `head` does. Drop the rest of the output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None


app = typer.Typer(
    name="lm",
    cls=_Commands,
    help="Train a small language model on your own text, measure it, and sample from it.",
    no_args_is_help=True,
    # Plain help takes half the time of boxed help, and keeps brackets in descriptions.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: lm demo   or: lm train FILE",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"inkling {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _add_commands() -> None:
    modules = [
        importlib.import_module(f"{commands.__name__}.{found.name}")
        for found in pkgutil.iter_modules(commands.__path__)
    ]
    for module in sorted(modules, key=lambda module: module.POSITION):
        # "import" is a word of Python, and its module is import_.
        name = module.__name__.rpartition(".")[2].rstrip("_")
        _Commands.order.append(name)
        if isinstance(module.command, typer.Typer):
            app.add_typer(module.command, name=name)
        else:
            app.command(name=name)(module.command)


class _Notices(logging.Handler):
    """Prints the library's warnings on stderr, one line each; a repeated one only once."""

    _last = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message != self._last:
            _print(f"note: {message}", "yellow")
        self._last = message


def run() -> None:
    """Run the command and exit with its code.

    Raises:
        KeyboardInterrupt: where typer does not catch it.
    """
    _in_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character shows "?".
            stream.reconfigure(errors="replace")
    logging.getLogger("lm").addHandler(_Notices(logging.WARNING))
    logging.getLogger("lm").propagate = False
    _add_commands()
    try:
        app()
    except LMError as error:
        if error.is_reported:
            sys.exit(1)
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'The system'}: {error.strerror or error}.")
    except MemoryError:
        _fail("The memory is not enough: use a shorter text, or close other programs.")


def _in_utf8() -> None:
    """Restart in UTF-8 mode where Python uses ASCII for file names."""
    if sys.getfilesystemencoding() == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _fail(sentence: str) -> NoReturn:
    _print(f"error: {sentence}", "red")
    sys.exit(1)


def _print(sentence: str, color: str) -> None:
    sentence = shown(sentence, sys.stderr)
    typer.echo(sentence if os.environ.get("NO_COLOR") else typer.style(sentence, fg=color), err=True)
