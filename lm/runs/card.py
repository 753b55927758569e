"""The model card: a run's README.md in Markdown; and the facts and figures that `lm show` and `lm list` give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm.config import RunConfig
from lm.evaluation.report import FineTuning
from lm.files import read_facts
from lm.runs.run_folder import RunFolder

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
"""Figures of a report: field → name, unit or meaning, format."""
MEANINGS = {
    "loss": ("Average loss of a token. Lower is better.", "tokens"),
    "perplexity": (
        "exp(loss): the model chooses among this many equally likely tokens. Compare only models with the same "
        "tokenizer.", "tokens",
    ),
    "perplexity_without_unknown": ("Perplexity without the unknown tokens.", "tokens"),
    "word_perplexity": ("Perplexity of a word, for any tokenizer.", "words"),
    "bits_per_char": ("Bits to encode a character.", "characters"),
    "bits_per_byte": ("Bits to encode a byte of the file. Comparable between all models.", "bytes"),
    "token_bits_per_byte": ("Bits per byte without the spelling of unknown words and white space.", "bytes"),
    "accuracy": ("How often the next token was the model's first choice.", "tokens"),
    "top5_accuracy": ("How often it was among the first five choices.", "tokens"),
}  # fmt: skip
"""Figures of a report: field → meaning, denominator."""
_SAME = {"perplexity_without_unknown": "perplexity", "token_bits_per_byte": "bits_per_byte"}
"""Figures that are equal if the tokens determine the text."""


def figure(value: float | None, form: str) -> str:
    """A figure in a format, in powers of ten if it is huge."""
    if value is None:
        return "–"
    return f"{value:.3e}" if abs(value) >= 1e9 else f"{value:{form}}"


def figures_of(reports: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """FIGURES without those that repeat another one in all these reports."""
    known = list(reports)
    return {
        field: labels
        for field, labels in FIGURES.items()
        if any(report.get(field) not in (None, report.get(_SAME.get(field, ""))) for report in known)
        or field not in _SAME
    }


def perplexity(loss: float) -> str:
    """exp(loss), in powers of ten if it is long; it may be too large for a float."""
    if not math.isfinite(loss):
        return "–"
    if loss < 14:
        return f"{math.exp(loss):,.2f}"
    power, rest = divmod(loss / math.log(10), 1)
    digits = f"{10**rest:.1f}"
    return f"{digits}e{power:.0f}" if digits != "10.0" else f"1.0e{power + 1:.0f}"


def model_name(config: RunConfig) -> str:
    """Types of a run's model and tokenizer, such as gru-char."""
    return f"{config.model.type}-{config.tokenizer.type}"


def run_facts(
    folder: RunFolder, record: dict[str, Any], config: RunConfig, reports: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The facts that `lm show` and the card give, in order.

    Args:
        folder: of the run.
        record: the content of its `config.json`.
        config: all options.
        reports: by split.
    """
    corpus = record["corpus"]
    return {
        "name": folder.path.name,
        "path": str(folder.path),
        "model": config.model.type,
        "kind": record.get("kind"),
        "parameters": record["parameters"],
        "counts": record.get("counts", 0),
        "tokenizer": config.tokenizer.type,
        "vocab_size": record["vocab_size"],
        "corpus": corpus["name"],
        "corpus_notes": corpus["notes"],
        "splits": corpus["splits"],
        "imported": record.get("imported"),
        "sampling": record.get("sampling") or {},
        "preset": config.preset,
        "initialised_from": record.get("init"),
        "base": _base(record),
        "teacher": _teacher(record),
        "precision": record.get("precision"),
        "plan": record.get("plan"),
        "created": record["created"],
        "inkling": record["inkling"],
        "states": ["best", *(["last"] if folder.has_last() else []), *folder.kept_checkpoints()],
        "size_bytes": sum(size for _, size in folder.files()),
        "shipped": bool(record.get("shipped")),
        "options": config.model_dump(mode="json"),
        "reports": reports,
    }


def _base(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The base of an adapter run, and the size of the adapters; None for other runs."""
    base = record.get("base")
    if base is None:
        return None
    return {**base, "adapter_parameters": record["adapter_parameters"], "rank": record["config"]["training"]["lora"]}


def _teacher(record: Mapping[str, Any]) -> str | None:
    """The run that a run learned from, or what it was."""
    teacher = record.get("teacher")
    return None if teacher is None else teacher["run"] or f"an {teacher['kind']}"


def numbers(facts: dict[str, Any]) -> str:
    """The size of a model, such as "1,200 parameters and 300 counts"; an n-gram model has counts alone."""
    counts = f"{facts['counts']:,} counts"
    if not facts["counts"]:
        return f"{facts['parameters']:,} parameters"
    return counts if facts["counts"] == facts["parameters"] else f"{facts['parameters']:,} parameters and {counts}"


def _about_base(base: Mapping[str, Any] | None) -> list[str]:
    """What the card says of the base of an adapter run."""
    if base is None:
        return []
    return [
        f"It is a LoRA adapter of rank {base['rank']} over the run {base['run']} ({base['checkpoint']}), with "
        f"{base['adapter_parameters']:,} parameters. The weights of the base are not in its files: their hash must be "
        f"`{base['weights_sha256']}`.",
        "",
    ]


def model_card(facts: dict[str, Any]) -> str:
    """The text of the card, from `run_facts`."""
    lines = [
        f"# {facts['name']}",
        "",
        f"A {facts['model']} language model with {numbers(facts)} over {facts['vocab_size']:,} "
        f"{facts['tokenizer']} tokens, {origin(facts['imported'], facts['corpus'])} with Inkling {facts['inkling']}."
        + (f" It is {facts['kind']}." if facts["kind"] else "")
        + (f" It learned from {facts['teacher']} as well." if facts["teacher"] else "")
        + (f" It was trained in {facts['precision']}." if facts["precision"] else ""),
        "",
        *_about_base(facts["base"]),
        "```",
        f'lm sample {facts["name"]} --prompt "…"{"" if facts["sampling"] else " --temperature 0.8"} --seed 1',
        f"lm eval {facts['name']}{' --text FILE' if facts['imported'] else ''}",
        "```",
        "",
        *(
            [f"Sampling options, if a request gives no others: {sampling_text(facts['sampling'])}.", ""]
            if facts["sampling"]
            else []
        ),
        "## Scores",
        "",
    ]
    if facts["reports"]:
        for split, report in facts["reports"].items():
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
            if report.get("signature"):
                lines += [f"Signature: `{report['signature']}`", ""]
            lines += [f"{note}\n" for note in report["notes"]]
            lines += _fine_tuning_lines(report.get("fine_tuning"))
    else:
        lines += [
            "None: the run has no corpus. `lm eval --text FILE` measures it on a text." if facts["imported"]
            else "None yet: `lm eval` measures and records them.", "",
        ]  # fmt: skip
    if facts["imported"]:
        lines += ["## Source", "", "| | | |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in source_rows(facts["imported"])]
        lines += ["", "The text it was trained on is unknown here.", "", "## Options", ""]
    else:
        lines += ["## Corpus", "", "| split | tokens | characters | sha256 |", "|---|---|---|---|"]
        for split, part in facts["splits"].items():
            lines.append(f"| {split} | {part['tokens']:,} | {part['characters']:,} | `{part['sha256']}` |")
        lines += ["", *(f"- {note}" for note in facts["corpus_notes"]), "", "## Options", ""]
    for section in ("tokenizer", "model", "training"):
        lines += [f"### {section}", "", "| option | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in facts["options"][section].items()]
        lines.append("")
    return "\n".join(lines)


def _fine_tuning_lines(content: dict[str, Any] | None) -> list[str]:
    """The comparison of a fine-tuned run, as lines of the card."""
    if content is None:
        return []
    found = FineTuning.model_validate(content)
    lines = ["Fine-tuning, on this text:", "", "| model | bits per byte | |", "|---|---|---|"]
    lines += [f"| {name} | {figure(bits, '.4f')} | {remark} |" for name, bits, remark in found.rows()]
    return [*lines, "", *(f"{sentence}\n" for sentence in (found.warning, found.note) if sentence)]


def origin(imported: Mapping[str, Any] | None, corpus: str) -> str:
    """How a model came to be: what it was trained on, or where it is from."""
    return f"trained on {corpus}" if imported is None else f"imported from {imported['source']}"


def source_rows(imported: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """What the record says about the source of an imported run: names, values and notes."""
    if imported is None:
        return []
    unused = imported["unused_tokens"]
    return [
        ("imported from", imported["format"], imported["source"]),
        ("architecture", imported["architecture"], ""),
        ("weights", imported["weights"], f"{unused:,} of the tokens only fill up the vocabulary" if unused else ""),
        ("positions", f"{imported['positions']:,}", "the longest text that the model knows"),
        ("licence", imported["license"] or "–", "" if imported["license"] else "not named by the source"),
        ("sha256", f"{imported['sha256'][:12]}…", imported["sha256"]),
    ]


def sampling_text(sampling: Mapping[str, Any]) -> str:
    """Sampling options in a line: temperature 0.7, top_p 0.8."""
    return ", ".join(f"{name} {value:g}" for name, value in sampling.items())


def run_summary(facts: dict[str, Any], weights: Path) -> dict[str, Any]:
    """A line of `lm list`, from `run_facts` and the path of the weights."""
    best = facts["reports"].get("valid") or {}
    copied = (
        "name",
        "path",
        "model",
        "tokenizer",
        "preset",
        "parameters",
        "corpus",
        "size_bytes",
        "created",
        "shipped",
    )
    figures = ("loss", "bits_per_byte", "token_bits_per_byte", "unknown_rate", "text_sha256")
    return {
        **{name: facts[name] for name in copied},
        **{name: best.get(name) for name in figures},
        "model_name": f"{facts['model']}-{facts['tokenizer']}",
        "base": None if facts["base"] is None else facts["base"]["run"],
        "step": read_facts(weights).get("step"),
        "problem": None,
    }
