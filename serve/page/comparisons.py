"""Compare runs on a text for a visitor: `lm.compare` in a thread, within the limits of the server.

    async for now in compare_runs(page, ["shakespeare-gru", "my-run"], text=text):
        print(now)              # a sentence while it works; at the end the Comparison

The server makes one comparison at a time: it loads its own copies of the models, with exact weights. It ends when the
visitor leaves, or after `timeout_seconds`.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lm.comparison.comparison_html import STYLE
from lm.errors import CorpusError
from lm.runs.run import Run
from lm.runs.training_text import cached_text
from serve.http_errors import RequestError
from serve.page.assets import read_asset
from serve.page.context import Page
from serve.page.messages import page_error, without_commands

if TYPE_CHECKING:
    from lm.comparison.result import Comparison, Finding

UPDATE_SECONDS = 0.4
"""Time between two sentences of progress."""
MAX_COMPARED = 8
"""Runs of one comparison."""

ComparisonPart: Callable[..., Any] = functools.partial(
    gr.HTML, css_template=read_asset("comparison.css") + STYLE, apply_default_css=False
)
"""The component for the parts of `lm.comparison.comparison_html`."""


class _StoppedError(Exception):
    """Ends the thread of a comparison that nobody waits for."""


async def compare_runs(
    page: Page, names: Sequence[str], *, text: str | None = None, split: str | None = None
) -> AsyncGenerator[str | Comparison, None]:
    """Give sentences of progress, and the comparison at the end. To close the generator ends the work.

    Args:
        page: for its runs and options.
        names: of the models, two or more.
        text: to predict; None: a split of the first run.
        split: valid or test; None: test if there is one.

    Raises:
        RequestError: a model is not offered, or the work takes too long.
        LMError: the runs cannot be compared on this text.
    """
    if len(names) != len(set(names)) or len(names) < 2:
        raise page_error("Select two or more different models.")
    if len(names) > MAX_COMPARED:
        raise page_error(f"Select at most {MAX_COMPARED} models.")
    runs = []
    for name in names:
        offer = page.models.available_runs.get(name)
        if offer is None:
            raise RequestError(404, f"The model {name!r} is not offered any more. Select another one.")
        runs.append(Run(offer.folder, offer.checkpoint, device=page.options.device))
    while page.comparing.locked():
        yield "Waiting for the comparison of another visitor …"
        await asyncio.sleep(UPDATE_SECONDS)
    await page.comparing.acquire()
    work = _Work(runs, text, split, page.options.timeout_seconds)
    task = asyncio.create_task(asyncio.to_thread(work.compare))

    def on_end(ended: asyncio.Task[Any]) -> None:
        # Also if this visitor has left: then nobody else reads the error.
        page.comparing.release()
        if not ended.cancelled():
            ended.exception()

    task.add_done_callback(on_end)
    try:
        while not task.done():
            yield work.progress
            await asyncio.wait({task}, timeout=UPDATE_SECONDS)
        yield task.result()
    finally:
        work.stopped.set()


class _Work:
    """The thread's part."""

    def __init__(self, runs: Sequence[Run], text: str | None, split: str | None, seconds: float) -> None:
        self._runs, self._text, self._split, self._seconds = runs, text, split, seconds
        self._end = time.monotonic() + seconds
        self.progress = "Reading the texts …"
        self.stopped = threading.Event()

    def compare(self) -> Comparison:
        # Imported here: torch takes seconds.
        from lm.comparison.compare import compare

        if self._text is None:
            _check_text(self._runs[0])
        found = compare(
            self._runs, text=self._text, split=self._split, name="the text", progress=self._scored, reading=self._read
        )
        return _for_visitors(found)

    def _read(self, *args: Any) -> None:
        self._check()

    def _scored(self, done: int, total: int) -> None:
        self.progress = f"Measuring: {done:,} of {total:,} tokens …"
        if done == total:
            self.progress = "Comparing …"
        self._check()

    def _check(self) -> None:
        if self.stopped.is_set():
            raise _StoppedError
        if time.monotonic() > self._end:
            raise RequestError(
                504, f"The comparison took longer than {self._seconds:g} seconds, the limit of this server. Measure a "
                "shorter text.",
            )  # fmt: skip


def _check_text(run: Run) -> None:
    """Refuse a text that would be downloaded, as a visitor makes the server fetch nothing, or that there is none of."""
    if not run.record["corpus"]["splits"]:
        raise CorpusError(
            f"{run.name} was imported, so it has no text here. Choose “a text”, or select another model first."
        )
    if cached_text(run.record["corpus"], run.tokenizer) is not None:
        return
    if not Path(run.config.corpus.source).expanduser().exists():
        raise CorpusError(
            f"The text of {run.name} is not on this server any more. Paste a text, or select another model first."
        )


def _for_visitors(found: Comparison) -> Comparison:
    """A comparison whose verdict advises no command."""

    def plain(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        return tuple(each.model_copy(update={"sentence": without_commands(each.sentence)}) for each in findings)

    verdict = found.verdict
    plainer = {
        "sentence": without_commands(verdict.sentence), "problems": plain(verdict.problems),
        "cautions": plain(verdict.cautions),
    }  # fmt: skip
    return found.model_copy(update={"verdict": verdict.model_copy(update=plainer)})
