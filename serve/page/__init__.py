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
line_chart.py       line charts by uPlot
comparisons.py      runs compared on a text, as by `lm compare`
text_analysis.py    report of a text, and the loss of each of its parts
reproduce.py        the same text by command line, curl or Python
messages.py         HTML escaping, error messages, event handlers
uploads.py          which files a request may name
theme.py            theme and style sheet
document.py         the HTML document around the components: masthead, links, projector mode; caching of files
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import gradio as gr
from fastapi import Depends, FastAPI
from starlette.middleware import Middleware

from serve.engines.model_pool import ModelPool
from serve.page import assets
from serve.page.browser_storage import SCRIPT, choose_models_js, restore_at_load, tab_link
from serve.page.context import Page
from serve.page.document import Document, DocumentMiddleware
from serve.page.messages import attach
from serve.page.tabs import Tab, find_tabs
from serve.page.theme import CSS, THEME
from serve.page.uploads import only_uploads
from serve.settings import ServeOptions
from serve.training_queue import TrainingQueue

PATH = "/page"
"""Where the page is mounted."""

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
    page = Page(models, options, training)
    blocks = build(page)
    document = Document([(tab_id(tab), tab.label) for tab in find_tabs()], page.links, logout=app.state.has_keys)
    # Before the page, whose mount takes all paths below its own.
    app.include_router(assets.router)
    gr.mount_gradio_app(
        app, blocks, PATH, footer_links=[], run_history=False, show_error=False, max_file_size=int(options.max_upload),
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, theme=THEME, css=CSS, head=SCRIPT,
        app_kwargs={
            "dependencies": [Depends(only_uploads)],
            "middleware": [Middleware(DocumentMiddleware, document=document)],
        },
    )  # fmt: skip


def tab_id(tab: Tab) -> str:
    """The name of a tab in links."""
    return tab.label.lower()


def build(page: Page) -> gr.Blocks:
    """The page with all tabs."""
    blocks = gr.Blocks(
        title="Inkling", analytics_enabled=False, fill_width=True, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    )
    with blocks:
        # On a narrow screen the tabs take two rows: none is hidden.
        with gr.Tabs(overflow_behavior="wrap"):
            tabs = []
            for tab in find_tabs():
                before = {*page.stored, *page.model_pickers}
                with gr.Tab(tab.label, id=tab_id(tab), elem_id=f"{tab_id(tab)}-tab") as container:
                    tab.build(page)
                page.links[tab_id(tab)] = tab_link(page, before=before)
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
