"""One command in several processes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lm.config import RunConfig


def started_processes(devices: int | None, device: str | None, config: RunConfig | None) -> bool:
    """Start this command in several processes where --devices requests it; whether it did.

    Args:
        devices: number of processes.
        device: where they compute.
        config: all options, checked before the start, where they are final.

    Raises:
        Exit: a process failed.
    """
    from lm.training import distributed

    if devices is None or devices == 1 or distributed.started():
        return False
    distributed.check_devices(devices, device)
    if config is not None:
        distributed.check(config, devices)
    if code := distributed.launch(devices, [sys.executable, "-m", "cli.main", *sys.argv[1:]]):
        raise typer.Exit(code)
    return True
