"""The reports of a run: `report.json`, by split; a report of other weights than the best is SPLIT@CHECKPOINT."""

from __future__ import annotations

import json
from typing import Any

from lm.config import RunConfig
from lm.errors import CorruptRunError, RunNotFoundError
from lm.evaluation.report import Report, as_measured_now
from lm.files import read_facts, read_json, write_file
from lm.registry import TOKENIZERS
from lm.runs.run_folder import REPORT, RunFolder

_NUMBERS = (
    "loss", "standard_error", "perplexity", "word_perplexity", "bits_per_char", "bits_per_byte", "accuracy",
    "top5_accuracy", "tokens", "words", "characters", "bytes", "unknown_tokens", "unknown_rate",
)  # fmt: skip
_TEXTS = ("state", "context", "text_sha256")


def read_reports(folder: RunFolder, config: RunConfig) -> dict[str, dict[str, Any]]:
    """The saved reports by split, without those of weights that training has replaced since.

    Raises:
        CorruptRunError: report.json holds something else.
    """
    path = folder.path / REPORT
    try:
        saved = read_json(path)
    except RunNotFoundError:
        return {}
    if not isinstance(saved, dict) or not all(_is_report(report) for report in saved.values()):
        raise CorruptRunError(f"{path} holds no reports: delete it, lm eval {folder.argument} writes it again.")
    # From the options in the record, so that the tokenizer itself is not read.
    options = config.tokenizer.resolve("tokenizer")
    lossless = TOKENIZERS.resolve(options.type).lossless and options.unknown != "skip"
    return {
        key: as_measured_now(report, lossless=lossless) for key, report in saved.items() if _is_current(folder, report)
    }


def write_report(folder: RunFolder, config: RunConfig, report: Report) -> None:
    """Add a report to `report.json`; it replaces an earlier one of the same split and checkpoint."""
    key = report.split if report.state == "best" else f"{report.split}@{report.state}"
    earlier, content = read_reports(folder, config), report.model_dump(mode="json")
    before = earlier.get(key, {})
    if report.fine_tuning is None and before.get("text_sha256") == report.text_sha256:
        # A new measurement of the same weights does not measure the base again.
        content["fine_tuning"] = before.get("fine_tuning")
    reports = {**earlier, key: content}
    write_file(folder.path / REPORT, json.dumps(reports, indent=2, ensure_ascii=False) + "\n")


def _is_report(value: Any) -> bool:
    """Whether a part of report.json has the fields that are shown; needs no torch."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), int | float) or _may_be_null(name, value) for name in _NUMBERS)
        and all(isinstance(value.get(name), str) for name in _TEXTS)
        and isinstance(value.get("step"), int | None)
        and isinstance(value.get("notes"), list)
    )


def _may_be_null(name: str, report: dict[str, Any]) -> bool:
    """Whether the figure may be null: it is unknown, or beyond the range of floats."""
    return name.endswith(("perplexity", "_per_char", "_per_byte")) and report.get(name, 0) is None


def _is_current(folder: RunFolder, report: dict[str, Any]) -> bool:
    try:
        facts = read_facts(folder.weights_path(report["state"]))
    except RunNotFoundError:
        return False
    return bool(facts.get("step") == report["step"])
