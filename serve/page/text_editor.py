"""The text of the tab Write: its owner, and what each button does while a model writes.

The browser owns the text. The visitor types into it, and the script below adds what the model writes. The server never
sends a whole text. It sends pieces: all that the model has written since a button was pressed, with the number of that
piece. The script knows for each character whether the visitor or which piece added it.

            Write, Continue, Shift+Enter, Regenerate, a picked token
       idle ─────────────────────────────────────────► writing
        ▲                                                 │
        └─────────────────────────────────────────────────┘
          the model ends or fails · Stop · typing · Undo · Take · another draft or version · another piece starts

Idle:
    Write       the model continues from the end of the text.
    Undo        removes what is left of the last piece. What the visitor typed stays.
    Regenerate  Undo, then Write with another seed.
    Take        adds a sample to the end of the text, and closes the samples.
    pick        a token of the chart replaces all from its place on; then Write.

Writing (the script adds each new part of the piece to the end of the text):
    Stop        (in place of Write) the server ends the piece. All that was written stays and is counted.
    typing      the script adds no more of the piece, and presses Stop.
    Undo, Take, Regenerate
                the script adds no more of the old piece, and the button does the same as in idle. The server ends the
                old piece before it starts another: there is never more than one.
    Shift+Enter ignored while a Write runs (a double click is one click); ends a Regenerate and starts.

Drafts and versions are the browser's alone (assets/drafts.js): each draft has its text with its owners. Regenerate and
pick keep the text as it was as a version; ‹ and › go from version to version. The script asks for a refresh of chart
and view a moment after the text changed.

`EditorSession` is the server's part, `editor_script` the browser's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from serve.page.assets import read_asset
from serve.page.reproduce import TextRequest
from serve.page.text_generation import GenerationLock


@dataclass(frozen=True)
class EditorCommand:
    """What the script sends when a button is pressed."""

    text: str
    """The text, after the button changed it in the browser."""
    parts: tuple[tuple[int, int], ...]
    """(UTF-16 length, piece) of each part of the text, in order; piece 0 was typed."""
    pieces: tuple[int, ...]
    """The pieces of which some text is left, the oldest first."""
    seeds: frozenset[int]
    """The seeds of these pieces."""
    new_piece: int | None
    """Number of the piece that starts; None if none does."""
    is_retry: bool
    """Whether the new piece replaces one that was removed, and needs another seed."""
    is_possible: bool
    """False if there is no piece to remove."""

    @classmethod
    def parse(cls, sent: Any) -> EditorCommand:
        """Read JSON from a browser; invalid values are left out."""
        sent = sent if isinstance(sent, Mapping) else {}
        number = sent.get("new_piece")
        parts = [part for part in _list(sent.get("parts")) if len(_integers(part)) == 2]
        return cls(
            str(sent.get("text") or ""),
            tuple((length, piece) for length, piece in parts),
            tuple(sorted(_integers(sent.get("pieces")))),
            frozenset(_integers(sent.get("seeds"))),
            number if isinstance(number, int) else None,
            bool(sent.get("is_retry")),
            sent.get("is_possible") is not False,
        )

    def spans(self) -> list[tuple[int, int, int]]:
        """(begin, end, piece) of each part of the text, in characters."""
        units, spans, at, begin = self.text.encode("utf-16-le", "surrogatepass"), [], 0, 0
        for length, piece in self.parts:
            part = units[2 * at : 2 * (at + length)].decode("utf-16-le", "surrogatepass")
            spans.append((begin, begin + len(part), piece))
            at, begin = at + length, begin + len(part)
        return spans


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _integers(value: Any) -> list[int]:
    return [each for each in _list(value) if isinstance(each, int)]


MAX_REQUESTS = 200
"""Pieces of one visitor whose requests the server remembers: versions may come back."""


class EditorSession(GenerationLock):
    """The running piece of one visitor, and the request of each piece in the text; used from the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._requests: dict[int | None, TextRequest] = {}
        """By the number of the piece, the newest last."""
        self.after_undo: EditorCommand | None = None
        """The command of Undo, if it was pressed while a piece was written."""

    def __contains__(self, piece: int | None) -> bool:
        return piece in self._requests

    def set_request(self, piece: int | None, request: TextRequest) -> None:
        """Store the request of a piece; a piece without tokens is forgotten."""
        self._requests.pop(piece, None)
        if request.options.max_tokens:
            self._requests[piece] = request
        while len(self._requests) > MAX_REQUESTS:
            del self._requests[next(iter(self._requests))]

    def last_request(self, pieces: Iterable[int | None]) -> TextRequest | None:
        """The request of the newest of these pieces that has one."""
        known = [self._requests[piece] for piece in pieces if piece in self._requests]
        return known[-1] if known else None


def unused_seed(seed: int, used: Collection[int]) -> int:
    """The first seed from `seed` upwards that is not used: the same seed would give a similar text again."""
    while seed in used:
        seed += 1
    return seed


def editor_script(*, text: str, samples: str) -> Any:
    """The component that adds pieces to the text; it shows nothing.

    Its value is {"piece": number, "text": …, "ended": …, "seed": …}. It triggers `halt` when the visitor types during a
    piece, and `refresh` a moment after the text changed. The `js` of the buttons calls the functions of its script;
    each returns an `EditorCommand`.

    Args:
        text: CSS selector of the text area.
        samples: CSS selector of the first of several samples, which is visible while they are open.
    """
    script = read_asset("text_editor.js").replace("DRAFTS", read_asset("drafts.js"))
    script = script.replace("TEXT", text).replace("SAMPLES", samples)
    return gr.HTML({}, html_template="", js_on_load=script, visible="hidden", apply_default_css=False)


def command_js(action: str) -> str:
    """The `js` of a button whose first input is the command: `action` is begin, again, pick, undo or current."""
    return f"(command, ...others) => [window.inklingEditor.{action}(), ...others]"


FAILED_JS = "() => { window.inklingEditor.fail(); }"
"""The `js` after a piece failed."""

TAKE_JS = "(command, sample, ...others) => [window.inklingEditor.take(sample), sample, ...others]"
"""The `js` of the button that takes a sample."""
