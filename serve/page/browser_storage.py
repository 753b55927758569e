"""The browser stores what a visitor typed and chose: it is there again after a reload or a restart of the server.

    store(page, "write-seed", component)      # the name is unique on the page

A component is stored when it changes. Gradio reports no changes while the server is away; therefore a text box of class
STORED_CLASS is stored at each key. If the browser's storage is full (about five million characters) or switched off,
values are not stored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import gradio as gr

from serve.page.assets import read_asset
from serve.page.context import Page, TabLink

STORED_CLASS = "stored"
"""Class of a text box that is stored at each key, under its `elem_id`."""

SCRIPT = f"<script>{read_asset('browser_storage.js')}</script>".replace("STORED", STORED_CLASS)
"""For the head of the page."""


def store(page: Page, name: str, component: Any) -> None:
    """Store a component's value when it changes; a component of class STORED_CLASS has `name` as its `elem_id`."""
    page.stored[name] = component
    store_at(component.change, name, component)


def store_at(event: Any, name: str, component: Any) -> None:
    """Store a component's value at an event."""
    event(
        None, component, None, js=f"(value) => {{ window.inklingStorage.store({json.dumps(name)}, value); }}",
        api_visibility="private",
    )  # fmt: skip


def choose_models_js(names: Sequence[str]) -> str:
    """The `js` that sets each picker, from the offered models and what the pickers show."""
    return f"(offered, ...shown) => window.inklingStorage.chooseModels({json.dumps(names)}, offered, shown)"


def tab_link(page: Page, *, before: Collection[str]) -> TabLink:
    """The link of the tab that was built last: its first model picker, its seed and its first stored text box.

    Args:
        page: where the tab has registered its components.
        before: the names of the components of the other tabs.
    """
    link = TabLink()
    for name in page.model_pickers:
        if name not in before:
            link.setdefault("model", name)
    for name, component in page.stored.items():
        if name in before:
            continue
        if name.endswith("-seed"):
            link.setdefault("seed", name)
        elif STORED_CLASS in component.elem_classes:
            link.setdefault("prompt", name)
    return link


def restore_at_load(page: Page, blocks: gr.Blocks) -> None:
    """Restore the stored values when the page is opened."""
    names, components = list(page.stored), list(page.stored.values())
    js = f"(...values) => window.inklingStorage.restore({json.dumps(names)}, values)"
    blocks.load(None, components, components, js=js, api_visibility="private")
