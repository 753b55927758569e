"""What a visitor typed and chose is kept in the browser: it is there again after a reload, and after the server ended.

    keep(page, "write-seed", knob)      # a component, by a name that is its own on the page

A component is kept when it changes. While the server is away Gradio says nothing of changes, and a text box of class
KEPT is kept with every key.

What a browser refuses to keep (more than about five million characters in all) is as it was before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from serve.page.site import Page

KEPT = "kept"
"""The class of a text box that is kept with every key, under its `elem_id`."""

SCRIPT = """<script>
window.inklingKept = (() => {
  const key = (name) => `inkling.${name}`;
  const read = (name) => {
    try { return JSON.parse(localStorage.getItem(key(name))); } catch { return null; }
  };
  const write = (name, value) => {
    try { localStorage.setItem(key(name), JSON.stringify(value)); } catch { /* full, or switched off */ }
  };
  // Before that, a change is only that a component has come to life.
  let restored = false;
  document.addEventListener('input', ({ target }) => {
    const box = target.closest?.('.KEPT');
    if (box && target.tagName === 'TEXTAREA') write(box.id, target.value);
  });
  let settled = false;
  return {
    settle: (keys, shelf, shown) => {
      // When the page was opened, what was picked last; later what is picked, whatever other windows do.
      const wanted = settled ? shown : keys.map(read);
      settled = true;
      return wanted.map((name, index) => (shelf.names.includes(name) ? name : shelf.usual[index]));
    },
    keep: (name, value) => { if (restored) write(name, value); },
    restore: (names, values) => {
      restored = true;
      return names.map((name, index) => read(name) ?? values[index]);
    },
  };
})();
</script>""".replace("KEPT", KEPT)
"""For the head of the page."""


def keep(page: Page, name: str, component: Any) -> None:
    """Have a component's value kept; one of class KEPT needs `name` as its `elem_id`."""
    page.kept[name] = component
    keep_choice(name, component.change, component)


def keep_choice(name: str, event: Any, component: Any) -> None:
    """Keep a component's value at an event."""
    event(
        None, component, None, js=f"(value) => {{ window.inklingKept.keep({json.dumps(name)}, value); }}",
        api_visibility="private",
    )  # fmt: skip


def settle(names: Sequence[str]) -> str:
    """The `js` that gives each picker its model, from what is on offer, and what the pickers show."""
    return f"(shelf, ...shown) => window.inklingKept.settle({json.dumps(names)}, shelf, shown)"


def restore(page: Page, blocks: gr.Blocks) -> None:
    """Give back what was kept, when the page is opened."""
    names, components = list(page.kept), list(page.kept.values())
    js = f"(...values) => window.inklingKept.restore({json.dumps(names)}, values)"
    blocks.load(None, components, components, js=js, api_visibility="private")
