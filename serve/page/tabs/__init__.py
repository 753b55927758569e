"""The tabs of the page, one module each. To add a tab, add a module here with

def build(page: Page) -> None: ...      # adds the components and attaches the handlers

TAB = Tab("Name", 70, build)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from serve.page.context import Page


class Tab(NamedTuple):
    """A tab of the page."""

    label: str
    position: int
    """Sort key: the tab with the lowest number is on the left."""
    build: Callable[[Page], None]
    """Adds the tab's components to the current Gradio block."""


def find_tabs() -> list[Tab]:
    """The tabs of all modules in this folder, from left to right."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    tabs: list[Tab] = [module.TAB for module in modules]
    return sorted(tabs, key=lambda tab: tab.position)
