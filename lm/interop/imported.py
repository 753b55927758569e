"""Imports a model from elsewhere as a run: sampled, served, measured, exported and trained further like any other.

    folder of transformers, hf:ID, GGUF file ──► options, tokenizer, weights one at a time ──► run folder

The run has no corpus: its record has the source in place of one (`imported`). The weights keep their own format; those
that a GGUF file holds quantised become fp16.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.config import CorpusConfig, RunConfig, Section, TrainingConfig, expanded, runs_folder
from lm.errors import ConfigError, LMError, ModelSourceError, TokenizerError
from lm.files import BF16, LazyTensor, digest
from lm.interop.architectures import architecture_of, model_options
from lm.interop.gguf_file import GGUFFile, license_of, sampling_of
from lm.interop.hub import PREFIX, download
from lm.interop.model_folder import PICKLES, ModelFolder, is_model_folder
from lm.registry import TOKENIZERS
from lm.runs.record import imported_record
from lm.runs.run import Run, load
from lm.runs.run_folder import CONFIG, NAME, RunFolder, list_runs

if TYPE_CHECKING:
    from lm.corpora import Progress
    from lm.models.base import LanguageModel
    from lm.tokenizers.pretrained import PretrainedTokenizer

DEFAULT_CONTEXT = 2048
"""Positions of an imported model that are used by default, at most: time and memory grow with them."""
FINE_TUNING = TrainingConfig(batch_size=4, bptt=256, learning_rate=5e-5)
"""Options of a training that starts from an imported run: small steps keep what the model knows, and small batches take
seconds on a CPU, not minutes."""
SOURCES = "a folder of transformers, hf:OWNER/NAME or a .gguf file"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Source:
    """A model elsewhere, checked as far as is possible without its weights."""

    origin: str
    """What the user gave."""
    format: str
    config: Mapping[str, Any]
    """As config.json of transformers has it."""
    tensors: Mapping[str, LazyTensor]
    """The weights under the names of our Transformer."""
    tokenizer: Callable[[int], PretrainedTokenizer]
    """Makes the tokenizer of a model with so many tokens."""
    files: tuple[Path, ...]
    license: str | None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling options that the source gives."""


def import_model(
    source: str | Path,
    *,
    name: str | None = None,
    context: int | None = None,
    overwrite: bool = False,
    runs_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Import a model from elsewhere as a run.

    Args:
        source: a folder with config.json, safetensors and tokenizer.json; hf:ID or hf:ID@REVISION; or a GGUF file.
        name: of the run; None: that of the source.
        context: positions that the run uses; None: those of the model, at most DEFAULT_CONTEXT.
        overwrite: replace a run of that name.
        runs_dir: folder of the runs; default: INKLING_RUNS, else checkpoints.
        progress: called with the bytes written.

    Raises:
        ModelSourceError: the source is missing, damaged or not supported; nothing was written.
        RunError: the run cannot be written.
    """
    name = _name_of(str(source)) if name is None else name
    # A name with a slash would be another folder.
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a run: use letters, digits and . _ + -, as in --name NAME.")
    folder = RunFolder(runs_folder(runs_dir) / name)
    folder.check_replaceable(overwrite=overwrite)
    opened = open_source(source)
    return _write(opened, _hashes(opened.files), folder, context, overwrite=overwrite, progress=progress)


def find_or_import(source: str, *, runs_dir: Path | str | None = None, progress: Progress | None = None) -> Run:
    """The run of this name; of a source, the run that was imported from the same files, or a new import.

    Raises:
        RunNotFoundError: it is neither a run nor a source.
        LMError: as `import_model`.
    """
    runs_dir = runs_folder(runs_dir)
    # A run of that name comes before a folder of that name.
    if not is_source(source) or (NAME.fullmatch(source) and (runs_dir / source / CONFIG).is_file()):
        return load(source, runs_dir=runs_dir)
    opened = open_source(source)
    hashes = _hashes(opened.files)
    for known in list_runs(runs_dir):
        try:
            imported = known.read_record().get("imported") or {}
        except LMError:
            continue
        if imported.get("files") == hashes:
            return Run(known)
    return _write(opened, hashes, _free(runs_dir, _name_of(source)), None, progress=progress)


def is_source(text: str) -> bool:
    """Whether a text names a model to import, and not a run."""
    path = expanded(text)
    return text.startswith(PREFIX) or path.suffix == ".gguf" or (path.is_dir() and is_model_folder(path))


def open_source(source: str | Path) -> Source:
    """Open a model elsewhere; its weights are not read.

    Raises:
        ModelSourceError: it is missing, damaged or not supported.
    """
    text, path = str(source), expanded(source)
    if text.startswith(PREFIX):
        return _of_folder(download(text), text)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError:
        # The name is too long.
        is_folder = exists = False
    if text and is_folder:
        return _of_folder(path, text)
    if not text or not exists:
        raise ModelSourceError(f"There is no file or folder {text}: give {SOURCES}.")
    if path.match("*.safetensors"):
        raise ModelSourceError(f"{text} has the weights alone: give its folder, with config.json and tokenizer.json.")
    if any(path.match(end) for end in PICKLES):
        raise ModelSourceError(
            f"{text} is a pickle, which could run any code and is never opened: convert the model to safetensors with "
            "transformers (save_pretrained), and give the folder."
        )
    if not path.is_file():
        # A pipe would wait for its other end.
        raise ModelSourceError(f"{text} is neither a file nor a folder: give {SOURCES}.")
    return _of_gguf(path, text)


def _of_folder(path: Path, origin: str) -> Source:
    opened = ModelFolder(path, origin)
    # Before the tokenizer, which a model of another kind may not have.
    architecture_of(opened.config, origin)
    text, around = opened.tokenizer_files()
    return Source(
        origin=origin,
        format="transformers",
        config=opened.config,
        tensors=opened.tensors(),
        tokenizer=lambda size: _pretrained().from_json(text, around, vocab_size=size),
        files=tuple(opened.files()),
        license=opened.license,
        sampling=opened.sampling,
    )


def _of_gguf(path: Path, origin: str) -> Source:
    opened = GGUFFile(path)
    return Source(
        origin=origin,
        format="GGUF",
        config=opened.config,
        tensors=opened.tensors(),
        tokenizer=lambda size: _pretrained().from_gguf(opened.fields, vocab_size=size),
        files=(path,),
        license=license_of(opened.fields),
        sampling=sampling_of(opened.fields),
    )


def _pretrained() -> Any:
    return TOKENIZERS.resolve("pretrained")


# -- the run ------------------------------------------------------------------------------------------


def _write(
    source: Source,
    hashes: Mapping[str, str],
    folder: RunFolder,
    context: int | None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Check a source against its own configuration, and write the run."""
    options = model_options(source.config, source.origin)
    if options["num_layers"] > len(source.tensors):
        raise ModelSourceError(
            f"{source.origin} has too few tensors for the {options['num_layers']:,} layers of its options: the files "
            "do not belong together."
        )
    positions = source.config.get("max_position_embeddings") or DEFAULT_CONTEXT
    if context is not None and not 2 <= context <= positions:
        raise ConfigError(f"--context {context:,}: give 2 to {positions:,}, the positions of the model.")
    options["context_length"] = context or min(positions, DEFAULT_CONTEXT)
    vocab_size = _vocab_size(source)
    try:
        tokenizer = source.tokenizer(vocab_size)
    except TokenizerError as error:
        raise ModelSourceError(f"{source.origin}: {error}") from None
    try:
        config = RunConfig(
            corpus=CorpusConfig(source=""),
            tokenizer=Section.model_validate(tokenizer.options.model_dump(mode="json")),
            model=Section.model_validate(options),
            training=FINE_TUNING,
        ).resolved()
    except ConfigError as error:
        raise ModelSourceError(f"{source.origin} is not a model that can be built: {error}") from None
    model = _without_weights(config.model, vocab_size)
    tensors = _checked(source, model)
    stored = sorted({tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1})
    imported = {
        "source": source.origin,
        "format": source.format,
        "architecture": architecture_of(source.config, source.origin),
        "weights": ", ".join({"F32": "fp32", "F16": "fp16"}.get(name, name.lower()) for name in stored),
        "positions": positions,
        "unused_tokens": tokenizer.special.unused,
        "license": source.license,
        "sha256": next(iter(hashes.values())) if len(hashes) == 1 else digest(dict(hashes)),
        "files": dict(hashes),
    }
    tensors = {name: _finite(source.origin, name, tensor) for name, tensor in tensors.items()}
    with folder.built(overwrite=overwrite) as partial:
        partial.create(imported_record(config, model, imported, source.sampling), tokenizer)
        partial.write_tensors(_watched(tensors, progress), step=None)
        # The card has the name of the finished folder.
        Run(partial).save_card(name=folder.name)
    return Run(folder)


def _vocab_size(source: Source) -> int:
    """The rows of the embedding."""
    embedding = source.tensors.get("embed_tokens.weight")
    if embedding is None:
        raise ModelSourceError(f"{source.origin} lacks the tensor embed_tokens.weight: download it again.")
    said = source.config.get("vocab_size")
    if said not in (None, embedding.shape[0]):
        raise ModelSourceError(
            f"{source.origin}: the embedding has {embedding.shape[0]:,} tokens, and config.json says {said:,}: the "
            "files do not belong together."
        )
    return embedding.shape[0]


def _without_weights(section: Section, vocab_size: int) -> LanguageModel:
    """The model with shapes alone, in no memory."""
    import torch

    from lm.models.base import build_model

    with torch.device("meta"):
        return build_model(section, vocab_size)


def _checked(source: Source, model: LanguageModel) -> dict[str, LazyTensor]:
    """The tensors of a source, if they are exactly those of the model.

    Raises:
        ModelSourceError: one is missing, too much, or has another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kind = architecture_of(source.config, source.origin)
    if missing := sorted(expected.keys() - source.tensors.keys()):
        raise ModelSourceError(
            f"{source.origin} lacks the tensor {missing[0]} of a {kind} with these options: download it again."
        )
    if more := sorted(source.tensors.keys() - expected.keys()):
        raise ModelSourceError(
            f"{source.origin} has the tensor {more[0]}, which no {kind} of ours has, so it cannot be imported."
        )
    for name, shape in expected.items():
        if source.tensors[name].shape != shape:
            found = source.tensors[name].shape
            raise ModelSourceError(
                f"{source.origin}: the tensor {name} is {found}, and its options make it {shape}: the files do not "
                "belong together."
            )
    return {name: source.tensors[name] for name in expected}


def _finite(origin: str, name: str, tensor: LazyTensor) -> LazyTensor:
    """The tensor, which is refused as it is read if a value is not a finite number."""

    def read() -> Any:
        # Values too large for fp16 are found below.
        with np.errstate(over="ignore", invalid="ignore"):
            array = tensor.read()
        exponent = 0x7F80  # of bf16, whose bits the array has
        if not ((array & exponent) != exponent if tensor.dtype == BF16 else np.isfinite(array)).all():
            raise ModelSourceError(
                f"{origin}: the tensor {name} has values that are not finite numbers (NaN or infinity): copy or "
                "download it again."
            )
        return array

    return LazyTensor(tensor.dtype, tensor.shape, read)


def _watched(tensors: Mapping[str, LazyTensor], progress: Progress | None) -> Mapping[str, LazyTensor]:
    """The tensors, whose bytes are reported as they are read."""
    if progress is None:
        return tensors
    total, done = sum(tensor.size for tensor in tensors.values()), 0

    def watched(tensor: LazyTensor) -> LazyTensor:
        def read() -> Any:
            nonlocal done
            array = tensor.read()
            done += tensor.size
            progress("importing", done, total)
            return array

        return LazyTensor(tensor.dtype, tensor.shape, read)

    return {name: watched(tensor) for name, tensor in tensors.items()}


def _hashes(files: tuple[Path, ...]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    found = {}
    for path in files:
        total = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    total.update(block)
        except OSError as error:
            raise ModelSourceError(f"{path} cannot be read: {error.strerror or error}.") from None
        found[path.name] = total.hexdigest()
    return found


def _name_of(source: str) -> str:
    """The name of a run for a source."""
    text = source.removeprefix(PREFIX).partition("@")[0] if source.startswith(PREFIX) else str(expanded(source))
    # Not resolved: a link has its own name, and may be a loop.
    path = Path(text) if source.startswith(PREFIX) else Path(os.path.abspath(text))
    base = path.stem if path.suffix == ".gguf" else path.name
    return re.sub(r"[^\w.+-]+", "-", base).lstrip("-.+") or "imported"


def _free(runs_dir: Path, name: str) -> RunFolder:
    """The first of NAME, NAME-2, NAME-3, … that is free."""
    numbered = (RunFolder(runs_dir / (name if number == 1 else f"{name}-{number}")) for number in range(1, 1_000_000))
    return next(folder for folder in numbered if not folder.taken)
