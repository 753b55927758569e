"""A run as one HTML file that generates text in a browser, without a network.

The file holds int8 weights, the tokenizer, the sampler and a page. Its JavaScript computes what the native int8 decoder
computes (html_assets/kernels.js), so that a seed gives the text of `lm sample RUN --precision int8`.

parts of the kernel, tokenizer ──► JSON and one compressed block of arrays ──► html_assets/page.html with all scripts
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import CorruptRunError, RunError, UnsupportedExportError
from lm.files import write_file
from lm.generation.distribution import log_softmax
from lm.generation.filters import FILTERS
from lm.generation.options import SamplingOptions
from lm.interop.exported import MAX_DIFFERENCE, Exported, Proof, proof_text
from lm.kernels.counts import CountArrays
from lm.kernels.decoding import Arrays, Kernel, int8_codes, rounded
from lm.registry import KERNELS
from lm.runs.run import Run
from lm.version import __version__

ASSETS = Path(__file__).parent / "html_assets"
ENGINE = ("kernels.js", "tokenizers.js", "sampler.js", "engine.js")
"""The scripts that run without a page, in their order."""
KERNELS_THERE = frozenset({"recurrent", "transformer", "ngram", "ensemble"})
"""The compiled kernels that kernels.js has."""
KNOBS = ("temperature", "top_k", "top_p", "min_p")
"""The options of the page, in its order; all have a slider in FILTERS."""
PROGRAMS = (
    ("Node.js", ("node", "nodejs"), ()),
    ("Chromium", ("chromium", "chromium-browser", "google-chrome"), ("--headless", "--disable-gpu", "--dump-dom")),
)
"""What runs JavaScript in a proof, best first: label, names of the program, options."""
PROOF_SECONDS = 300
EXPORTS = "with a preset of lm train, such as gru-char"


def export(run: Run, path: Path, precision: str = "int8", *, data_dir: Path | None = None) -> Exported:
    """Write a run as one HTML file, run its JavaScript, and measure it.

    Args:
        run: of a model whose compiled kernel kernels.js has.
        path: a new file.
        precision: of the weights in the file: int8.
        data_dir: folder of the named corpora, for the text of the proof.

    Raises:
        UnsupportedExportError: kernels.js or tokenizers.js lacks a part of the model; the message names what exports.
        DeviceError: this install has no native kernels, with which the page is compared.
        RunError: there is something at `path`, or the losses here and there differ.
    """
    if path.exists():
        raise RunError(f"{path} exists already: give another --out, or delete it.")
    content, block = page_content(run)
    text = page_text(run, content, block)
    proof, notes = _measure(run, content, block, data_dir)
    proof.check(run, MAX_DIFFERENCE["int8"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}.") from None
    return proof.exported(path, "html", "int8", path.stat().st_size, notes)


# -- the file ---------------------------------------------------------------------------------------------


def page_content(run: Run) -> tuple[dict[str, Any], bytes]:
    """The JSON values of the page, and the block of arrays that they refer to.

    Raises:
        UnsupportedExportError: see `export`.
    """
    options, tokenizer = run.config.model.model_dump(), run.tokenizer
    check_model(options)
    described = {
        "type": tokenizer.type,
        "unknown": tokenizer.options.unknown,
        "start_id": tokenizer.start_id,
        "unknown_id": tokenizer.unknown_id,
        **tokenizer.to_page(),
    }
    model, block = model_content(options, run.arrays)
    return {"model": model, "tokenizer": described, "knobs": _knobs(), "run": run.name}, block


def check_model(options: Mapping[str, Any]) -> None:
    """Check that kernels.js has the kernel of a model with these options.

    Raises:
        UnsupportedExportError: it lacks a part.
    """
    kind = str(options["type"])
    lacks = f"a kernel for {kind} models" if kind not in KERNELS.names() else KERNELS.resolve(kind).lacks(options)
    if lacks:
        raise UnsupportedExportError(f"An html page does not have {lacks}: train {EXPORTS}.")


def model_content(options: Mapping[str, Any], arrays: Arrays) -> tuple[dict[str, Any], bytes]:
    """The JSON values of a model, and the block of arrays that they refer to.

    Raises:
        UnsupportedExportError: kernels.js lacks the kernel.
        CorruptRunError: the arrays do not fit the options.
    """
    kernel: type[Kernel] = KERNELS.resolve(str(options["type"]))
    try:
        parts = kernel.parts(options, arrays, "int8")
    except (KeyError, ValueError, IndexError) as error:
        raise CorruptRunError(
            f"The weights do not fit the model's options ({error}): restore the files saved together."
        ) from None
    if parts.kernel not in KERNELS_THERE:
        raise UnsupportedExportError(f"An html page does not have the kernel {parts.kernel!r}: train {EXPORTS}.")
    block = ArrayBlock()
    return block.placed(parts), bytes(block.content)


class ArrayBlock:
    """Collects arrays in one block of bytes; JSON refers to them. Equal arrays are stored once."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._offsets: dict[bytes, int] = {}

    def placed(self, value: Any) -> Any:
        """The value for JSON, with {type, shape, offset} in place of an array.

        A matrix with rows of int8 times a scale, as `Kernel.parts` gives it, is stored so; `scales` is their offset.
        """
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, CountArrays):
            return self.placed(value.trie())
        if is_dataclass(value) and not isinstance(value, type):
            return self.placed({name: getattr(value, name) for name in value.__dataclass_fields__})
        if isinstance(value, Mapping):
            return {name: self.placed(each) for name, each in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.placed(each) for each in value]
        return value

    def _array(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        if array.ndim == 2 and array.dtype == np.float32 and np.array_equal(rounded(array), array):
            codes, scales = int8_codes(array)
            return {**self._array(codes), "scales": self._add(scales)}
        return {"type": array.dtype.name, "shape": array.shape, "offset": self._add(array)}

    def _add(self, array: np.ndarray[Any, Any]) -> int:
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        if raw not in self._offsets:
            # JavaScript reads arrays of 8-byte numbers at multiples of 8.
            self.content.extend(bytes(-len(self.content) % 8))
            self._offsets[raw] = len(self.content)
            self.content.extend(raw)
        return self._offsets[raw]


def _knobs() -> list[dict[str, Any]]:
    """The sliders of the page."""
    sliders = {name: slider for each in FILTERS for name, slider in each.controls.items() if slider is not None}
    fields = SamplingOptions.model_fields
    return [
        {
            **asdict(sliders[name]),
            "name": name,
            "value": sliders[name].off if fields[name].default is None else fields[name].default,
            "help": sliders[name].info or fields[name].description,
        }
        for name in KNOBS
    ]


def page_text(run: Run, content: Mapping[str, Any], block: bytes) -> str:
    """The HTML of the page."""
    report = run.reports().get("valid")
    facts = [f"{run.record['parameters']:,} parameters", f"trained on {run.record['corpus']['name']}"]
    if report:
        facts.append(f"{report['bits_per_byte']:.3f} bits per byte on held-out text")
    values = {
        "TITLE": escape(run.name),
        "FACTS": escape(" · ".join(facts)),
        "VERSION": escape(__version__),
        "STYLE": (ASSETS / "page.css").read_text("utf-8"),
        "ENGINE": _scripts(*ENGINE, "worker.js"),
        "PAGE": _scripts("page.js"),
        "CONTENT": _json(content),
        "WEIGHTS": _packed(block),
    }
    text = (ASSETS / "page.html").read_text("utf-8")
    before, *parts = text.split("{{")
    # In one pass: what is inserted is not searched.
    return before + "".join(values[name] + rest for name, rest in (part.split("}}", 1) for part in parts))


def _scripts(*names: str) -> str:
    return "".join((ASSETS / name).read_text("utf-8") for name in names)


def _json(content: Any) -> str:
    """JSON that cannot end the element that it is in."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _packed(block: bytes) -> str:
    return base64.b64encode(zlib.compress(block, 9)).decode("ascii")


# -- the proof --------------------------------------------------------------------------------------------


def _measure(run: Run, content: Mapping[str, Any], block: bytes, data_dir: Path | None) -> tuple[Proof, list[str]]:
    """The losses there and here, and what was not proved."""
    name, split = proof_text(run, data_dir)
    decoder = run.decoder(precision="int8")
    logits = log_softmax(decoder.prefill(decoder.open(), split.ids[:-1].tolist()).astype(np.float64))
    here = -float(np.take_along_axis(logits, split.ids[1:, None].astype(np.int64), axis=1).mean())
    there, notes = None, []
    found = program()
    if found is None:
        label = "none"
        notes.append("The page was not proved: neither node nor Chromium is on this machine.")
    else:
        label, _ = found
        text = run.tokenizer.decode(split.ids[1:])
        result = prove(found, content, block, {"text": text, "samples": []})
        if result["ids"] != split.ids[1:].tolist():
            raise RunError(f"The page's tokenizer gives other ids than that of run {run.name!r}: report this.")
        there = float(result["loss"])
    return Proof(label, name, split, there, here), notes


def program() -> tuple[str, list[str]] | None:
    """A program that runs JavaScript, with its version, and its command; None: there is none."""
    for label, names, options in PROGRAMS:
        path = next(filter(None, map(shutil.which, names)), None)
        if path is None:
            continue
        try:
            version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return f"{label} {version.strip().removeprefix('v').removeprefix(label).strip()}", [path, *options]
    return None


def prove(
    found: tuple[str, list[str]], content: Mapping[str, Any], block: bytes, task: Mapping[str, Any]
) -> dict[str, Any]:
    """The result of `prove` in html_assets/prove.js.

    Args:
        found: a result of `program`.
        content: of the page.
        block: of the page.
        task: {"text": scored, "samples": a list of {"prompt", "seed", "maxTokens", "temperature", …}}.

    Raises:
        RunError: the program fails or takes too long.
    """
    arguments = f"{_json(content)}, {json.dumps(_packed(block))}, {_json(task)}"
    result: dict[str, Any] = run_script(found, f"prove({arguments})")
    return result


def run_script(found: tuple[str, list[str]], expression: str) -> Any:
    """The JSON value of an expression, or of its promise, after the scripts of the page.

    Raises:
        RunError: the program fails or takes too long.
    """
    label, command = found
    in_browser = len(command) > 1
    call = f"Promise.resolve({expression}).then((result) => JSON.stringify(result))"
    show = "document.body.textContent = " if in_browser else "console.log"
    script = f'"use strict";\n{_scripts(*ENGINE, "prove.js")}\n{call}.then((text) => {{ {show}(text); }});\n'
    with tempfile.TemporaryDirectory() as folder:
        if in_browser:
            source = Path(folder, "proof.html")
            source.write_text(f'<!doctype html><meta charset="utf-8"><body><script>{script}</script>', "utf-8")
            sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            profile = [f"--user-data-dir={folder}/profile", f"--virtual-time-budget={PROOF_SECONDS * 1000}"]
            arguments = [*command, *sandbox, *profile, source.as_uri()]
        else:
            source = Path(folder, "proof.js")
            source.write_text(script, "utf-8")
            arguments = [*command, str(source)]
        try:
            ran = subprocess.run(arguments, capture_output=True, timeout=PROOF_SECONDS, check=True)
        except subprocess.TimeoutExpired:
            raise RunError(f"{label} did not finish the proof in {PROOF_SECONDS} seconds.") from None
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").splitlines()
            reason = next((line for line in lines if re.match(r"\w*Error\b", line)), str(error))
            raise RunError(f"{label} cannot run the page's JavaScript: {reason}") from None
    output = ran.stdout.decode("utf-8")
    if in_browser:
        from html import unescape

        output = unescape(output.partition("<body>")[2].partition("</body>")[0])
    try:
        return json.loads(output)
    except ValueError:
        raise RunError(f"{label} gave no result of the proof.") from None
