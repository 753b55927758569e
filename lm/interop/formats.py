"""The formats of exports: name, module, precisions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.interop.exported import Exported
    from lm.runs.run import Run


@dataclass(frozen=True)
class Format:
    """A format."""

    module: str
    """Its `export` writes a run; imported when used."""
    precisions: tuple[str, ...]
    """Of the weights in the file, the default first."""
    suffix: str | None = None
    """Of the name, for a format that is one file; None: a folder."""

    def name_for(self, run: str, to: str) -> str:
        """The default name of what is written."""
        return run + (f"-{to}" if self.suffix is None else self.suffix)


FORMATS: Mapping[str, Format] = {
    "hf": Format("lm.interop.huggingface", ("fp32", "fp16")),
    "peft": Format("lm.interop.peft_adapter", ("fp32",)),
    "gguf": Format("lm.interop.gguf", ("fp32", "fp16", "q8_0")),
    "onnx": Format("lm.interop.onnx", ("fp32", "fp16", "int8")),
    "html": Format("lm.interop.html", ("int8",), ".html"),
}


def export(
    run: Run, path: Path, to: str = "hf", precision: str | None = None, *, data_dir: Path | None = None
) -> Exported:
    """Write a run for another program, and prove it there.

    Args:
        run: that is written.
        path: a new file or folder.
        to: a key of FORMATS.
        precision: of the weights in the file; None: the format's default.
        data_dir: folder of the named corpora, for the text of the proof.

    Raises:
        ConfigError: the format does not have the precision.
        UnsupportedExportError: the format cannot hold the model; the message names what exports.
        MissingExtraError: a package is not installed.
        RunError: there is something at `path`, or the losses of the two programs differ.
    """
    known = FORMATS[to].precisions
    if precision is not None and precision not in known:
        raise ConfigError(f"--precision {precision}: the format {to} has {' and '.join(known)}.")
    done: Exported = importlib.import_module(FORMATS[to].module).export(
        run, path, precision or known[0], data_dir=data_dir
    )
    return done
