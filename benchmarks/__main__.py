"""Measure Inkling and its peers, and write the results.

    python -m benchmarks                                    # all suites in slices, about 22 minutes on 2 cores
    python -m benchmarks --full --nanogpt PATH --wlm PATH   # whole recipes
    python -m benchmarks training startup                   # some of the suites

Each suite writes a record under benchmarks/results/; then benchmarks/RESULTS.md is written again from the newest record
of each. A peer that is not here is left out, and named with how to get it.

suites:
{suites}
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.machine import RESULTS, save
from benchmarks.suite import BEST, FLOOR, HYBRID, QUICK, SUITES, Settings, run_suite, say
from lm.errors import LMError


def main() -> None:
    """Run the suites that were asked for, one after the other."""
    assert __doc__ is not None
    listed = "\n".join(f"    {name:<14} {what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.format(suites=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="which; default: all")
    parser.add_argument("--full", action="store_true", help="whole recipes in place of fixed slices: hours")
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a clone of nanoGPT; it is copied, never changed")
    parser.add_argument("--wlm", type=Path, metavar="PATH", help="word_language_model in a clone of pytorch/examples")
    parser.add_argument("--baseline", type=Path, metavar="PATH", help="a checkout of Inkling; its default is compared")
    parser.add_argument("--losses", type=Path, metavar="PATH", help="a folder of benchmarks.bf16, for formats")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every contender (default: %(default)s)")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each contender (default: 3, with --full 5)")
    parser.add_argument("--data-dir", type=Path, metavar="PATH", help="where named corpora lie (default: INKLING_DATA)")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="a folder for records and report (default: benchmarks/)"
    )
    help_ = "options of `lm train` for {} (default: {!r})"
    parser.add_argument("--quick", default=QUICK, metavar="ARGS", help=help_.format("time-to-loss", QUICK))
    parser.add_argument("--best", default=BEST, metavar="ARGS", help=help_.format("equal time", BEST))
    parser.add_argument("--hybrid", default=HYBRID, metavar="ARGS", help=help_.format("the hybrid", HYBRID))
    parser.add_argument("--floor", default=FLOOR, metavar="ARGS", help=help_.format("the n-gram floor", FLOOR))
    given = parser.parse_args()
    if unknown := [name for name in given.suites if name not in SUITES]:
        parser.error(f"there is no suite {unknown[0]!r}: {', '.join(SUITES)}")
    results = given.out / "results" if given.out else RESULTS
    settings = Settings(
        full=given.full, threads=given.threads, data_dir=given.data_dir, quick=given.quick, best=given.best,
        hybrid=given.hybrid, floor=given.floor, turns=given.rounds, results=results,
        **{
            name: path.expanduser().resolve()
            for name in ("nanogpt", "wlm", "baseline", "losses")
            if (path := getattr(given, name))
        },
    )  # fmt: skip
    # The CPU alone, and the threads asked for, in this process too; torch reads them when it is imported.
    os.environ.update({key: settings.environment()[key] for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")})
    results.mkdir(parents=True, exist_ok=True)
    failed, missing = [], []
    for name in given.suites or SUITES:
        say(f"{name}: {SUITES[name]}")
        begun = time.perf_counter()
        try:
            record = run_suite(name, settings)
        except LMError as error:
            # One suite's trouble, such as a corpus that cannot be fetched, does not cost the others.
            say(f"  {error}")
            failed.append(name)
            continue
        record.options["suite_seconds"] = round(time.perf_counter() - begun)
        missing += record.missing
        say(f"  {save(name, dataclasses.asdict(record), folder=results)}, {record.options['suite_seconds']} s\n")
    for each in dict.fromkeys(missing):
        say(f"Not here: {each}")
    written = report.write(given.out / "RESULTS.md" if given.out else report.REPORT, results)
    say(f"\n{written}")
    print(report.targets(report.newest(results)))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
