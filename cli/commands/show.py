"""lm show."""

from __future__ import annotations

from cli.options import DEFAULT_RUNS, Json, RunName, RunsDir

POSITION = 9


def command(run: RunName = None, runs_dir: RunsDir = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show a run: options, parameters, scores, files."""
    from rich.filesize import decimal
    from rich.markup import escape

    from cli.output import console, facts_table, print_json
    from cli.progress import duration
    from cli.report import print_report
    from lm.config import validate
    from lm.evaluation.report import Report
    from lm.runs.card import numbers, sampling_text, source_rows
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir)
    known = loaded.facts()
    if as_json:
        print_json({**known, "metrics": loaded.folder.read_metrics()})
        return
    screen = console()
    plan = known["plan"] or {}
    # Steps of a plan by time are an estimate, which the last line of metrics has best.
    rows = loaded.folder.read_metrics()
    steps = rows[-1].get("plan_steps") if rows else None
    steps = steps or plan.get("steps", 0)
    length = "steps" + (f" in {duration(plan['seconds'])}" if plan.get("seconds") else "")
    plan_rows = [] if known["imported"] else [("plan", f"{steps:,}", length)]
    screen.print(f"[bold]{escape(known['name'])}[/bold]  [dim]{escape(known['path'])}[/dim]", soft_wrap=True)
    screen.print(
        facts_table(
            [
                ("model", known["model"], numbers(known) + (f"; {known['kind']}" if known["kind"] else "")),
                *(() if (base := known["base"]) is None else (
                    ("adapter of", base["run"], f"{base['adapter_parameters']:,} parameters of rank {base['rank']}"),
                )),
                ("tokenizer", known["tokenizer"], f"{known['vocab_size']:,} tokens"),
                *([] if known["imported"] else [("corpus", known["corpus"], "; ".join(known["corpus_notes"]))]),
                *source_rows(known["imported"]),
                *((("sampling", "", f"{sampling_text(known['sampling'])}: of the source, if no flags are given"),)
                  if known["sampling"] else ()),
                *((f"  {name}", f"{part['tokens']:,}",
                   f"tokens, {part['characters']:,} characters, sha256 {part['sha256'][:12]}…")
                  for name, part in known["splits"].items()),
                *plan_rows,
                *((("trained in", known["precision"], ""),) if known["precision"] else ()),
                ("created", known["created"][:16].replace("T", " "), f"with Inkling {known['inkling']}"),
                ("checkpoints", "", ", ".join(known["states"])),
                ("size", decimal(known["size_bytes"]), ""),
            ]
        )
    )  # fmt: skip
    for report in known["reports"].values():
        screen.print()
        print_report(screen, validate(Report, report, where="report.json"))
    for section in ("tokenizer", "model", "training"):
        screen.print(f"\n[bold]{section}[/bold]")
        screen.print(facts_table([(name, str(value), "") for name, value in known["options"][section].items()]))
    screen.print("\n[bold]files[/bold]")
    screen.print(
        facts_table(
            [(str(path.relative_to(loaded.folder.path)), decimal(size), "") for path, size in loaded.folder.files()]
        )
    )
