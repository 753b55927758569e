"""The model card: a run's README.md, generated from what the run holds, in Markdown."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.errors import LMError
from lm.files import read_facts
from lm.runs.run_folder import LOCK

if TYPE_CHECKING:
    from lm.config import RunConfig
    from lm.runs.run import Run

FIGURES = {
    "loss": ("loss", "nats per token", ".4f"),
    "perplexity": ("perplexity", "of a token", ".3f"),
    "perplexity_without_unknown": ("perplexity without unknown tokens", "of a token", ".3f"),
    "word_perplexity": ("word perplexity", "of a word", ".2f"),
    "bits_per_char": ("bits per character", "", ".4f"),
    "bits_per_byte": ("bits per byte", "comparable across tokenizers", ".4f"),
    "token_bits_per_byte": ("bits per byte of the tokens alone", "unknown words and white space cost nothing", ".4f"),
    "accuracy": ("accuracy", "first choice right", ".2%"),
    "top5_accuracy": ("top-5 accuracy", "", ".2%"),
}
"""Figures of a report: field → name, what it is, format."""
_SAME = {"perplexity_without_unknown": "perplexity", "token_bits_per_byte": "bits_per_byte"}
"""Figures that are equal where the tokens determine the text."""


def files(run: Run) -> list[tuple[Path, int]]:
    """The run's files with their bytes; one that vanishes under our eyes, as in a run that trains, is left out."""
    found = []
    for path in sorted(run.folder.path.rglob("*")):
        with contextlib.suppress(OSError):
            if path.is_file() and path.name != LOCK:
                found.append((path, path.stat().st_size))
    return found


def figure(value: float | None, form: str) -> str:
    """A figure in a format, in powers of ten where it is huge."""
    if value is None:
        return "–"
    return f"{value:.3e}" if abs(value) >= 1e9 else f"{value:{form}}"


def figures_of(reports: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """FIGURES without those that repeat another one in all these reports."""
    known = list(reports)
    return {
        field: shown
        for field, shown in FIGURES.items()
        if any(report.get(field) not in (None, report.get(_SAME.get(field, ""))) for report in known)
        or field not in _SAME
    }


def perplexity(loss: float) -> str:
    """exp(loss), in powers of ten where it is long: also beyond the range of a float."""
    if not math.isfinite(loss):
        return "–"
    if loss < 14:
        return f"{math.exp(loss):,.2f}"
    power, rest = divmod(loss / math.log(10), 1)
    digits = f"{10**rest:.1f}"
    return f"{digits}e{power:.0f}" if digits != "10.0" else f"1.0e{power + 1:.0f}"


def model_name(config: RunConfig) -> str:
    """What a run's model is: its type and its tokens', such as gru-char."""
    return f"{config.model.type}-{config.tokenizer.type}"


def facts(run: Run) -> dict[str, Any]:
    """What `lm show` and the card say about a run, in order."""
    record = run.record
    corpus = record["corpus"]
    size = sum(size for _, size in files(run))
    return {
        "name": run.name,
        "path": str(run.folder.path),
        "model": run.config.model.type,
        "kind": record.get("kind"),
        "parameters": record["parameters"],
        "counts": record.get("counts", 0),
        "tokenizer": run.config.tokenizer.type,
        "vocab_size": record["vocab_size"],
        "corpus": corpus["name"],
        "corpus_notes": corpus["notes"],
        "splits": corpus["splits"],
        "preset": run.config.preset,
        "initialised_from": record.get("init"),
        "plan": record.get("plan"),
        "created": record["created"],
        "inkling": record["inkling"],
        "states": ["best", *(["last"] if run.folder.has_last() else []), *run.folder.kept_checkpoints()],
        "size_bytes": size,
        "shipped": bool(record.get("shipped")),
        "options": run.config.model_dump(mode="json"),
        "reports": run.reports(),
    }


def numbers(known: dict[str, Any]) -> str:
    """What training set, in words: parameters by gradient, counts by counting; n-gram counts are all there is."""
    counted = f"{known['counts']:,} counts"
    if not known["counts"]:
        return f"{known['parameters']:,} parameters"
    return counted if known["counts"] == known["parameters"] else f"{known['parameters']:,} parameters and {counted}"


def card(run: Run) -> str:
    """The text of the card."""
    known = facts(run)
    lines = [
        f"# {known['name']}",
        "",
        f"A {known['model']} language model with {numbers(known)} over {known['vocab_size']:,} "
        f"{known['tokenizer']} tokens, trained on {known['corpus']} with Inkling {known['inkling']}."
        + (f" It is {known['kind']}." if known["kind"] else ""),
        "",
        "```",
        f'lm sample {known["name"]} --prompt "…" --temperature 0.8 --seed 1',
        f"lm eval {known['name']}",
        "```",
        "",
        "## Scores",
        "",
    ]
    if known["reports"]:
        for split, report in known["reports"].items():
            lines += [
                f"### {split}: {report['tokens']:,} tokens, {report['context']}",
                "",
                "| figure | value |",
                "|---|---|",
            ]
            for field, (name, unit, form) in figures_of([report]).items():
                lines.append(f"| {name}{f' ({unit})' if unit else ''} | {figure(report[field], form)} |")
            if report.get("floor_loss") is not None:
                lines.append(
                    f"| floor: {report['floor']} (loss, bits per byte) | {report['floor_loss']:.4f}, "
                    f"{figure(report['floor_bits_per_byte'], '.4f')} |"
                )
            lines += [
                f"| standard error of the loss | {report['standard_error']:.4f} |",
                f"| words / characters / bytes | {report['words']:,} / {report['characters']:,} / "
                f"{report['bytes']:,} |",
                f"| unknown tokens | {report['unknown_tokens']:,} ({report['unknown_rate']:.2%}) |",
                f"| text sha256 | `{report['text_sha256']}` |",
                "",
            ]
            lines += [f"{note}\n" for note in report["notes"]]
    else:
        lines += ["None yet: `lm eval` measures and records them.", ""]
    lines += ["## Corpus", "", "| split | tokens | characters | sha256 |", "|---|---|---|---|"]
    for split, part in known["splits"].items():
        lines.append(f"| {split} | {part['tokens']:,} | {part['characters']:,} | `{part['sha256']}` |")
    lines += ["", *(f"- {note}" for note in known["corpus_notes"]), "", "## Options", ""]
    for section in ("tokenizer", "model", "training"):
        lines += [f"### {section}", "", "| option | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in known["options"][section].items()]
        lines.append("")
    return "\n".join(lines)


def summary(run: Run) -> dict[str, Any]:
    """A line of `lm list`; a run that cannot be read says why in "problem"."""
    try:
        known = facts(run)
        best = known["reports"].get("valid") or {}
        return {
            "name": run.name,
            "path": known["path"],
            "model_name": model_name(run.config),
            "model": known["model"],
            "tokenizer": known["tokenizer"],
            "preset": known["preset"],
            "parameters": known["parameters"],
            "corpus": known["corpus"],
            "step": read_facts(run.folder.weights_path(run.state)).get("step"),
            "loss": best.get("loss"),
            "bits_per_byte": best.get("bits_per_byte"),
            "token_bits_per_byte": best.get("token_bits_per_byte"),
            "unknown_rate": best.get("unknown_rate"),
            "size_bytes": known["size_bytes"],
            "created": known["created"],
            "shipped": known["shipped"],
            "problem": None,
        }
    except (LMError, KeyError, TypeError, AttributeError) as error:
        return {"name": run.name, "path": str(run.folder.path), "problem": f"cannot be read: {error}"}
