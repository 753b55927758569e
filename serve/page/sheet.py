"""The sheet of the tab Write: who owns its text, and what each button does while a model writes.

The browser owns the text. The visitor types into it, and the script below adds what the model writes. The server never
sends a whole sheet. It sends pieces: all that the model has written since the button was pressed, with the number of
that writing. The script knows for each character whether the visitor or which writing put it there.

            Write, Continue, Shift+Enter, Regenerate
       idle ─────────────────────────────────────────► writing
        ▲                                                 │
        └─────────────────────────────────────────────────┘
          the model ends or fails · Stop · typing · Undo · Take · another writing begins

Idle:
    Write       the model continues from the end of the sheet as it stands.
    Undo        takes away what is left of the last piece. What was typed, wherever it stands, stays.
    Regenerate  Undo, then Write with another seed.
    Take        adds a sample to the end of the sheet; the samples close.

Writing (the script adds each new part of the piece to the end of the sheet):
    Stop        the server ends the writing. All that was written stays and is counted.
    typing      the script adds nothing more from that key on, and presses Stop.
    Undo, Take, Regenerate
                the script adds nothing more of the old piece, and the button does what it does in idle. The server ends
                the old writing before it begins another, so that there is never more than one.
    Write       does nothing while a Write runs, so that a double click is one click; it ends a Regenerate and begins.

`Desk` is the server's half, `stream` the browser's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from serve.page.drawing import Turns
from serve.page.sharing import Recipe


@dataclass(frozen=True)
class Order:
    """What the script sends with a button."""

    sheet: str
    """The text, after what the button did to it in the browser."""
    standing: tuple[int, ...]
    """The writings of which something stands on the sheet, the oldest first."""
    number: int | None
    """Of the writing that begins; None where none does."""
    again: bool
    """Whether it takes the place of a piece that was taken away, so that it wants another seed."""
    done: bool
    """False where there was nothing to take away."""

    @classmethod
    def read(cls, sent: Any) -> Order:
        """From JSON; what does not belong there is left out, for anybody can send it."""
        sent = sent if isinstance(sent, Mapping) else {}
        standing, number = sent.get("standing"), sent.get("number")
        return cls(
            str(sent.get("sheet") or ""),
            tuple(sorted(each for each in standing if isinstance(each, int))) if isinstance(standing, list) else (),
            number if isinstance(number, int) else None,
            bool(sent.get("again")),
            sent.get("done") is not False,
        )


class Desk(Turns):
    """The writings of one visitor, and what the pieces on the sheet are made of; used from the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int | None, Recipe] = {}
        """By the number of the writing, the newest last."""
        self.left: tuple[int, ...] | None = None
        """The writings of which something stands, where a piece was taken away while it was written."""

    def stands(self, standing: Iterable[int]) -> None:
        """Forget the pieces of which nothing stands on the sheet any more."""
        self._recipes = {number: self._recipes[number] for number in standing if number in self._recipes}

    def has(self, number: int | None) -> bool:
        """Whether the piece of that number is known."""
        return number in self._recipes

    def keep(self, number: int | None, recipe: Recipe) -> None:
        """Remember what a piece is made of; one without a token is no piece."""
        self._recipes.pop(number, None)
        if recipe.options.max_tokens:
            self._recipes[number] = recipe

    def last(self) -> Recipe | None:
        """What the newest piece is made of."""
        return next(reversed(self._recipes.values()), None)

    def fresh(self, seed: int) -> int:
        """The first seed from `seed` on that no piece was written with: the same luck again would write much the same.

        A sheet without pieces gets the seed itself, so that the same sheet with the same seed gives the same text.
        """
        used = {recipe.options.seed for recipe in self._recipes.values()}
        while seed in used:
            seed += 1
        return seed


def stream(*, sheet: str, samples: str) -> Any:
    """What brings the pieces into the sheet; shows nothing itself.

    Its value is {"number": …, "text": …, "done": …}. It triggers `halt` where the visitor types into a sheet that is
    being written on. The functions of its script are called by the `js` of buttons; each gives an `Order`.

    Args:
        sheet: CSS selector of the sheet's text area.
        samples: CSS selector of the first of several samples, which are open where it can be seen.
    """
    script = _SCRIPT.replace("SHEET", sheet).replace("SAMPLES", samples)
    return gr.HTML({}, html_template="", js_on_load=script, visible="hidden", apply_default_css=False)


def order_by(action: str) -> str:
    """The `js` of a button whose first input is the order: `action` is begin, again or undo."""
    return f"(order, ...others) => [window.inklingSheet.{action}(), ...others]"


FAILED = "() => { window.inklingSheet.fail(); }"
"""The `js` for a writing that failed."""

TAKE = "(order, sample, ...others) => [window.inklingSheet.take(sample), sample, ...others]"
"""The `js` of the button that takes a sample."""

_SCRIPT = """
const area = () => document.querySelector('SHEET');
const open = () => Boolean(document.querySelector('SAMPLES')?.offsetParent);
// The text as it was seen last, and who put it there: [length, writing] from its beginning; 0 is the visitor.
let text = '', runs = [];
// The last number; the writing whose piece is being added, and how much of it has been.
let count = 0, writing = null, added = 0;
let own = false;

const replace = (from, removed, length, writer) => {
  const before = [], after = [];
  let at = 0;
  for (const [size, who] of runs) {
    const left = Math.max(0, Math.min(size, from - at));
    const right = Math.max(0, Math.min(size, at + size - from - removed));
    if (left) before.push([left, who]);
    if (right) after.push([right, who]);
    at += size;
  }
  if (length && before.length && before.at(-1)[1] === writer) before.at(-1)[0] += length;
  else if (length) before.push([length, writer]);
  runs = [...before, ...after];
};
// What is different since was typed.
const look = () => {
  const now = area().value, most = Math.min(now.length, text.length);
  if (now === text) return;
  let head = 0, tail = 0;
  while (head < most && now[head] === text[head]) head++;
  while (tail < most - head && now[now.length - 1 - tail] === text[text.length - 1 - tail]) tail++;
  replace(head, text.length - head - tail, now.length - head - tail, 0);
  text = now;
};
const changed = () => {
  text = area().value;
  own = true;
  area().dispatchEvent(new Event('input', { bubbles: true }));
  own = false;
};
const add = (part, writer) => {
  look();
  const end = text.length;
  // The caret stays where it is.
  area().setRangeText(part, end, end, 'preserve');
  replace(end, 0, area().value.length - end, writer);
  changed();
};
const order = (more) => {
  look();
  const standing = [...new Set(runs.map(([, who]) => who).filter(Boolean))];
  return { sheet: text, standing, number: null, again: false, done: true, ...more };
};
const begin = (more) => {
  writing = ++count;
  added = 0;
  return order({ number: writing, ...more });
};
const undo = () => {
  look();
  const halted = writing !== null && !runs.some(([, who]) => who === writing);
  writing = null;
  // A writing that has not come to a word, and samples of which none was taken, leave nothing to take away.
  if (halted || open()) return order();
  const last = runs.reduce((most, [, who]) => Math.max(most, who), 0);
  if (!last) return order({ done: false });
  let at = 0, left = '';
  for (const [size, who] of runs) {
    if (who !== last) left += text.slice(at, at + size);
    at += size;
  }
  runs = runs.filter(([, who]) => who !== last);
  area().value = left;
  changed();
  return order();
};
const again = () => {
  const undone = undo();
  return undone.done ? begin({ again: true }) : undone;
};
const take = (sample) => {
  writing = null;
  add(sample, count);
  return order();
};
const fail = () => { writing = null; };
window.inklingSheet = { begin, undo, again, take, fail };

document.addEventListener('input', (event) => {
  if (own || event.target !== area()) return;
  look();
  if (writing === null) return;
  writing = null;
  trigger('halt');
});
watch('value', () => {
  const { number, text: piece, done } = props.value ?? {};
  if (number !== writing || writing === null) return;
  const part = piece.slice(added);
  added = piece.length;
  if (part) add(part, writing);
  if (done) writing = null;
});
"""
