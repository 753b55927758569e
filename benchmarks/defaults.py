"""The default of `lm train TEXT --minutes M`, compared with presets at equal time, on texts that it was not tuned on.

    python -m benchmarks.defaults                            # the whole grid: hours; what is measured is kept
    python -m benchmarks.defaults --texts chat,verse --minutes 0.5 --what default,presets
    python -m benchmarks.defaults --summary                  # the table, and what is met and missed
    python -m benchmarks.defaults --summary --report         # the same, and RESULTS.md with it

A cell is a text, a time and a contender:

    default        lm train TEXT --minutes M, without further options
    old-default    the same, run by the code of another checkout (--baseline)
    preset:NAME    lm train TEXT --minutes M --preset NAME
    presets        the two presets that are strongest for the text
    floor          the n-gram model by characters; needs no time
    xz, ppmd       compressors: the size of training and validation text together, minus the training text alone

Each cell has a record, a file in the folder of records. A cell with a record is left out, so a run that was ended
continues where it was. All figures are bits per UTF-8 byte of one validation split, which is a twentieth of the text.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks import report
from benchmarks.machine import RESULTS, commit, save, versions
from benchmarks.suite import Claim, Record, Settings, Table, say
from benchmarks.texts import TEXTS, Half, Text, build
from lm.config import CorpusConfig, preset_names
from lm.corpora import open_corpus
from lm.corpora.cache import cache_folder
from lm.errors import LMError
from lm.evaluation.report import FLOOR_MARGIN
from lm.files import read_json

ROOT = Path(__file__).resolve().parents[1]
RECORDS = RESULTS / "defaults"
MINUTES = (0.5, 2.0)
"""Of all texts."""
LONG_MINUTES = 10.0
LONG_TEXTS = ("javascript", "chinese", "russian")
"""Texts that are trained on for `LONG_MINUTES` too."""
WHATS = ("default", "presets", "old-default", "floor", "xz", "ppmd")
OTHERS = {"counts": "floor", "xz": "xz", "ppmd": "ppmd"}
"""Contenders that need no time of training, by their names in `Row`."""
FLOOR_PRESET = "ngram-char"
LONG_TEXT = 3_000_000
"""Bytes from which one of the two strongest presets is one of subwords; Chinese and Japanese have one always."""
SLICE = ("chat", "javascript")
"""Texts of `make bench`, for the shorter time."""

WITHIN = 1.0
"""Percent by which the default may be worse than the best preset."""
AHEAD = 2.0
"""Percent by which the default is better than the old default, in the mean."""
RATE_END = 0.05
"""Share of the peak that the learning rate has at the end at most; a schedule ends at 0.02."""
LAST_PART = 0.8
"""Share of the plan after which the best weights are."""
LAST_PART_CELLS = 90.0
"""Percent of the cells in which they are, at least."""

Json = dict[str, Any]


class CellError(LMError):
    """A cell cannot be measured here."""


# -- the grid ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    text: str
    minutes: float | None
    """None: the contender needs no time."""
    what: str
    """One of the contenders; the two presets are two cells."""

    @property
    def label(self) -> str:
        """For progress and errors."""
        return " ".join([self.text, *([f"{self.minutes:g} min"] if self.minutes else []), self.what])

    @property
    def file(self) -> str:
        """The name of its record."""
        return f"{self.label.replace(' min', 'm').replace(' ', '-').replace(':', '-')}.json"


@dataclass(frozen=True)
class Asked:
    """What part of the grid, and where things are."""

    texts: tuple[str, ...] = ()
    """Empty: all texts; the long time for `LONG_TEXTS` alone."""
    minutes: tuple[float, ...] = ()
    """Empty: `MINUTES` and `LONG_MINUTES`."""
    whats: tuple[str, ...] = WHATS
    half: Half | None = None
    records: Path = RECORDS
    folder: Path | None = None
    """Of the texts; None: in the cache."""
    threads: int = 2
    baseline: Path | None = None
    again: bool = False
    """Measure cells that have a record once more."""


def strongest_presets(text: Text, minutes: float) -> tuple[str, str]:
    """The two presets to compare with; recorded runs of the kind of text ended lowest with them."""
    if text.name in ("chinese", "japanese"):
        return "hybrid-char", "gru-subword"
    if text.size >= LONG_TEXT:
        return "hybrid-char", "gru-subword-small" if minutes <= 1 else "gru-subword-medium"
    return "hybrid-char", "gru-char"


def grid(asked: Asked) -> list[Cell]:
    """The cells that were asked for: short times first; all contenders of a text and time one after the other."""
    names = [name for name in asked.texts or TEXTS if asked.half in (None, TEXTS[name].half)]
    cells = [Cell(name, None, what) for name in names for what in asked.whats if what in OTHERS.values()]
    for minutes in asked.minutes or (*MINUTES, LONG_MINUTES):
        for name in names:
            if minutes == LONG_MINUTES and not asked.texts and name not in LONG_TEXTS:
                continue
            for what in asked.whats:
                if what == "presets":
                    both = strongest_presets(TEXTS[name], minutes)
                    cells += [Cell(name, minutes, f"preset:{preset}") for preset in both]
                elif what not in OTHERS.values():
                    cells.append(Cell(name, minutes, what))
    return list(dict.fromkeys(cells))


def measure_grid(asked: Asked) -> list[str]:
    """Measure the cells that have no record yet, and write a record of each.

    Returns:
        A sentence for each cell, or text, that could not be measured.
    """
    cells = [cell for cell in grid(asked) if asked.again or not (asked.records / cell.file).is_file()]
    failures: dict[str, None] = {}
    folder = asked.folder or cache_folder() / "benchmark-texts"
    minutes = sum(cell.minutes or 0 for cell in cells)
    say(f"{len(cells)} cells to measure, {minutes:g} minutes of training; records in {asked.records}")
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as scratch:
        for number, cell in enumerate(cells, 1):
            try:
                path = build(TEXTS[cell.text], folder)
                record = measure(cell, path, asked, Path(scratch))
            except LMError as error:
                failures[str(error)] = None
                say(f"  [{number}/{len(cells)}] {error}")
                continue
            save("defaults-cell", record, asked.records / cell.file)
            say(f"  [{number}/{len(cells)}] {cell.label}: {record['best']['bits_per_byte']:.4f} bits per byte")
    return list(failures)


# -- one cell ----------------------------------------------------------------------------------------


def measure(cell: Cell, path: Path, asked: Asked, scratch: Path) -> Json:
    """The record of a cell.

    Args:
        cell: what to measure.
        path: of its text.
        asked: threads, and the checkout of the old default.
        scratch: an empty folder, or one of earlier cells.

    Raises:
        CellError: the training failed, or what it needs is not here.
    """
    text = TEXTS.get(cell.text)
    facts: Json = {
        "cell": asdict(cell), "half": text.half if text else None, "text_bytes": path.stat().st_size,
        "text_sha256": text.sha256 if text else None, "threads": asked.threads,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    if cell.what in COMPRESSORS:
        return {**facts, **_compressed(cell, path)}
    checkout = ROOT
    if cell.what == "old-default":
        if asked.baseline is None:
            raise CellError("The old default is left out: give its checkout with --baseline.")
        checkout = asked.baseline
    return {**facts, **_trained(cell, path, checkout, asked.threads, scratch)}


def _trained(cell: Cell, path: Path, checkout: Path, threads: int, scratch: Path) -> Json:
    """Train as a user does, by a process of the checkout, and read what the run folder and the reports say."""
    kind, _, preset = cell.what.partition(":")
    preset = FLOOR_PRESET if kind == "floor" else preset
    run = scratch / "runs" / cell.file.removesuffix(".json")
    where = ["--runs-dir", str(run.parent), "--device", "cpu", "--json"]
    length = ["--minutes", f"{cell.minutes:g}"] if cell.minutes else []
    command = ["train", str(path), *length, *(["--preset", preset] if preset else []), "--name", run.name]
    begun = time.perf_counter()
    best = last = _lm([*command, *where], checkout, threads, scratch, cell)["report"]
    seconds = time.perf_counter() - begun
    if (run / "last" / "state.json").is_file():
        last = _lm(["eval", f"{run.name}@last", "--split", "valid", *where], checkout, threads, scratch, cell)
    facts = {**_configuration(run), **_course(run)}
    shutil.rmtree(run)
    return {
        "commit": commit(checkout),
        "versions": {**versions("numpy", "torch"), "inkling": best["version"]},
        **facts,
        "seconds_given": cell.minutes * 60 if cell.minutes else None,
        "seconds_whole": seconds,
        "best": _figures(best),
        "last": _figures(last),
        "floor": {
            "loss": best["floor_loss"], "bits_per_byte": best["floor_bits_per_byte"], "what": best["floor"],
        },
        "split_sha256": best["text_sha256"],
        "split_bytes": best["bytes"],
        "context": best["context"],
        "notes": list(best["notes"]),
    }  # fmt: skip


def _figures(found: Json) -> Json:
    return {key: found[key] for key in ("step", "loss", "bits_per_byte", "standard_error")}


def _configuration(run: Path) -> Json:
    """What was chosen, from config.json."""
    record = read_json(run / "config.json")
    config = record["config"]
    return {
        "preset": config.get("preset"), "kind": record.get("kind"), "parameters": record.get("parameters"),
        "plan": record.get("plan"), "config": {key: config[key] for key in ("tokenizer", "model", "training")},
    }  # fmt: skip


def _course(run: Path) -> Json:
    """How the training went, from the files of the run; None for what a run without steps does not have."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines() if (run / "metrics.jsonl").is_file() else []
    row = json.loads(lines[-1]) if lines else {}
    place = run / "last" / "state.json"
    state = read_json(place)["train_state"] if place.is_file() else {}
    config = read_json(run / "config.json")
    planned = (config.get("plan") or {}).get("steps")
    step, best, rate = state.get("step"), state.get("best_step"), state.get("learning_rate_share")
    # A learning rate at its end shows that the plan was done, whatever number of steps it had in the beginning.
    whole = max(step or 0, 0 if rate is not None and rate <= RATE_END else planned or 0)
    return {
        "steps": step, "planned_steps": planned, "epochs": row.get("epoch"), "seconds_training": state.get("seconds"),
        "rate_end": rate, "best_step": best, "best_at": best / whole if best and whole else None,
        "stop_reason": state.get("stop_reason"),
    }  # fmt: skip


@functools.cache
def _python(checkout: Path) -> str:
    """The Python that runs the code of a checkout.

    Raises:
        CellError: there is none.
    """
    if checkout == ROOT:
        return sys.executable
    own = checkout / ".venv" / "bin" / "python"
    python = str(own) if own.is_file() else sys.executable
    # -P: not the code of the folder that this process runs in.
    asked = [python, "-P", "-c", "import lm, pathlib; print(pathlib.Path(lm.__file__).resolve().parents[1])"]
    ran = subprocess.run(asked, env=_environment(checkout, 1), capture_output=True, text=True, check=False)
    if ran.returncode or Path(ran.stdout.strip()) != checkout.resolve():
        raise CellError(f"--baseline {checkout} cannot be run by {python}: run `make demo` there first.")
    return python


def _environment(checkout: Path, threads: int, **more: str) -> dict[str, str]:
    env = Settings(threads=threads).environment(**more)
    return {**env, "PYTHONPATH": os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _lm(arguments: Sequence[str], checkout: Path, threads: int, scratch: Path, cell: Cell) -> Json:
    """What a command of the checkout's `lm` prints with --json."""
    # Tokens of one version are not read by another one.
    cache = scratch / ("cache" if checkout == ROOT else "cache-baseline")
    env = _environment(checkout, threads, INKLING_CACHE=str(cache))
    command = [_python(checkout), "-m", "cli.main", *arguments]
    ran = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        why = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
        raise CellError(f"{cell.label}: lm {arguments[0]} failed: {why}")
    found: Json = json.loads(ran.stdout)
    return found


# -- compressors -------------------------------------------------------------------------------------


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _ppmd(data: bytes) -> int:
    return len(importlib.import_module("pyppmd").compress(data, max_order=8, mem_size=1 << 28, variant="H"))


COMPRESSORS: dict[str, tuple[Callable[[bytes], int], str]] = {
    "xz": (_xz, "xz -9e"),
    "ppmd": (_ppmd, "PPMd variant H, order 8, 256 MiB"),
}


def _compressed(cell: Cell, path: Path) -> Json:
    """Bits per byte of the validation text, after the training text."""
    size, what = COMPRESSORS[cell.what]
    if cell.what == "ppmd" and importlib.util.find_spec("pyppmd") is None:
        raise CellError("PPMd is left out: pip install pyppmd.")
    splits = open_corpus(CorpusConfig(source=str(path))).splits
    train, valid = ("".join(splits[name].chunks()).encode() for name in ("train", "valid"))
    bits = 8 * (size(train + valid) - size(train)) / len(valid)
    return {"best": {"bits_per_byte": bits}, "split_bytes": len(valid), "preset": what, "notes": []}


# -- summary -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """All contenders of a text and time, in bits per byte; None for what has no record."""

    text: str
    half: Half
    minutes: float
    default: Json | None
    presets: Mapping[str, float]
    old: float | None
    counts: float | None
    """The n-gram model by characters."""
    xz: float | None
    ppmd: float | None

    @property
    def label(self) -> str:
        """Text and minutes."""
        return f"{self.text} {self.minutes:g} min"

    @property
    def bits(self) -> float | None:
        """Of the default."""
        return None if self.default is None else float(self.default["best"]["bits_per_byte"])

    @property
    def best_preset(self) -> str | None:
        """The preset with the lowest figure."""
        return min(self.presets, key=lambda name: self.presets[name], default=None)

    @property
    def over_preset(self) -> float | None:
        """Percent by which the default is worse than the best preset."""
        if self.bits is None or self.best_preset is None:
            return None
        return 100 * (self.bits / self.presets[self.best_preset] - 1)

    @property
    def ahead_of_old(self) -> float | None:
        """Percent by which the default is better than the old default."""
        return None if self.bits is None or self.old is None else 100 * (1 - self.bits / self.old)

    @property
    def floor(self) -> float | None:
        """N-gram counts of the default's tokens; without a default, of the characters."""
        return self.counts if self.default is None else self.default["floor"]["bits_per_byte"]

    @property
    def is_above_floor(self) -> bool | None:
        """Whether the floor predicts the same tokens better."""
        if self.default is None or (floor := self.default["floor"]["loss"]) is None:
            return None
        return bool(self.default["best"]["loss"] > floor + FLOOR_MARGIN)

    @property
    def rate_end(self) -> float | None:
        """The learning rate at the end, as a share of its peak."""
        return None if self.default is None else self.default["rate_end"]

    @property
    def best_at(self) -> float | None:
        """Where in the plan the best weights are."""
        return None if self.default is None else self.default["best_at"]

    @property
    def is_counting(self) -> bool:
        """Whether the default is a model without steps: it has no learning rate and no other weights."""
        return self.default is not None and self.default["planned_steps"] == 1

    @property
    def rate_ended(self) -> bool | None:
        """Whether the learning rate reached its end."""
        return True if self.is_counting else None if self.rate_end is None else self.rate_end <= RATE_END

    @property
    def best_is_late(self) -> bool | None:
        """Whether the best weights are of the last fifth of the plan."""
        return True if self.is_counting else None if self.best_at is None else self.best_at >= LAST_PART


def read_records(folder: Path) -> dict[Cell, Json]:
    """Cell → record; a record of another text than the declared one is left out."""
    found: dict[Cell, Json] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        cell = Cell(**record["cell"])
        if cell.text in TEXTS and record["text_sha256"] == TEXTS[cell.text].sha256:
            found[cell] = record
    return found


def make_rows(records: Mapping[Cell, Json], asked: Asked) -> list[Row]:
    """A row for each text and time of the grid; presets are all that have a record."""

    def bits(cell: Cell) -> float | None:
        return records[cell]["best"]["bits_per_byte"] if cell in records else None

    rows = []
    for cell in grid(replace(asked, whats=("default",))):
        presets = {
            each.what.partition(":")[2]: float(record["best"]["bits_per_byte"])
            for each, record in records.items()
            if (each.text, each.minutes) == (cell.text, cell.minutes) and each.what.startswith("preset:")
        }
        others = {key: bits(Cell(cell.text, None, what)) for key, what in OTHERS.items()}
        old = bits(replace(cell, what="old-default"))
        assert cell.minutes is not None
        half = TEXTS[cell.text].half
        rows.append(Row(cell.text, half, cell.minutes, records.get(cell), presets, old, **others))
    return rows


def make_claims(rows: Sequence[Row], name: str) -> list[Claim]:
    """The five targets for some rows; a target whose cells are not all measured says so.

    Args:
        rows: of one half.
        name: of the half.
    """

    def claim(
        what: str,
        values: Mapping[str, float | None],
        value: Callable[[Sequence[float]], float],
        target: float,
        bound: Literal["at least", "at most"],
        unit: str,
        failing: Callable[[float], bool],
    ) -> Claim:
        known = {label: each for label, each in values.items() if each is not None}
        reasons = []
        if failed := [label for label, each in known.items() if failing(each)]:
            reasons.append(f"not: {', '.join(failed)}")
        if len(known) < len(values):
            reasons.append(f"{len(known)} of {len(values)} cells measured")
        found = value(list(known.values())) if known else None
        return Claim(f"{name}: {what}", found, target, bound, unit, "; ".join(reasons))

    def yes(values: Iterable[tuple[str, bool | None]]) -> dict[str, float | None]:
        return {label: None if each is None else float(each) for label, each in values}

    return [
        claim(
            "default worse than the best preset, in any cell", {row.label: row.over_preset for row in rows},
            max, WITHIN, "at most", "%", lambda each: each > WITHIN,
        ),
        claim(
            "default better than the old default, mean", {row.label: row.ahead_of_old for row in rows},
            lambda known: sum(known) / len(known), AHEAD, "at least", "%", lambda each: each < 0,
        ),
        claim(
            "cells above the floor", yes((row.label, row.is_above_floor) for row in rows),
            sum, 0, "at most", "", bool,
        ),
        claim(
            "cells with the learning rate at its end", yes((row.label, row.rate_ended) for row in rows),
            _percent, 100, "at least", "%", lambda each: not each,
        ),
        claim(
            "cells with the best weights in the last fifth", yes((row.label, row.best_is_late) for row in rows),
            _percent, LAST_PART_CELLS, "at least", "%", lambda each: not each,
        ),
    ]  # fmt: skip


def _percent(known: Sequence[float]) -> float:
    return 100 * sum(known) / len(known)


COLUMNS: dict[str, tuple[int, Callable[[Row], str]]] = {
    "text": (10, lambda row: row.text),
    "half": (6, lambda row: row.half),
    "min": (3, lambda row: f"{row.minutes:g}"),
    "default": (7, lambda row: _fixed(row.bits, 4)),
    "preset": (6, lambda row: _fixed(row.presets[row.best_preset] if row.best_preset else None, 4)),
    "+ %": (5, lambda row: _fixed(row.over_preset, 1)),
    "old": (6, lambda row: _fixed(row.old, 4)),
    "floor": (6, lambda row: _fixed(row.floor, 4)),
    "xz": (5, lambda row: _fixed(row.xz, 3)),
    "PPMd": (5, lambda row: _fixed(row.ppmd, 3)),
    "rate": (4, lambda row: _fixed(row.rate_end, 2)),
    "best": (4, lambda row: _fixed(row.best_at, 2)),
}
"""Column of the printed table → width, and its figure."""
NOTE = (
    "Bits per byte of the validation split, weights of the best step. preset: the better one of the measured presets; "
    "+ %: default over preset; old: the old default; floor: n-gram counts of the default's tokens; rate: learning "
    "rate at the end, share of its peak; best: where in the plan the best weights are."
)


def _fixed(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def summary(asked: Asked) -> str:
    """The table and the targets, in 80 columns."""
    records = read_records(asked.records)
    rows = make_rows(records, asked)
    lines = [_line(list(COLUMNS))]
    lines += [_line([show(row) for _, show in COLUMNS.values()]) for row in rows]
    lines += ["", *textwrap.wrap(NOTE, 80)]
    wanted = grid(asked)
    missing = [cell for cell in wanted if cell not in records]
    lines += ["", f"{len(wanted) - len(missing)} of {len(wanted)} cells are measured."]
    lines += textwrap.wrap(_machines(records.values()), 80)
    if busy := sum((record.get("load") or 0) > record["threads"] + 1 for record in records.values()):
        lines.append(f"Other processes were busy at the start of {busy} cells.")
    for half in ("tune", "report"):
        if mine := [row for row in rows if row.half == half]:
            lines.append("")
            for each in make_claims(mine, half):
                facts = asdict(each)
                text = f"{each.what}: {report.measured(facts)} ({report.wanted(facts)}): {report.verdict(facts)}"
                lines += textwrap.wrap(text.replace("**", ""), 80, subsequent_indent="  ")
                lines += textwrap.wrap(each.why, 80, initial_indent="    ", subsequent_indent="    ")
    if above := [row.label for row in rows if row.bits and row.counts and row.bits > row.counts]:
        text = f"For information: above the n-gram model by characters of the whole text: {', '.join(above)}."
        lines += ["", *textwrap.wrap(text, 80)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    widths = [width for width, _ in COLUMNS.values()]
    words = [
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return " ".join(words).rstrip()


def _machines(records: Iterable[Json]) -> str:
    """What the cells were measured on."""
    found: dict[str, int] = {}
    for record in records:
        where = f"{record['machine']['cpu']}, {record['threads']} threads, commit {record['commit']}"
        found[where] = found.get(where, 0) + 1
    return "; ".join(f"{where}: {count} cells" for where, count in found.items()) or "There is no record yet."


# -- as a suite --------------------------------------------------------------------------------------


def run(settings: Settings) -> Record:
    """The default and the floor of two texts; with --full the whole grid, from its records."""
    if settings.full:
        asked = Asked(records=settings.results / "defaults", threads=settings.threads, baseline=settings.baseline)
        return suite_record(asked, settings.options(), measure_grid(asked))
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as folder:
        asked = Asked(SLICE, MINUTES[:1], ("default", "floor"), records=Path(folder), threads=settings.threads)
        return suite_record(asked, settings.options(), measure_grid(asked))


def suite_record(asked: Asked, options: Json, failures: Sequence[str] = ()) -> Record:
    """The suite's record, from the records of the cells.

    Args:
        asked: the part of the grid.
        options: how it was measured.
        failures: what could not be measured.
    """
    records = read_records(asked.records)
    rows = make_rows(records, asked)
    record = Record(options={**options, "texts": sorted({row.text for row in rows})})
    record.versions = versions("numpy", "torch", "pyppmd")
    record.missing = list(failures)
    contexts = sorted({str(each["context"]) for each in records.values() if "context" in each})
    record.notes = [f"Context rules: {', '.join(contexts)}."] if contexts else []
    table = [
        {
            "text": row.text, "half": row.half, "bytes": TEXTS[row.text].size, "minutes": row.minutes,
            "default": row.bits, "best preset": row.best_preset,
            "its figure": row.presets[row.best_preset] if row.best_preset else None, "old default": row.old,
            "floor": row.floor, "xz": row.xz, "PPMd": row.ppmd,
            "rate at the end": row.rate_end, "best at": row.best_at, "chosen": _chosen(row.default),
        }
        for row in rows
    ]  # fmt: skip
    record.tables = [Table("lm train TEXT --minutes M, bits per byte", table, NOTE)]
    record.claims = [
        claim
        for half in ("tune", "report")
        if (mine := [row for row in rows if row.half == half])
        for claim in make_claims(mine, half)
    ]
    return record


def _chosen(default: Json | None) -> str | None:
    """The default's choice in a few words."""
    if default is None:
        return None
    model = default["config"]["model"]
    size = f" of {model['hidden_size']}" if "hidden_size" in model else ""
    return default["preset"] or f"{model['type']}{size}"


# -- command line ------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, then print the summary."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.defaults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=_names, default=(), metavar="A,B", help=f"default: all ({', '.join(TEXTS)})")
    parser.add_argument(
        "--minutes", type=_numbers, default=(), metavar="M,N",
        help=f"default: 0.5,2 for all texts, 10 for {', '.join(LONG_TEXTS)}",
    )  # fmt: skip
    parser.add_argument("--what", type=_names, default=WHATS, metavar="X,Y", help=f"default: {','.join(WHATS)}")
    parser.add_argument("--half", choices=("tune", "report"), help="only texts of this half")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR", help="folder of the records")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder of the texts (default: in the cache)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: %(default)s")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="the code of the old default")
    parser.add_argument("--again", action="store_true", help="measure cells again that have a record")
    parser.add_argument("--summary", action="store_true", help="print what the records say; measure nothing")
    parser.add_argument("--report", action="store_true", help="write the figures of the cells into RESULTS.md")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.texts if name not in TEXTS]:
        parser.error(f"there is no text {unknown[0]!r}: {', '.join(TEXTS)}")
    known = {*WHATS, *(f"preset:{name}" for name in preset_names())}
    if unknown := [name for name in given.what if name not in known]:
        parser.error(f"there is no contender {unknown[0]!r}: {', '.join(WHATS)} or preset:NAME")
    asked = Asked(
        given.texts, given.minutes, given.what, given.half, given.records, given.folder, given.threads,
        given.baseline and given.baseline.expanduser().resolve(), given.again,
    )  # fmt: skip
    failures: list[str] = []
    if not given.summary:
        try:
            failures = measure_grid(asked)
        except KeyboardInterrupt:
            sys.exit("\nInterrupted: the same command continues with the cells that are left.")
    print(summary(asked))
    if given.report:
        record = suite_record(asked, {"threads": given.threads}, failures)
        print(save("defaults", asdict(record)), report.write())
    if failures:
        sys.exit("\n".join(["", "Not measured:", *failures]))


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _numbers(value: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in _names(value))
    except ValueError:
        found = ()
    if not found or not all(0 < each < 10_000 for each in found):
        raise argparse.ArgumentTypeError(f"{value!r}: give minutes above 0, such as 0.5,2")
    return found


if __name__ == "__main__":
    main()
