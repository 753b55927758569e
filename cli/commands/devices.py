"""lm devices."""

from __future__ import annotations

from typing import Any

from cli.options import Json

POSITION = 19


def command(as_json: Json = False) -> None:
    """Show the devices of this machine and the defaults of Inkling."""
    from cli.output import console, facts_table, print_json
    from lm.profiling.machine_defaults import describe

    known = describe()
    if as_json:
        print_json(known)
        return
    screen = console()
    for title, rows in _tables(known).items():
        screen.print(f"[bold]{title}[/bold]")
        screen.print(facts_table(rows))


def _tables(known: dict[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    cpu, memory, defaults = known["cpu"], known["memory"], known["defaults"]
    cores = f"{cpu['cores']} cores, " if cpu["cores"] else ""
    usable = cpu["usable_threads"]
    kernels = cpu["kernels_use"]
    sets = ", ".join(cpu["instruction_sets"]) or "unknown"
    bf16 = {True: "has bf16 instructions", False: "no bf16 instructions: bf16 is slow", None: ""}
    tables = {
        "processor": [
            ("model", "", cpu["model"]),
            ("threads", str(cpu["threads"]), f"{cores}{usable} threads usable by this process"),
            ("instruction sets", "", sets),
            ("bf16", "", bf16[cpu["bf16_instructions"]]),
            ("used by torch", "", cpu["torch_uses"]),
            ("used by kernels", "", kernels or "no native kernels installed: torch is used and is slower"),
            ("trains in", "", ", ".join(cpu["formats"])),
            ("memory", _size(memory["total"]), f"{_size(memory['available'])} available"),
        ],
        "software": [(name, "", value) for name, value in known["software"].items() if value is not None],
    }
    for gpu in known["gpus"]:
        capability = gpu["compute_capability"]
        tables[f"GPU {gpu['device']}"] = [
            ("name", "", gpu["name"]),
            ("memory", _size(gpu["memory"]), f"{_size(gpu['available'])} available"),
            *([("compute capability", capability, f"{gpu['multiprocessors']} multiprocessors")] if capability else []),
            ("bf16", "", {True: "in hardware", False: "not in hardware: use fp16", None: "unknown"}[gpu["bf16"]]),
            ("trains in", "", ", ".join(gpu["formats"])),
        ]
    if not known["gpus"]:
        tables["GPU"] = [("", "", "none that torch can use")]
    on_cpu = defaults["device"] == "cpu" and defaults["format"] != "fp32"
    others = " (models without native kernels: fp32)" if on_cpu else ""
    tables["chosen by default"] = [
        ("device", "", defaults["device"]),
        ("precision", "", defaults["format"] + others),
        ("threads", str(defaults["threads"]), "of torch on the CPU (OMP_NUM_THREADS)"),
        ("training", "", defaults["training"]),
        ("sampling", "", defaults["sampling"]),
    ]
    return tables


def _size(size: int | None) -> str:
    from rich.filesize import decimal

    return "unknown" if size is None else decimal(size)
