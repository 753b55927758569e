"""Flags that several commands share; what a configuration declares is described there and only named here."""

from __future__ import annotations

import difflib
import functools
import inspect
import shlex
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo

from lm.config import DEFAULT_RUNS_DIR, TrainingConfig, expanded
from lm.errors import ConfigError
from lm.generation.options import SamplingOptions
from lm.registry import ALL

if TYPE_CHECKING:
    from lm.kernels.decoding import DecodePrecision
    from lm.tokenizers.base import UnknownPolicy


def field(owner: type[BaseModel], name: str, *flags: str) -> Any:
    """A typer option that takes its help from a configuration field."""
    return typer.Option(*flags, help=owner.model_fields[name].description, show_default=False)


def path_option(*flags: str, **declared: Any) -> Any:
    """A typer option for a path, in which ~ is the user's folder."""
    return typer.Option(*flags, **{"parser": expanded, "metavar": "PATH", "show_default": False, **declared})


RunsDir = Annotated[
    Path, path_option("--runs-dir", envvar="INKLING_RUNS", help="Where the runs lie.", show_default=True)
]
DataDir = Annotated[
    Path | None,
    path_option("--data-dir", help="Where named corpora lie; default: INKLING_DATA, else they are downloaded."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead of tables.")]
RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="A run's name or path, NAME@last or NAME@step-500; default: the newest run.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to compute; default: the CPU where the model has a native step, else a GPU when there is one."
    ),
]
Precision = Annotated[
    str, typer.Option(help="Weights of decoding: fp32, or int8, which is faster and a little less exact.")
]
Unknown = Annotated[
    str | None,
    typer.Option(
        help="What symbols of the prompt that the model never saw become: replace, skip, byte or error.",
        show_default=False,
    ),
]
StateName = Annotated[
    str | None, typer.Option("--state", help="Go on from a named state: lm state list RUN.", show_default=False)
]
TextColumn = Annotated[
    str | None,
    typer.Option(help="The column of --text that holds the text, in a table; default: the run's.", show_default=False),
]
TextEncoding = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        help="Encoding of --text, where it has no byte-order mark; default: the run's.",
        show_default=False,
    ),
]
DEFAULT_RUNS = DEFAULT_RUNS_DIR


def named(run: str, runs_dir: Path) -> str:
    """A run in `runs_dir` as a printed command names it, quoted for a shell."""
    return shlex.quote(run) + runs_dir_flag(runs_dir)


def runs_dir_flag(runs_dir: Path) -> str:
    """The flag that a printed command needs to find a run in `runs_dir`; "" for the default folder."""
    return "" if runs_dir == DEFAULT_RUNS else f" --runs-dir {shlex.quote(str(runs_dir))}"


def unknown_policy(name: str | None) -> UnknownPolicy | None:
    """What --unknown says.

    Raises:
        ConfigError: it says something else.
    """
    if name not in (None, "replace", "skip", "byte", "error"):
        raise ConfigError(f"--unknown {name!r}: use replace, skip, byte or error.")
    return cast("UnknownPolicy | None", name)


def decode_precision(name: str) -> DecodePrecision:
    """What --precision says of decoding.

    Raises:
        ConfigError: it says something else.
    """
    if name not in ("fp32", "int8"):
        raise ConfigError(f"--precision {name!r}: use fp32 or int8.")
    return cast("DecodePrecision", name)


# -- options that have no flag ---------------------------------------------------------------------------

ANY_OPTION = "SECTION.FIELD=VALUE"
"""What --set takes in the commands that take every option."""
ALIASES = {
    "batch": "batch_size", "block_size": "context_length", "bsz": "batch_size", "clip": "grad_clip",
    "d_model": "hidden_size", "emsize": "embedding_size", "heads": "num_heads", "hidden": "hidden_size",
    "layers": "num_layers", "lr": "learning_rate", "n_embd": "hidden_size", "n_head": "num_heads",
    "n_layer": "num_layers", "n_layers": "num_layers", "nhid": "hidden_size", "seq_len": "bptt", "vocab_size": "size",
    "warmup": "warmup_steps", "wd": "weight_decay",
}  # fmt: skip
"""What other programs call some options."""


def set_instead(flag: str, arguments: list[str]) -> str:
    """A sentence that names --set training.learning_rate=0.1 for --lr 0.1; "" where no option is like it.

    Args:
        flag: what was typed, with its dashes.
        arguments: all that was typed.
    """
    name = flag.lstrip("-").replace("-", "_").lower()
    name = ALIASES.get(name, name)
    owners: dict[str, list[Any]] = {"training": [TrainingConfig]}
    if name not in TrainingConfig.model_fields:
        # These take longer to find: models load torch.
        owners |= {kind: [known.resolve(each).Options for each in known.names()] for kind, known in ALL.items()}
    places = {name: section for section, classes in owners.items() for each in classes for name in each.model_fields}
    near = difflib.get_close_matches(name, places, n=1, cutoff=0.8)
    if not near:
        return ""
    return f". An option without a flag is given so: --set {places[near[0]]}.{near[0]}={_value_of(flag, arguments)}"


def _value_of(flag: str, arguments: list[str]) -> str:
    """What was typed after a flag; VALUE where nothing was."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            after = value if equals else "".join(arguments[place + 1 : place + 2])
            return "VALUE" if not after or after.startswith("--") else shlex.quote(after)
    return "VALUE"


# -- sampling: one flag for each field of SamplingOptions ----------------------------------------------

_PLAIN = (bool, int, float, str, Path)


def with_sampling(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each field of `SamplingOptions`; it gets those that were used as `sampling`."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        fields = {name: each for name, each in SamplingOptions.model_fields.items() if name not in leave_out}

        @functools.wraps(command)
        def with_flags(**given: Any) -> None:
            used = {name: given.pop(name) for name in fields}
            command(**given, sampling={name: value for name, value in used.items() if value not in (None, [])})

        hints = get_type_hints(command, include_extras=True)
        own = [
            each.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, each in inspect.signature(command).parameters.items()
            if name != "sampling"
        ]
        # Where the command's own flags begin to be flags: those of the field come first.
        first = next(place for place, each in enumerate(own) if not _is_argument(each))
        own[first + 1 : first + 1] = [_sampling_flag(name, each) for name, each in fields.items()]
        with_flags.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {each.name: each.annotation for each in own}
        return with_flags

    return add


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(isinstance(part, ArgumentInfo) for part in getattr(parameter.annotation, "__metadata__", ()))


def _sampling_flag(name: str, declared: FieldInfo) -> inspect.Parameter:
    # A flag that may be given several times names one value: --banned-token.
    single = name.removesuffix("s") if _plain(declared.annotation)[1] else name
    flag = "-n" if name == "n" else f"--{single.replace('_', '-')}"
    return parameter(name, declared, typer.Option(flag, help=declared.description, show_default=False))


def parameter(name: str, declared: FieldInfo, option: Any, *, repeatable: bool = True) -> inspect.Parameter:
    """A command's parameter for a field: None or the given value, in a type that typer supports and the field parses.

    Args:
        name: of the parameter.
        declared: the field.
        option: the typer option.
        repeatable: give the flag once for each value of a list; else the list is one text, such as 0.9,0.1.
    """
    plain, several = _plain(declared.annotation)
    if plain is Path:
        option.parser = expanded
    kind: Any = (list[plain] if repeatable else str) if several else plain  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _plain(annotation: Any) -> tuple[type, bool]:
    """The plain type of a flag's value, and whether it may be given several times."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [each for each in arguments if each is not type(None)]
        # A number or several of them: the field reads "0.5,1.2".
        return _plain(kinds[0]) if len(kinds) == 1 else (str, False)
    if origin is tuple:
        return _plain(arguments[0])[0], True
    # Pairs are JSON and sizes such as 2GB, which the field reads.
    return (annotation if annotation in _PLAIN else str), False
