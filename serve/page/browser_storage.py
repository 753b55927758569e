"""The browser stores what a visitor typed and chose: it is there again after a reload or a restart of the server.

    store(page, "write-seed", component)      # the name is unique on the page

A component is stored when it changes. Gradio reports no changes while the server is away; therefore a text box of class
STORED_CLASS is stored at each key. If the browser's storage is full (about five million characters) or switched off,
values are not stored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from serve.page.assets import read_asset
from serve.page.context import Page

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


def restore_at_load(page: Page, blocks: gr.Blocks) -> None:
    """Restore the stored values when the page is opened."""
    names, components = list(page.stored), list(page.stored.values())
    js = f"(...values) => window.inklingStorage.restore({json.dumps(names)}, values)"
    blocks.load(None, components, components, js=js, api_visibility="private")
