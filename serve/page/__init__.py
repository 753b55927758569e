"""The web page of `lm serve`, mounted next to the API and over the same engines.

context.py          Page: what every tab gets
tabs/               one file a tab
text_generation.py  generate and score texts, through the session that the API uses too
controls.py         controls for SamplingOptions; the model picker
text_editor.py      the text of the tab Write: its owner, and what each button does while a model writes
browser_storage.py  stores a visitor's text and choices in the browser
sheet_views.py      views of that text: surprise, one unit, copies
next_token.py       chart of the next token; its filters run in the browser
token_marks.py      tokens as coloured marks
line_chart.py       line charts
text_analysis.py    report of a text, and the loss of each of its parts
reproduce.py        the same text by command line, curl or Python
messages.py         HTML escaping, error messages, event handlers
uploads.py          which files a request may name
theme.py            theme and style sheet
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import gradio as gr
from fastapi import Depends, FastAPI

from serve.engines.model_pool import ModelPool
from serve.page.browser_storage import SCRIPT, choose_models_js, restore_at_load
from serve.page.context import Page
from serve.page.messages import attach
from serve.page.tabs import find_tabs
from serve.page.theme import CSS, THEME
from serve.page.uploads import only_uploads
from serve.settings import ServeOptions
from serve.training_queue import TrainingQueue

PATH = "/page"
"""Where the page is mounted."""

# Search engines must not list the page.
_HEAD = (
    '<meta name="robots" content="noindex"><meta name="color-scheme" content="light dark">'
    '<link rel="icon" href="/favicon.ico" type="image/svg+xml">' + SCRIPT
)
_MASTHEAD = "<div id='masthead'><b>Inkling</b><span>language models from your own text</span>{}</div>"
_LOGOUT = (
    "<form action='/logout' method='post' style='margin-left:auto'><button class='lg secondary'>Log out</button></form>"
)
CACHE_SECONDS = 3600
"""How long Gradio keeps a visitor's uploads and session after the visit."""


def mount(app: FastAPI) -> None:
    """Mount the page in the app of `serve.app.make_app`."""
    options: ServeOptions = app.state.options
    models: ModelPool = app.state.models
    training = TrainingQueue(models, options)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app):
            yield
            await training.close()

    app.router.lifespan_context = lifespan
    gr.mount_gradio_app(
        app, build(Page(models, options, training), keys=app.state.has_keys), PATH, footer_links=[], run_history=False,
        show_error=False, max_file_size=int(options.max_upload), ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, theme=THEME, css=CSS, head=_HEAD, app_kwargs={"dependencies": [Depends(only_uploads)]},
    )  # fmt: skip


def build(page: Page, *, keys: bool = False) -> gr.Blocks:
    """The page with all tabs; `keys` adds a button to log out."""
    blocks = gr.Blocks(
        title="Inkling", analytics_enabled=False, fill_width=True, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    )
    with blocks:
        gr.HTML(_MASTHEAD.format(_LOGOUT if keys else ""), apply_default_css=False)
        with gr.Tabs():
            tabs = []
            for tab in find_tabs():
                with gr.Tab(tab.label, id=tab.label.lower()) as container:
                    tab.build(page)
                tabs.append(container)
        restore_at_load(page, blocks)
        # The pickers get new runs whenever a visitor opens the page, a tab or a picker. The browser chooses which run
        # each picker shows: the visitor may pick another one before the answer arrives.
        pickers = [picker.component for picker in page.model_pickers.values()]
        offered = gr.JSON(None, visible=False)
        events = [blocks.load, *(tab.select for tab in tabs), *(picker.focus for picker in pickers)]
        refreshed = attach(events, page.refresh_models, None, [offered, *pickers])
        refreshed.then(
            None, [offered, *pickers], pickers, js=choose_models_js(list(page.model_pickers)), api_visibility="private"
        )  # fmt: skip
    blocks.queue(api_open=False, default_concurrency_limit=None)
    # Gradio checks file requests only after `launch`, which a mounted page does not call.
    blocks.has_launched = True
    return blocks
