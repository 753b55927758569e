"""The text of the tab Write: its owner, and what each button does while a model writes.

The browser owns the text. The visitor types into it, and the script below adds what the model writes. The server never
sends a whole text. It sends pieces: all that the model has written since a button was pressed, with the number of that
piece. The script knows for each character whether the visitor or which piece added it.

            Write, Continue, Shift+Enter, Regenerate
       idle ─────────────────────────────────────────► writing
        ▲                                                 │
        └─────────────────────────────────────────────────┘
          the model ends or fails · Stop · typing · Undo · Take · another piece starts

Idle:
    Write       the model continues from the end of the text.
    Undo        removes what is left of the last piece. What the visitor typed stays.
    Regenerate  Undo, then Write with another seed.
    Take        adds a sample to the end of the text, and closes the samples.

Writing (the script adds each new part of the piece to the end of the text):
    Stop        the server ends the piece. All that was written stays and is counted.
    typing      the script adds no more of the piece, and presses Stop.
    Undo, Take, Regenerate
                the script adds no more of the old piece, and the button does the same as in idle. The server ends the
                old piece before it starts another: there is never more than one.
    Write       ignored while a Write runs (a double click is one click); ends a Regenerate and starts.

`EditorSession` is the server's part, `editor_script` the browser's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    pieces: tuple[int, ...]
    """The pieces of which some text is left, the oldest first."""
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
        pieces, number = sent.get("pieces"), sent.get("new_piece")
        return cls(
            str(sent.get("text") or ""),
            tuple(sorted(each for each in pieces if isinstance(each, int))) if isinstance(pieces, list) else (),
            number if isinstance(number, int) else None,
            bool(sent.get("is_retry")),
            sent.get("is_possible") is not False,
        )


class EditorSession(GenerationLock):
    """The running piece of one visitor, and the request of each piece in the text; used from the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._requests: dict[int | None, TextRequest] = {}
        """By the number of the piece, the newest last."""
        self.left_after_undo: tuple[int, ...] | None = None
        """The pieces that are left, if Undo was pressed while a piece was written."""

    def keep_pieces(self, pieces: Iterable[int]) -> None:
        """Forget all other pieces."""
        self._requests = {number: self._requests[number] for number in pieces if number in self._requests}

    def __contains__(self, piece: int | None) -> bool:
        return piece in self._requests

    def set_request(self, piece: int | None, request: TextRequest) -> None:
        """Store the request of a piece; a piece without tokens is forgotten."""
        self._requests.pop(piece, None)
        if request.options.max_tokens:
            self._requests[piece] = request

    def last_request(self) -> TextRequest | None:
        """The request of the newest piece."""
        return next(reversed(self._requests.values()), None)

    def unused_seed(self, seed: int) -> int:
        """The first seed from `seed` upwards that no piece used: the same seed would give a similar text again."""
        used = {request.options.seed for request in self._requests.values()}
        while seed in used:
            seed += 1
        return seed


def editor_script(*, text: str, samples: str) -> Any:
    """The component that adds pieces to the text; it shows nothing.

    Its value is {"piece": number, "text": …, "ended": …}. It triggers `halt` when the visitor types during a piece. The
    `js` of the buttons calls the functions of its script; each returns an `EditorCommand`.

    Args:
        text: CSS selector of the text area.
        samples: CSS selector of the first of several samples, which is visible while they are open.
    """
    script = read_asset("text_editor.js").replace("TEXT", text).replace("SAMPLES", samples)
    return gr.HTML({}, html_template="", js_on_load=script, visible="hidden", apply_default_css=False)


def command_js(action: str) -> str:
    """The `js` of a button whose first input is the command: `action` is begin, again or undo."""
    return f"(command, ...others) => [window.inklingEditor.{action}(), ...others]"


FAILED_JS = "() => { window.inklingEditor.fail(); }"
"""The `js` after a piece failed."""

TAKE_JS = "(command, sample, ...others) => [window.inklingEditor.take(sample), sample, ...others]"
"""The `js` of the button that takes a sample."""
