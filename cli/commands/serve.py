"""lm serve."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from cli.options import DEFAULT_RUNS, RunsDir
from lm.config import validate
from lm.errors import MissingExtraError
from serve.settings import ServeOptions

POSITION = 4

_PLAIN = (bool, int, float, str, Path)


def command(**given: Any) -> None:
    """Answer requests over HTTP as OpenAI's API does, for one run, several, or every run in the runs folder.

    \b
    lm serve shakespeare-gru
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "ROMEO:"}'
    """
    wanted = {name: value for name, value in given.items() if value not in (None, [])}
    options = validate(ServeOptions, wanted, where="serve")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"lm serve needs {error.name}, which is not installed: pip install 'inkling-lm[serve]'"
        ) from None
    from serve.app import make_app
    from serve.logs import start_logging
    from serve.program import listen, run

    app = make_app(options)
    # Before the models are loaded: a port that is in use is told at once.
    with listen(options) as listening:
        start_logging()
        app.state.models.preload()
        run(app, options, listening, lambda: _welcome(app, options, listening.getsockname()[1]))


def _welcome(app: Any, options: ServeOptions, port: int) -> None:
    from rich.markup import escape

    from cli.output import console

    host = f"[{options.host}]" if ":" in options.host else options.host
    where = f"http://{host}:{port}"
    models = app.state.models
    names = list(models.offers)
    keyed = app.state.has_keys
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    screen = console()
    rows = [
        ("listening", f"{where}/v1", "the base_url of any OpenAI client"),
        ("models", shown, f"{len(models.loaded)} loaded, the others when first asked for" if len(names) > 1 else ""),
        ("key", "needed" if keyed else "none",
         "" if keyed else "whoever reaches this address may ask: --api-key-file sets keys"),
        ("limits", f"{options.max_batch} at once, {options.max_queue} waiting",
         f"prompts to {options.max_prompt_tokens:,} tokens, texts to {options.max_completion_tokens:,}"),
        ("look", f"{where}/docs", "also /health, /health/ready and /metrics"),
    ]  # fmt: skip
    screen.print("[bold]Inkling serves.[/bold] Ctrl+C ends it; SIGHUP reloads runs that were trained again.")
    for name, value, note in rows:
        screen.print(f"  [bold]{name:<10}[/bold] {escape(value)}  [dim]{escape(note)}[/dim]", soft_wrap=True)
    data = f'{{"model": "{names[0]}", "prompt": "Once", "max_tokens": 60}}'
    screen.print(
        f"\n  curl {where}/v1/completions{key} \\\n    -H 'Content-Type: application/json' -d '{data}'\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    screen.file.flush()


# -- flags from the fields ------------------------------------------------------------------------


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The parameter of one option: its type in words that typer knows, its help and default from the field."""
    plain, several = _plain(field.annotation)
    kind: Any = list[plain] if several else plain  # type: ignore[valid-type]
    default = field.get_default(call_default_factory=True)
    text = field.description or ""
    if default not in (None, (), False) and not isinstance(default, Path):
        shown = default.human_readable() if isinstance(default, ByteSize) else default
        text += f" Default: {shown:g}." if isinstance(shown, int | float) else f" Default: {shown}."
    flags = {"runs": typer.Argument(metavar="RUN", help=text, show_default=False)}
    option = flags.get(name) or typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(annotation: Any) -> tuple[type, bool]:
    """The plain type of a flag's value, and whether it may be given several times."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (Union, types.UnionType):
        return _plain(next(each for each in arguments if each is not type(None)))
    if origin is tuple:
        return _plain(arguments[0])[0], True
    # Sizes such as 2GB are read by the field.
    return (annotation if annotation in _PLAIN else str), False


def _signature() -> inspect.Signature:
    parameters = [_flag(name, field) for name, field in ServeOptions.model_fields.items()]
    return inspect.Signature([
        inspect.Parameter("runs_dir", inspect.Parameter.KEYWORD_ONLY, default=DEFAULT_RUNS, annotation=RunsDir)
        if each.name == "runs_dir" else each
        for each in parameters
    ])  # fmt: skip


command.__signature__ = _signature()  # type: ignore[attr-defined]
command.__annotations__ = {name: each.annotation for name, each in _signature().parameters.items()}
