"""One script for a machine with a GPU: results equal those of the CPU, speed, and quality, in at most ten minutes.

    python -m tests.gpu                              # or: make gpu
    python -m tests.gpu --nanogpt ../nanoGPT --data ../data --out build/gpu
    python -m tests.gpu --dry-run                    # everything tiny on the pretended GPU: make gpu-dry
    python -m tests.gpu --only equality words --minutes 4

Each part runs in a process of its own with a time limit. A part that fails or is too slow keeps the tables that it
finished, and the next part starts. Results: gpu.json and gpu.md in the output folder.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARES = {"equality": 0.12, "levels": 0.12, "throughput": 0.24, "decode": 0.08, "quality": 0.18, "words": 0.26}
"""The parts in order, and their shares of the time."""
GRACE_SECONDS = 10.0
"""After its time limit, until a part is killed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, or with --part one of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--data", type=Path, help="folder of tiny-shakespeare and wikitext-2; default: INKLING_DATA")
    parser.add_argument("--only", nargs="+", choices=SHARES, metavar="PART", help=f"some of {', '.join(SHARES)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the pretended GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        return run_part(options)
    shares = {name: share for name, share in SHARES.items() if options.only is None or name in options.only}
    begun, outcomes = time.perf_counter(), dict[str, dict[str, Any]]()
    for name, share in shares.items():
        left = options.minutes * 60 - (time.perf_counter() - begun)
        later = sum(part for other, part in shares.items() if other not in outcomes)
        # What an earlier part left over goes to the later ones.
        outcomes[name] = start_part(name, left * share / later, options)
        print(f"{name}: {outcomes[name]['status']}, {outcomes[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
        write(options.out, outcomes, options)
    print(options.out / "gpu.md")
    return int(any(outcome["status"] != "done" for outcome in outcomes.values()))


def start_part(name: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """A part in its own process: its status, time and what it saved."""
    path = options.out / f"part-{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu", "--part", name, "--seconds", str(seconds), "--out", str(options.out)]
    command += [] if options.nanogpt is None else ["--nanogpt", str(options.nanogpt)]
    command += [] if options.data is None else ["--data", str(options.data)]
    command += ["--dry-run"] if options.dry_run else []
    begun = time.perf_counter()
    with (options.out / f"part-{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds + GRACE_SECONDS)
            status = "done" if code == 0 else f"failed: {_last_line(Path(log.name))}"
        except subprocess.TimeoutExpired:
            # With its own children, such as a compiler's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"ended after {seconds:.0f} s"
    saved = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {"status": status, "seconds": time.perf_counter() - begun, **saved}


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def run_part(options: argparse.Namespace) -> int:
    """In the part's own process: run it, and save after each table."""
    if options.dry_run:
        from tests.pretended_gpu import gpu

        with gpu.pretended():
            return _run_part(options)
    return _run_part(options)


def _run_part(options: argparse.Namespace) -> int:
    from tests.gpu import parts

    warnings.simplefilter("ignore")
    part = parts.PARTS[options.part]
    path = options.out / f"part-{options.part}.json"

    def save(record: Any) -> None:
        whole = path.with_suffix(".new")
        whole.write_text(json.dumps(asdict(record)), "utf-8")
        whole.replace(path)

    with tempfile.TemporaryDirectory(prefix="inkling-gpu-") as name:
        folder = Path(name)
        os.environ.setdefault("INKLING_CACHE", str(options.out / "cache"))
        texts: dict[str, Any] = {}
        if options.dry_run:
            texts = dict.fromkeys(("text", "words"), str(_dry_text(folder)))
            _make_small()
        elif options.data is not None:
            texts = {"data_dir": options.data}
        job = parts.Job(
            options.seconds, folder, save, dry=options.dry_run, nanogpt=options.nanogpt, **texts
        )  # fmt: skip
        job.record.options = {"device": parts.device_name()}
        try:
            part(job)
        except Exception as error:
            traceback.print_exc()
            message = str(error).splitlines() or [""]
            print(f"{type(error).__name__}: {message[0]}")
            return 1
        save(job.record)
    return 0


def _dry_text(folder: Path) -> Path:
    path = folder / "words.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "hen"]
    lines = (" ".join(words[(i * i + j * 7) % 11] for j in range(9)) + "\n" for i in range(200))
    path.write_text("".join(lines), "utf-8")
    return path


def _make_small() -> None:
    """A reference network and a sample that take no seconds on the pretended GPU."""
    from lm.generation.options import SamplingOptions
    from lm.jobs import report, speed

    report.SAMPLE = SamplingOptions(max_tokens=4)
    speed.GPU_ROWS, speed.REFERENCE_SECONDS = 2, 0.05


def write(out: Path, outcomes: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """gpu.json and gpu.md from the outcomes so far."""
    from benchmarks.machine import save
    from benchmarks.report import measured, table, verdict, wanted

    record = {"dry_run": options.dry_run, "versions": _versions(), "parts": outcomes}
    save("gpu", record, out=out / "gpu.json")
    claims = [{**claim, "part": name} for name, each in outcomes.items() for claim in each.get("claims", ())]
    devices = sorted({each["options"]["device"] for each in outcomes.values() if "options" in each})
    lines = [f"# Results on a GPU: {', '.join(devices) or 'none'}\n\n"]
    if options.dry_run:
        lines.append("**A dry run on a pretended GPU: no figure here means anything.**\n\n")
    lines.append(table([{"part": n, "status": e["status"], "seconds": e["seconds"]} for n, e in outcomes.items()]))
    if claims:
        lines.append("\n## Targets\n\n")
        lines.append(
            table([{"target": c["what"], "wanted": wanted(c), "measured": measured(c), "": verdict(c)} for c in claims])
        )
    for name, each in outcomes.items():
        lines.append(f"\n## {name}\n")
        lines += [f"\nNot here: {missing}\n" for missing in each.get("missing", ())]
        for content in each.get("tables", ()):
            note = f" ({content['note']})" if content["note"] else ""
            rows = table(content["rows"]) if content["rows"] else "nothing measured\n"
            lines.append(f"\n**{content['title']}**{note}\n\n{rows}")
    (out / "gpu.md").write_text("".join(lines), "utf-8")


def _versions() -> dict[str, str]:
    from benchmarks.machine import versions

    return versions("numpy", "torch", "transformers")


if __name__ == "__main__":
    sys.exit(main())
