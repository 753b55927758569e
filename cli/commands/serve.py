"""lm serve."""

from __future__ import annotations

import inspect
from typing import Any

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from cli.options import DEFAULT_RUNS, RunsDir, parameter
from lm.config import validate
from lm.errors import MissingExtraError
from serve.settings import ServeOptions

POSITION = 4


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


def _flag(name: str, declared: FieldInfo) -> inspect.Parameter:
    """The parameter of one option, with its default in the help."""
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


_parameters = [_flag(name, declared) for name, declared in ServeOptions.model_fields.items()]
_parameters = [
    each.replace(default=DEFAULT_RUNS, annotation=RunsDir) if each.name == "runs_dir" else each for each in _parameters
]
command.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
command.__annotations__ = {each.name: each.annotation for each in _parameters}
