"""Flags that several commands share. Flags of configuration fields take their help from the fields."""

from __future__ import annotations

import difflib
import functools
import inspect
import shlex
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

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
    """A typer option for a path; ~ is the user's folder."""
    return typer.Option(*flags, **{"parser": expanded, "metavar": "PATH", "show_default": False, **declared})


RunsDir = Annotated[
    Path, path_option("--runs-dir", envvar="INKLING_RUNS", help="Folder of the runs.", show_default=True)
]
DataDir = Annotated[
    Path | None,
    path_option("--data-dir", help="Folder of named corpora. Default: INKLING_DATA, else they are downloaded."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="Name or path of a run, NAME@last, NAME@step-500 or RUN+ADAPTER. Default: the newest run.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device: cpu, cuda, mps. Default: the CPU for models with a native kernel, else a GPU if there is one."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Weights for decoding: fp32, bf16 (half the bytes), int8 (faster, less exact), or int4 (Transformers; "
        "fewer bytes; the quality depends on the model)."
    ),
]
Unknown = Annotated[
    str | None,
    typer.Option(
        help="Policy for unknown symbols in the prompt: replace, skip, byte or error.",
        show_default=False,
    ),
]
StateName = Annotated[
    str | None, typer.Option("--state", help="Continue from a saved snapshot: lm state list RUN.", show_default=False)
]
TextColumn = Annotated[
    str | None,
    typer.Option(help="Text column of --text, if it is a table. Default: the run's.", show_default=False),
]
TextEncoding = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        help="Encoding of --text without a byte-order mark. Default: the run's.",
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


def choice(flag: str, value: str, *names: str) -> Any:
    """The value of a flag that has to be one of some names.

    Raises:
        ConfigError: it is another one.
    """
    if value not in names:
        *others, last = names
        known = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"{flag} {value!r}: use {known}.")
    return value


def unknown_policy(name: str | None) -> UnknownPolicy | None:
    """The policy that --unknown names."""
    return None if name is None else choice("--unknown", name, "replace", "skip", "byte", "error")


def decode_precision(name: str) -> DecodePrecision:
    """The precision of decoding that --precision names."""
    return choice("--precision", name, "fp32", "bf16", "int8", "int4")  # type: ignore[no-any-return]


# -- options that have no flag ---------------------------------------------------------------------------

ANY_OPTION = "SECTION.FIELD=VALUE"
"""Metavar of --set in the commands that accept every option."""
ALIASES = {
    "batch": "batch_size", "block_size": "context_length", "bsz": "batch_size", "clip": "grad_clip",
    "d_model": "hidden_size", "emsize": "embedding_size", "heads": "num_heads", "hidden": "hidden_size",
    "layers": "num_layers", "lr": "learning_rate", "n_embd": "hidden_size", "n_head": "num_heads",
    "n_layer": "num_layers", "n_layers": "num_layers", "nhid": "hidden_size", "seq_len": "bptt", "vocab_size": "size",
    "warmup": "warmup_steps", "wd": "weight_decay",
}  # fmt: skip
"""Names of options in other programs."""


def set_instead(flag: str, arguments: list[str]) -> str:
    """A hint such as --set training.learning_rate=0.1 for --lr 0.1; "" where no option has a similar name.

    Args:
        flag: the unknown flag, with its dashes.
        arguments: the whole command line.
    """
    name = flag.lstrip("-").replace("-", "_").lower()
    name = ALIASES.get(name, name)
    owners: dict[str, list[Any]] = {"training": [TrainingConfig]}
    if name not in TrainingConfig.model_fields:
        # Slower: models load torch.
        owners |= {kind: [known.resolve(each).Options for each in known.names()] for kind, known in ALL.items()}
    sections = {name: section for section, classes in owners.items() for each in classes for name in each.model_fields}
    near = difflib.get_close_matches(name, sections, n=1, cutoff=0.8)
    if not near:
        return ""
    return f". This option has no flag: use --set {sections[near[0]]}.{near[0]}={_value_of(flag, arguments)}"


def _value_of(flag: str, arguments: list[str]) -> str:
    """The value typed after a flag; VALUE where there is none."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            after = value if equals else "".join(arguments[index + 1 : index + 2])
            return "VALUE" if not after or after.startswith("--") else shlex.quote(after)
    return "VALUE"


# -- sampling: one flag for each field of SamplingOptions ----------------------------------------------

_PLAIN = (bool, int, float, str, Path)


def with_sampling(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each field of `SamplingOptions`; it gets the used ones as `sampling`."""
    fields = {name: each for name, each in SamplingOptions.model_fields.items() if name not in leave_out}

    def used(given: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value not in (None, [])}

    return with_flags([_sampling_flag(name, each) for name, each in fields.items()], "sampling", used)


def with_flags(
    added: Sequence[inspect.Parameter], name: str, collect: Callable[[dict[str, Any]], Any], *, last: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command more flags; it gets what `collect` makes of their values as `name`.

    The new flags stand after the command's first own flag; with `last`, after all that it declares.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_more_flags(**given: Any) -> None:
            values = {each.name: given.pop(each.name, None) for each in added}
            command(**given, **{name: collect(values)})

        hints = get_type_hints(command, include_extras=True)
        own = [
            each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for each in inspect.signature(command).parameters.values()
            if each.name != name
        ]
        flags = [index for index, each in enumerate(own) if not _is_argument(each)]
        place = len(own) if last else flags[0] + 1
        own[place:place] = added
        with_more_flags.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        with_more_flags.__annotations__ = {each.name: each.annotation for each in own}
        return with_more_flags

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
    """The type of a flag's value, and whether the flag is repeatable."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [each for each in arguments if each is not type(None)]
        # One number or several: the field parses "0.5,1.2".
        return _plain(kinds[0]) if len(kinds) == 1 else (str, False)
    if origin is tuple:
        return _plain(arguments[0])[0], True
    # The field parses pairs as JSON, and sizes such as 2GB.
    return (annotation if annotation in _PLAIN else str), False
