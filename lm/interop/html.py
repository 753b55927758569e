"""A run as one HTML file that generates text in a browser, without a network.

The file holds int8 weights, the tokenizer, the sampler and a page. Its JavaScript computes what the native int8 decoder
computes (html_assets/kernels.js), so that a seed gives the text of `lm sample RUN --precision int8`.

parts of the kernel, tokenizer ──► JSON and one compressed block of arrays ──► html_assets/page.html with all scripts
"""

from __future__ import annotations

import base64
import hashlib
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
from lm.generation.options import NEUTRAL, SamplingOptions
from lm.interop.exported import MAX_DIFFERENCE, Exported, Proof, proof_text
from lm.interop.hub import PREFIX as HUB
from lm.kernels.counts import CountArrays
from lm.kernels.decoding import Arrays, Kernel, Parts, int8_codes
from lm.registry import KERNELS
from lm.runs.card import origin
from lm.runs.run import Run
from lm.tokenizers import Tokenizer
from lm.version import __version__

ASSETS = Path(__file__).parent / "html_assets"
ENGINE = ("product.js", "kernels.js", "tokenizers.js", "sampler.js", "engine.js")
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
PROOF_WEIGHTS = 1 << 36
"""Weights times tokens of a proof, at most: the page reads a text token by token."""
MIN_PROOF_TOKENS = 200
ROW_BYTES = 16
"""A row of int8 begins at a multiple of these bytes in the block of arrays; `ROW` in html_assets/product.js."""
COMPRESSION = 6
PART_CHARACTERS = 1 << 22
"""Of base64 in an element of the page: a browser frees one as it reads the next."""
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
    parts = packed(block)
    proof, notes = _measure(run, content, parts, data_dir)
    proof.check(run, MAX_DIFFERENCE["int8"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page_text(run, content, parts))
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}.") from None
    return proof.exported(path, "html", "int8", path.stat().st_size, notes)


# -- the file ---------------------------------------------------------------------------------------------


def page_content(run: Run) -> tuple[dict[str, Any], bytes]:
    """The JSON values of the page, and the block of arrays that they refer to.

    Raises:
        UnsupportedExportError: see `export`.
    """
    options = run.config.model.model_dump()
    check_model(options)
    tokenizer = tokenizer_content(run.tokenizer)
    block = ArrayBlock()
    model = block.placed(model_parts(options, run.arrays))
    content = {"model": model, "tokenizer": block.placed(tokenizer), **sampling_content(run), "run": run.name}
    return {**content, "memory": block.memory}, bytes(block.content)


def tokenizer_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """What html_assets/tokenizers.js and engine.js need of a tokenizer: JSON values and arrays.

    Raises:
        UnsupportedExportError: it has no counterpart there.
    """
    return {
        "type": tokenizer.type,
        "unknown": tokenizer.options.unknown,
        "start_id": tokenizer.start_id,
        "unknown_id": tokenizer.unknown_id,
        "end_ids": tokenizer.end_ids,
        **tokenizer.to_page(),
    }


def check_model(options: Mapping[str, Any]) -> None:
    """Check that kernels.js has the kernel of a model with these options.

    Raises:
        UnsupportedExportError: it lacks a part.
    """
    kind = str(options["type"])
    lacks = f"a kernel for {kind} models" if kind not in KERNELS.names() else KERNELS.resolve(kind).lacks(options)
    if lacks:
        raise UnsupportedExportError(f"An html page does not have {lacks}: train {EXPORTS}.")


def model_parts(options: Mapping[str, Any], arrays: Arrays) -> Parts:
    """The parts of a model whose kernel kernels.js has.

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
    return parts


class ArrayBlock:
    """Collects arrays in one block of bytes; JSON refers to them. Equal arrays are stored once."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._offsets: dict[tuple[int, bytes], int] = {}
        self._widest = self._most_rows = 0

    @property
    def memory(self) -> dict[str, int]:
        """The bytes that product.js needs for the arrays, and for inputs (int16) and sums (int32) of a product."""
        return {"arrays": len(self.content), "inputs": 2 * self._widest, "sums": 4 * self._most_rows}

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
        placed: dict[str, Any] = {"shape": array.shape}
        if array.ndim == 2 and array.dtype == np.float32:
            codes, scales = int8_codes(array)
            # Scales that are computed a second time may differ in their last bit.
            if np.allclose(codes * scales[:, None], array, rtol=1e-6, atol=0):
                rows, columns = codes.shape
                stride = -(-columns // ROW_BYTES) * ROW_BYTES
                self._widest, self._most_rows = max(self._widest, stride), max(self._most_rows, rows)
                codes = np.pad(codes, ((0, 0), (0, stride - columns)))
                return {
                    **placed,
                    "type": "int8",
                    "offset": self._add(codes),
                    "stride": stride,
                    "scales": self._add(scales),
                }
        return {**placed, "type": array.dtype.name, "offset": self._add(array)}

    def _add(self, array: np.ndarray[Any, Any]) -> int:
        raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        known = len(raw), hashlib.sha256(raw).digest()
        if known not in self._offsets:
            self.content.extend(bytes(-len(self.content) % ROW_BYTES))
            self._offsets[known] = len(self.content)
            self.content.extend(raw)
        return self._offsets[known]


def sampling_content(run: Run) -> dict[str, Any]:
    """The sliders of the page, and what the command that gives the same text must say.

    Returns:
        knobs: a slider each. defaults: where it stands first, and what the command has without the flag, for a text
        and for a message. neutral: the value of the flag that switches the filter off.
        others: flags with values that switch off the run's own options that the page does not have.
    """
    sliders = {name: slider for each in FILTERS for name, slider in each.controls.items() if slider is not None}
    fields = SamplingOptions.model_fields
    of_text, of_chat = run.sampling_defaults(), run.sampling_defaults(chat=True)
    knobs = []
    for name in KNOBS:
        slider, field = sliders[name], fields[name]
        default = slider.off if field.default is None else field.default
        knobs.append(
            {
                **asdict(slider),
                "name": name,
                "defaults": {"text": of_text.get(name, default), "chat": of_chat.get(name, default)},
                "neutral": NEUTRAL.get(name),
                "help": slider.info or field.description,
            }
        )
    return {"knobs": knobs, "others": {name: NEUTRAL[name] for name in of_text if name not in KNOBS}}


def page_text(run: Run, content: Mapping[str, Any], parts: Sequence[str]) -> str:
    """The HTML of the page; `parts`: a result of `packed`."""
    report = run.reports().get("valid")
    facts = [
        f"{run.record['parameters']:,} parameters",
        _origin(run),
    ]
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
        "WEIGHTS": "".join(f'<script class="weights" type="text/plain">{part}</script>\n' for part in parts),
    }
    text = (ASSETS / "page.html").read_text("utf-8")
    before, *parts = text.split("{{")
    # In one pass: what is inserted is not searched.
    return before + "".join(values[name] + rest for name, rest in (part.split("}}", 1) for part in parts))


def _origin(run: Run) -> str:
    """How the model came to be, for others: without the folders of this machine."""
    imported = run.record.get("imported")
    if imported and not str(imported["source"]).startswith(HUB):
        imported = {**imported, "source": Path(imported["source"]).name}
    return origin(imported, run.record["corpus"]["name"])


def _scripts(*names: str) -> str:
    return "".join((ASSETS / name).read_text("utf-8") for name in names)


def _json(content: Any) -> str:
    """JSON that cannot end the element that it is in."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def packed(block: bytes) -> list[str]:
    """The block of arrays, deflated, in pieces of base64."""
    whole = zlib.compress(block, COMPRESSION)
    size = PART_CHARACTERS // 4 * 3
    return [base64.b64encode(whole[begin : begin + size]).decode("ascii") for begin in range(0, len(whole), size)]


# -- the proof --------------------------------------------------------------------------------------------


def _measure(
    run: Run, content: Mapping[str, Any], parts: Sequence[str], data_dir: Path | None
) -> tuple[Proof, list[str]]:
    """The losses there and here, and what was not proved."""
    most = max(MIN_PROOF_TOKENS, PROOF_WEIGHTS // max(1, int(run.record["parameters"])))
    name, split = proof_text(run, data_dir, most=most)
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
        result = prove(found, content, parts, {"text": text, "samples": []})
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
    found: tuple[str, list[str]], content: Mapping[str, Any], parts: Sequence[str], task: Mapping[str, Any]
) -> dict[str, Any]:
    """The result of `prove` in html_assets/prove.js.

    Args:
        found: a result of `program`.
        content: of the page.
        parts: a result of `packed`.
        task: {"text": scored, "samples": a list of {"prompt", "seed", "maxTokens", "temperature", …}}.

    Raises:
        RunError: the program fails or takes too long.
    """
    arguments = f"{_json(content)}, {json.dumps(parts)}, {_json(task)}"
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
