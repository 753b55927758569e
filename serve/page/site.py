"""What every tab of the page is given, how it looks, and how errors are told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import html
import inspect
import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from lm.errors import LMError
from lm.runs.card import summary
from lm.runs.run import Run
from serve.engines.model_pool import ModelPool
from serve.http_errors import RequestError
from serve.security.hosts import host_name, is_loopback
from serve.settings import ServeOptions

if TYPE_CHECKING:
    from serve.training_queue import TrainingQueue

log = logging.getLogger(__name__)

PATH = "/page"
"""Where the page is mounted."""

Choice = tuple[str, str]
"""What a picker shows, and the name that stands for it."""


class Picker(NamedTuple):
    """A picker of models."""

    component: gr.Dropdown
    place: int
    """Among the best: which one it shows where nothing was picked yet."""


class Shelf(NamedTuple):
    """The models on offer."""

    choices: list[Choice]
    """In the order of the offers, each with its score."""
    best: list[str]
    """Their names, the best first."""

    def usual(self, place: int) -> str | None:
        """The one of a place among the best, or the last there is."""
        return self.best[min(place, len(self.best) - 1)] if self.best else None


@dataclass(frozen=True)
class Page:
    """What a tab is built from."""

    models: ModelPool
    options: ServeOptions
    jobs: TrainingQueue
    model_pickers: dict[str, Picker] = field(default_factory=dict)
    """Those of all tabs, kept up to date; by the name under which a choice is kept in the browser."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Components whose values are kept in the browser, by name."""

    def may_change(self, request: gr.Request) -> bool:
        """Whether a visitor may train and delete: where that is switched on, or from this machine to this machine."""
        if self.options.allow_training:
            return True
        if not request.state.is_local:
            return False
        named = host_name(request.headers.get("host", ""))
        return is_loopback(self.options.host) and is_loopback(named)

    def shelf(self) -> Shelf:
        """The models on offer with their scores. Reads files: not on the event loop.

        Runs that were named when the server was started are in order of merit as they are. Of others the best has the
        fewest bits per byte on its own validation text; what was trained here comes before what is shipped, and what
        was never measured comes last.
        """
        choices, merits = [], {}
        for offer in self.models.available_runs.values():
            known = summary(Run(offer.folder, offer.checkpoint))
            score = known.get("bits_per_byte")
            facts = [part for part in (known.get("model_name"), f"{score:.2f} bits/byte" if score else None) if part]
            choices.append((f"{offer.name} ({', '.join(facts)})" if facts else offer.name, offer.name))
            merits[offer.name] = (score is None, bool(known.get("shipped")), score or 0.0)
        best = list(merits) if self.options.runs else sorted(merits, key=lambda name: merits[name])
        return Shelf(choices, best)

    async def offer(self) -> list[Any]:
        """What is on offer now: the names with what each picker shows where nothing was picked, then the pickers."""
        await self.models.refresh()
        shelf = await asyncio.to_thread(self.shelf)
        usual = [shelf.usual(picker.place) for picker in self.model_pickers.values()]
        news: dict[str, Any] = {"names": [name for _, name in shelf.choices], "usual": usual}
        return [news, *(gr.update(choices=shelf.choices) for _ in usual)]


# -- what is told -------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """Text as HTML that shows it, whatever it is; nor is it read as a template."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


_COMMAND = re.compile(
    r"(?<![\w-])--[a-z]|\blm (bench|chat|eval|init|prepare|sample|serve|show|state|train)\b|\bpip install\b"
)
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_CLAUSE = re.compile(r"(?=, or |, and |; |: |, )")


def for_page(message: str) -> str:
    """What the library says, without the advice to type a command or a flag: a visitor has no command line here.

    A sentence ends before the clause with such advice, and is left out where it has no other. Where nothing is left,
    it is the first clause, with its flags as plain words.
    """
    kept = []
    # "--precision bf16: …" names what the message is about.
    for sentence in _SENTENCE.split(re.sub(r"^--(?=[a-z])", "", message)):
        clauses = _CLAUSE.split(sentence)
        good = list(itertools.takewhile(lambda clause: not _COMMAND.search(clause), clauses))
        if len(good) == len(clauses):
            kept.append(sentence)
            continue
        if len(good) > 1 and clauses[len(good)].startswith(": ") and good[-1].startswith((", or ", ", and ", "; ")):
            # It only leads up to the advice.
            good.pop()
        if good:
            kept.append("".join(good).rstrip(" .") + ".")
    first = _FLAG.sub(lambda flag: flag[1].replace("-", " "), _CLAUSE.split(message)[0])
    return " ".join(kept) or first.rstrip(" .") + "."


def refusal(message: str) -> gr.Error:
    """What a visitor is told in a corner of the page, to be raised."""
    return gr.Error(safe(message), print_exception=False)


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler (coroutine or asynchronous generator) whose errors reach the visitor as a sentence."""
    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def stream(*args: Any, **kwargs: Any) -> Any:
            with _as_sentences():
                async with contextlib.aclosing(handler(*args, **kwargs)) as values:
                    async for value in values:
                        yield value

        return stream

    @functools.wraps(handler)
    async def answer(*args: Any, **kwargs: Any) -> Any:
        with _as_sentences():
            return await handler(*args, **kwargs)

    return answer


@contextlib.contextmanager
def _as_sentences() -> Any:
    try:
        yield
    except gr.Error:
        raise
    except (LMError, RequestError) as error:
        raise refusal(for_page(error.detail if isinstance(error, RequestError) else str(error))) from None
    except Exception as error:
        log.exception("The page failed.")
        raise refusal("The server met an error of its own; its log says more.") from error


QUIET: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
"""How every handler is attached: visitors do not wait for one another, and nothing covers what is being written."""


# -- how it looks -------------------------------------------------------------------------------------

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
# All of them are there already: nothing is fetched.
THEME = gr.themes.Default(
    primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=_SANS, font_mono=_MONO
).set(block_label_text_weight="600", block_title_text_weight="600")

CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
@media (max-width: 640px) { .gradio-container .main { padding: 8px 12px !important; } }
#masthead { display: flex; align-items: baseline; gap: .75rem; flex-wrap: wrap; padding: .25rem 0 .5rem; }
#masthead b { font-size: 1.5rem; letter-spacing: -.01em; font-weight: 700; color: var(--primary-600); }
.dark #masthead b { color: var(--primary-400); }
#masthead span { color: var(--body-text-color-subdued); }
#masthead a { margin-left: auto; color: var(--body-text-color-subdued); }
.paper textarea { font-family: Georgia, "Times New Roman", serif !important; font-size: 1.06rem !important;
  line-height: 1.6 !important; }
.recipe textarea { font-family: var(--font-mono) !important; font-size: .9rem !important; }
.wrap-inner input { text-overflow: ellipsis; padding-right: 1.6rem !important; }
.note, .note p { color: var(--body-text-color-subdued) !important; font-size: .9rem; }
.knobs { gap: .6rem !important; }
button:focus-visible, [tabindex]:focus-visible { outline: 2px solid var(--primary-500) !important;
  outline-offset: 1px; }
"""
