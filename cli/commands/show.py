"""lm show."""

from __future__ import annotations

from typing import Any

from cli.options import DEFAULT_RUNS, Json, RunName, RunsDir

POSITION = 9


def command(run: RunName = None, runs_dir: RunsDir = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show a run: options, parameters, scores, files."""
    from rich.filesize import decimal
    from rich.markup import escape

    from cli.output import console, facts_table, print_json
    from cli.report_tables import print_report
    from lm.config import validate
    from lm.evaluation.report import Report
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir)
    known, rows = loaded.facts(), loaded.folder.read_metrics()
    if as_json:
        print_json({**known, "metrics": rows})
        return
    screen = console()
    screen.print(f"[bold]{escape(known['name'])}[/bold]  [dim]{escape(known['path'])}[/dim]", soft_wrap=True)
    screen.print(facts_table(_facts(known, rows)))
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


def _facts(known: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The lines of the table of facts, from those of a run and the lines of its metrics."""
    from rich.filesize import decimal

    from lm.runs.card import numbers, sampling_text, source_rows

    kind, base, imported = known["kind"], known["base"], known["imported"]
    facts = [("model", known["model"], numbers(known) + (f"; {kind}" if kind else ""))]
    if base is not None:
        facts.append(("adapter of", base["run"], f"{base['adapter_parameters']:,} parameters of rank {base['rank']}"))
    facts.append(("tokenizer", known["tokenizer"], f"{known['vocab_size']:,} tokens"))
    if not imported:
        facts.append(("corpus", known["corpus"], "; ".join(known["corpus_notes"])))
    facts += source_rows(imported)
    if known["sampling"]:
        text = f"{sampling_text(known['sampling'])}: of the source, if no flags are given"
        facts.append(("sampling", "", text))
    facts += [
        *((f"  {name}", f"{part['tokens']:,}",
           f"tokens, {part['characters']:,} characters, sha256 {part['sha256'][:12]}…")
          for name, part in known["splits"].items()),
    ]  # fmt: skip
    if not imported:
        facts.append(_plan(known["plan"] or {}, rows))
    if known["precision"]:
        facts.append(("trained in", known["precision"], ""))
    return [
        *facts,
        ("created", known["created"][:16].replace("T", " "), f"with Inkling {known['inkling']}"),
        ("checkpoints", "", ", ".join(known["states"])),
        ("size", decimal(known["size_bytes"]), ""),
    ]


def _plan(plan: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    """The line of the plan. Steps of a plan by time are an estimate, which the last line of metrics has best."""
    from cli.progress import duration

    steps = rows[-1].get("plan_steps") if rows else None
    steps = steps or plan.get("steps", 0)
    return "plan", f"{steps:,}", "steps" + (f" in {duration(plan['seconds'])}" if plan.get("seconds") else "")
