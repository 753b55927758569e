"""An exported model, and the proof that the other program computes the same.

run ──► a format's files ──► loaded by the other program ──► loss on the text of the proof ──► Exported
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lm.corpora import TokenSplit, encode_text
from lm.errors import CorpusError, RunError
from lm.files import umask
from lm.generation.options import SamplingOptions
from lm.models.base import LanguageModel
from lm.runs.run import Run
from lm.tokenizers.base import Ids

ExportPrecision = Literal["fp32", "fp16", "int8", "q8_0"]
PROOF_TOKENS = 2000
SAMPLE_TOKENS = 100
MAX_DIFFERENCE = {"fp32": 1e-3, "fp16": 0.02, "int8": 1e-3}
"""Nats per token between the two programs; more is an error."""


@dataclass(frozen=True)
class Exported:
    """Where a model was written, and what the other program measured with it."""

    path: str
    format: str
    precision: ExportPrecision
    size_bytes: int
    program: str
    """The program that opened it, with its version; "none": there was none."""
    text: str
    """The text of the proof."""
    tokens: int
    """Tokens of the proof."""
    loss_there: float | None
    """Nats per token in the other program; None: it was not proved."""
    loss_here: float
    bits_per_byte_there: float | None
    """Spelling cost included; None if a byte has no defined cost."""
    bits_per_byte_here: float | None
    notes: tuple[str, ...] = ()
    """What the format does not hold."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def sampling(run: Run) -> dict[str, Any]:
    """How another program samples the run by default: as the run itself does, a chat if it has a chat template."""
    return {"temperature": SamplingOptions.model_fields["temperature"].default, **run.sampling_defaults(chat=True)}


def proof_text(
    run: Run, data_dir: Path | None = None, *, readable: Callable[[str], str] = str, most: int = PROOF_TOKENS
) -> tuple[str, TokenSplit]:
    """The name and the first PROOF_TOKENS tokens of the run's validation text; without that, of a sample of the run.

    Args:
        run: that is exported.
        data_dir: folder of the named corpora.
        readable: gives the text without what the other program reads otherwise.
        most: tokens, if fewer than PROOF_TOKENS: for a program that is slow.
    """
    tokenizer, most = run.tokenizer, min(most, PROOF_TOKENS)
    try:
        split = run.own_text(split="valid", data_dir=data_dir).splits["valid"]
        name, text = "validation text", tokenizer.decode(split.ids[1 : most + 1])
    except CorpusError:
        # Short samples, drawn together: a large model reads its weights once for all of them.
        drawn = run.samples(n=-(-most // SAMPLE_TOKENS), max_tokens=SAMPLE_TOKENS, seed=1, ignore_eos=True)
        name, text = "samples, as the validation text is not here", "".join(drawn)
    return name, encode_text("proof", readable(text), tokenizer)


def ids_there(run: Run, split: TokenSplit, encoded: Sequence[int], program: str) -> Ids:
    """The tokens of another program for the text of the proof, after the start token of `split`.

    Args:
        run: that is exported.
        split: the text of the proof.
        encoded: its tokens in the other program.
        program: its name.

    Raises:
        RunError: the other program gives another number of tokens.
    """
    if len(encoded) != len(split.ids) - 1:
        raise RunError(
            f"The export does not read a text as run {run.name!r} does: {len(encoded):,} tokens in {program}, "
            f"{len(split.ids) - 1:,} here. It was not kept: report this."
        )
    ids = split.ids.copy()
    ids[1:] = encoded
    return ids


@dataclass(frozen=True)
class Proof:
    """What the other program and this one measured on the same text."""

    program: str
    """The other program, with its version; "none": there was none."""
    text: str
    """Name of the text."""
    split: TokenSplit
    loss_there: float | None
    """Nats per token in the other program; None: it was not proved."""
    loss_here: float

    def check(self, run: Run, allowed: float) -> None:
        """Refuse an export that computes something else; to be called before its files are kept.

        Args:
            run: that was exported.
            allowed: nats per token by which the losses may differ.

        Raises:
            RunError: they differ by more.
        """
        if self.loss_there is not None and not abs(self.loss_there - self.loss_here) <= allowed:
            raise RunError(
                f"The export does not compute what run {run.name!r} computes: {self.loss_there:.4f} nats per token in "
                f"{self.program}, {self.loss_here:.4f} here. It was not kept: report this."
            )

    def exported(
        self, path: Path, to: str, precision: ExportPrecision, size_bytes: int, notes: Iterable[str]
    ) -> Exported:
        """The result of an export."""
        bits_per_byte = self.split.counts.bits_per_byte
        return Exported(
            path=str(path),
            format=to,
            precision=precision,
            size_bytes=size_bytes,
            program=self.program,
            text=self.text,
            tokens=self.split.counts.tokens,
            loss_there=self.loss_there,
            loss_here=self.loss_here,
            bits_per_byte_there=None if self.loss_there is None else bits_per_byte(self.loss_there),
            bits_per_byte_here=bits_per_byte(self.loss_here),
            notes=tuple(notes),
        )


class OpenedModel(LanguageModel):
    """A model in another program, for `score`; subclasses have `forward`."""

    def __init__(self, vocab_size: int, context_length: int | None) -> None:
        super().__init__(None, vocab_size)
        self._context_length = context_length

    @property
    def context_length(self) -> int | None:
        """See `LanguageModel.context_length`."""
        return self._context_length


def front_matter(run: Run, library: str, **more: str) -> str:
    """The begin of a model card on the Hugging Face Hub: what opens the model, and its licence if the source named one.

    Args:
        run: that is exported.
        library: as the Hub calls it.
        **more: other fields.
    """
    license_name = (run.record.get("imported") or {}).get("license")
    fields = {"library_name": library, "pipeline_tag": "text-generation", **more}
    if license_name:
        # As a string of JSON, a name with special characters cannot add other fields.
        fields["license"] = license_name if re.fullmatch(r"[\w.+-]+", license_name) else json.dumps(license_name)
    return "\n".join(["---", *(f"{name}: {value}" for name, value in fields.items()), "---"])


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block ends without an error.

    Raises:
        RunError: there is something at `path`, or it cannot be written.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise RunError(f"{path} exists already: give another --out, or delete it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}.") from None
    try:
        yield partial
        partial.chmod(0o777 & ~umask())
        partial.replace(path)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
