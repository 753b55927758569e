"""What every tab of the page is given, how it looks, and how errors are told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import html
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr

from lm.card import summary
from lm.errors import LMError
from lm.run import Run
from serve.errors import RequestError
from serve.hosts import host_name, is_loopback
from serve.models import Models
from serve.settings import ServeOptions

if TYPE_CHECKING:
    from serve.training import TrainingQueue

log = logging.getLogger(__name__)

PATH = "/page"
"""Where the page is mounted."""

Choice = tuple[str, str]
"""What a picker shows, and the name that stands for it."""


@dataclass(frozen=True)
class Page:
    """What a tab is built from."""

    models: Models
    options: ServeOptions
    jobs: TrainingQueue
    model_pickers: list[gr.Dropdown] = field(default_factory=list)
    """Those of all tabs, kept up to date."""

    def may_change(self, request: gr.Request) -> bool:
        """Whether a visitor may train and delete: where that is switched on, or from this machine to this machine."""
        if self.options.allow_training:
            return True
        if not request.state.is_local:
            return False
        named = host_name(request.headers.get("host", ""))
        return is_loopback(self.options.host) and is_loopback(named)

    def picker_choices(self) -> list[Choice]:
        """The models on offer with their scores, for a picker. Reads files: not on the event loop."""
        choices = []
        for offer in self.models.offers.values():
            known = summary(Run(offer.folder, offer.state))
            score = known.get("bits_per_byte")
            facts = [part for part in (known.get("model_name"), f"{score:.2f} bits/byte" if score else None) if part]
            choices.append((f"{offer.name} ({', '.join(facts)})" if facts else offer.name, offer.name))
        return choices

    async def refresh_pickers(self, *chosen: str | None) -> list[Any]:
        """The pickers with what is on offer now, each with its choice where that is still there."""
        choices = await asyncio.to_thread(self.picker_choices)
        names = [name for _, name in choices]
        first = names[0] if names else None
        return [gr.update(choices=choices, value=name if name in names else first) for name in chosen]


# -- what is told -------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """Text as HTML that shows it, whatever it is; nor is it read as a template."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


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
        raise refusal(error.detail if isinstance(error, RequestError) else str(error)) from None
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
