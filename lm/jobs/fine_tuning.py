"""The end report of a fine-tuning: base, tuned model, best model from scratch and floor on the same held-out text.

All figures are bits per byte of the validation split, the only ones that are comparable between tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lm.corpora import PreparedCorpus
from lm.corpora.leaks import WINDOW_CHARACTERS, is_leak
from lm.device import TO_USE, enough_memory
from lm.errors import LMError
from lm.evaluation.floor import overlap
from lm.evaluation.perplexity import score
from lm.evaluation.report import FineTuning, Report
from lm.evaluation.seen import Signs, signs_of_seen_text
from lm.runs.run import Run, load
from lm.runs.run_folder import list_runs
from lm.runs.training_text import cached_text

QUOTED = 60
"""Characters of a passage in a warning."""
Watch = Callable[[int, int], None]


def report_fine_tuning(run: Run, report: Report, *, base: Run | None, device: str, progress: Watch) -> FineTuning:
    """The comparison of a fine-tuned run with its base and with runs from scratch.

    Args:
        run: with an entry "init" in its record.
        report: of its best weights on the validation split.
        base: that it started from; None: found by the name in the record.
        device: of the base, where it is found by name.
        progress: called with tokens done and in all, for each measurement.
    """
    name, best = str(run.record["init"]), best_from_scratch(run)
    facts: dict[str, Any] = {
        "base": name,
        "tuned_bits_per_byte": report.bits_per_byte,
        "scratch": best[0] if best else None,
        "scratch_bits_per_byte": best[1] if best else None,
        "floor_bits_per_byte": report.floor_bits_per_byte,
    }
    try:
        if base is None:
            base = load(name, runs_dir=run.folder.path.parent, device=device)
        # Another object, whose weights do not stay in memory.
        opened = Run(base.folder, base.checkpoint, device=device)
        facts |= _measure_base(opened, name, run.own_text(), progress)
    except LMError as error:
        facts["note"] = f"The base was not measured: {error}"
    return FineTuning.model_validate(facts)


def best_from_scratch(run: Run) -> tuple[str, float] | None:
    """The name and the bits per byte of the best run in the same folder that learned this corpus and nothing else."""
    corpus, found = run.record["corpus"]["sha256"], []
    for folder in list_runs(run.folder.path.parent):
        other = Run(folder)
        try:
            record = other.record
            if record.get("init") or (record.get("corpus") or {}).get("sha256") != corpus:
                continue
            bits = (other.reports().get("valid") or {}).get("bits_per_byte")
        except LMError:
            # A run that cannot be read is none to compare with.
            continue
        if bits is not None:
            found.append((folder.name, float(bits)))
    return min(found, key=lambda each: each[1], default=None)


def _measure_base(base: Run, name: str, corpus: PreparedCorpus, progress: Watch) -> dict[str, Any]:
    """The fields of `FineTuning` about the base."""
    part = corpus.splits["valid"]
    with enough_memory(TO_USE):
        loss = score(base.model, part.ids, marks=part.marks, progress=progress).loss
        facts: dict[str, Any] = {"base_bits_per_byte": part.counts.bits_per_byte(loss)}
        known = _overlaps(base, corpus)
        if known is not None:
            facts |= known
        else:
            facts |= _signs(signs_of_seen_text(base.model, corpus, progress=progress), name, part.marks is not None)
    for field, whose in (("base_training_overlap", "training text"), ("base_overlap", "held-out text")):
        share = facts.get(field)
        if share is not None and is_leak(share, math.ceil(part.counts.characters / WINDOW_CHARACTERS)):
            facts["warning"] = f"{name} has seen your {whose}: {share:.1%} of it stands in its own training text." + (
                " These figures are too good." if field == "base_overlap" else ""
            )
    return facts


def _signs(signs: Signs, name: str, is_conversations: bool) -> dict[str, Any]:
    """The fields of `FineTuning` about the signs that the base has seen the text."""
    found = signs.advantage
    passages = signs.training_passages, signs.held_out_passages
    facts: dict[str, Any] = {}
    if not is_conversations:
        facts |= {"base_passages": len(passages[0]), "base_held_out_passages": len(passages[1])}
    if found is not None:
        facts |= {"base_advantage": found.bits_per_byte, "base_advantage_error": found.standard_error}
    if signs.has_passages:
        longest = max((*passages[0], *passages[1]), key=len)
        facts["warning"] = (
            f"{name} has seen your text: its first choices write {sum(map(len, passages)):,} passages of it word for "
            f"word, {len(passages[1]):,} of them held out, such as {_quoted(longest)}. These figures are too good."
        )
    elif found is not None and found.is_seen:
        facts["warning"] = (
            f"{name} has likely seen your training text: there it is {found.bits_per_byte:.2f} "
            f"(± {found.standard_error:.2f}) bits per byte better than on the held-out text, beyond what "
            "n-gram counts explain. If it has seen the held-out text too, these figures are too good."
        )
    elif found is not None:
        facts["note"] = f"No sign that {name} has seen this text. A text that it read once among many leaves none."
    else:
        facts["note"] = f"Whether {name} has seen this text was not tested: too few of its tokens were scored."
    return facts


def _quoted(text: str) -> str:
    """The beginning of a passage in one line."""
    line = " ".join(text.split())
    return f"“{line[:QUOTED]}{'…' if len(line) > QUOTED else ''}”"


def _overlaps(base: Run, corpus: PreparedCorpus) -> dict[str, Any] | None:
    """The shares of the splits that stand in the training text of the base; None if that is not known in full."""
    known = base.record.get("corpus")
    if not known or base.record.get("init"):
        return None
    text = cached_text(known, base.tokenizer)
    train, valid = corpus.splits["train"], corpus.splits["valid"]
    if text is None or (text.splits["train"].marks is None) != (train.marks is None):
        return None
    return {"base_training_overlap": overlap(text, train), "base_overlap": overlap(text, valid)}
