"""lm serve, and the parts that lm page shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from cli.options import DEFAULT_RUNS, RunsDir, parameter
from lm.config import validate
from lm.errors import MissingExtraError
from serve.settings import ServeOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

POSITION = 7
INSTALL = "pip install '.[serve]' in a checkout of Inkling"


def command(**given: Any) -> None:
    """Serve runs over HTTP with the API of OpenAI.

    Serves the given runs, or all runs of the runs folder. A page for the browser is at /page/: see also lm page.

    \b
    lm serve shakespeare-gru
    curl http://127.0.0.1:8000/v1/completions \\
        -H 'Content-Type: application/json' -d '{"prompt": "ROMEO:"}'
    """
    serve(read_options(given))


def read_options(given: Mapping[str, Any]) -> ServeOptions:
    """The options that the flags give.

    Raises:
        ConfigError: one is out of bounds.
    """
    return validate(
        ServeOptions, {name: value for name, value in given.items() if value not in (None, [])}, where="serve"
    )


def serve(
    options: ServeOptions, name: str = "lm serve", *, for_page: bool = False, or_next: int = 0,
    then: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve until a signal ends the process.

    Args:
        options: of the server.
        name: of the command.
        for_page: require the page, and start without a run.
        or_next: number of following ports to try.
        then: called with the server's address once it answers.

    Raises:
        MissingExtraError: a needed package is not installed.
        LMError: a run cannot be served.
    """
    try:
        import fastapi  # noqa: F401
        import fastapi_swagger  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise _missing(name, error) from None
    from serve.app import make_app
    from serve.logs import start_logging
    from serve.program import listen, run

    app = make_app(options, may_be_empty=for_page)
    # First: a port that is in use is reported at once.
    with listen(options, or_next=or_next) as listening:
        port = listening.getsockname()[1]
        lacking = _add_page(app) if for_page else None
        if lacking is not None:
            raise _missing(name, lacking)
        start_logging()
        app.state.models.preload()
        if not (for_page or options.no_page):
            lacking = _add_page(app)

        def started() -> None:
            _welcome(app, options, port, lacking)
            if then is not None:
                then(address(options, port))

        run(app, options, listening, started)


def _missing(name: str, error: ImportError) -> MissingExtraError:
    return MissingExtraError(f"{name} needs {error.name}, which is not installed: {INSTALL}")


def _add_page(app: FastAPI) -> ImportError | None:
    """Add the page; the error of a missing package, without which the API works."""
    from serve.app import add_page

    try:
        add_page(app)
    except ImportError as error:
        if (error.name or "serve").partition(".")[0] in ("cli", "lm", "serve"):
            raise
        return error
    return None


def address(options: ServeOptions, port: int) -> str:
    """The address of the server."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{port}"


def _welcome(app: FastAPI, options: ServeOptions, port: int, lacking: ImportError | None) -> None:
    from rich.markup import escape

    from cli.output import console

    where = address(options, port)
    models = app.state.models
    names = list(models.available_runs)
    keyed = app.state.has_keys
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    screen = console()
    page = (f"{where}/page/", "in a browser") if lacking is None else ("missing", f"it needs {lacking.name}: {INSTALL}")
    rows = [
        *([] if options.no_page else [("page", *page)]),
        ("listening", f"{where}/v1", "the base_url of any OpenAI client"),
        ("models", shown or "none yet",
         f"{len(models.loaded)} loaded, others at first use" if len(names) > 1 else ""),
        *([("skipped", ", ".join(models.skipped), "cannot be loaded: see the log")] if models.skipped else []),
        ("key", "needed" if keyed else "none",
         "" if keyed else "open to all who reach this address: see --api-key-file"),
        ("limits", f"{options.max_batch} at once, {options.max_queue} waiting",
         f"prompts up to {options.max_prompt_tokens:,} tokens, texts {options.max_completion_tokens:,}"),
        ("docs", f"{where}/docs", "also /health, /metrics"),
    ]  # fmt: skip
    screen.print("[bold]Inkling serves.[/bold] Ctrl+C stops it; SIGHUP reloads changed runs.")
    for name, value, note in rows:
        screen.print(f"  [bold]{name:<10}[/bold] {escape(value)}  [dim]{escape(note)}[/dim]", soft_wrap=True)
    data = f'{{"model": "{names[0] if names else "NAME"}", "prompt": "Once", "max_tokens": 60}}'
    screen.print(
        f"\n  curl {where}/v1/completions{key} \\\n    -H 'Content-Type: application/json' \\\n    -d '{data}'\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    screen.file.flush()


# -- flags from the fields ------------------------------------------------------------------------


def _flag(name: str, declared: FieldInfo) -> inspect.Parameter:
    """The parameter of an option, with its default in the help."""
    text = declared.description
    match declared.get_default(call_default_factory=True):
        case None | () | False:
            pass
        case ByteSize() as size:
            text = f"{text} Default: {size.human_readable()}."
        case value:
            text = f"{text} Default: {value}."
    if name == "runs":
        return parameter(name, declared, typer.Argument(metavar="RUN", help=text, show_default=False))
    return parameter(name, declared, typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False))


def with_flags(
    command: Callable[..., None], *, more: Sequence[inspect.Parameter] = (), leave_out: Collection[str] = ()
) -> None:
    """Give a command a flag for each option of the server, and `more`."""
    flags = [_flag(name, declared) for name, declared in ServeOptions.model_fields.items() if name not in leave_out]
    flags = [
        each.replace(default=DEFAULT_RUNS, annotation=RunsDir) if each.name == "runs_dir" else each for each in flags
    ]
    flags = [*flags, *more]
    command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in flags}


with_flags(command)
