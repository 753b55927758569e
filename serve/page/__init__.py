"""The page: what `lm serve` shows in a browser, mounted beside the API and over the same engines.

    site.py       what tabs are given, theme, how errors are told
    files.py      which files a visitor may name
    drawing.py    from what a visitor asks for to the engine, and back
    controls.py   the knobs, made from SamplingOptions; the model picker
    sheet.py      the sheet of the tab Write: who owns its text, and what each button does while a model writes
    keeping.py    what a visitor typed and chose, kept in the browser
    marks.py      tokens as coloured marks; what might come next as bars
    curves.py     curves, of a training or along a text
    surprise.py   what a text that was read tells
    sharing.py    the same text from the command line, curl or Python
    tabs/         one file a tab: `build(page)`

A new tab is a file in tabs/ and a line in TABS.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import gradio as gr
from fastapi import Depends, FastAPI

from serve.engines.model_pool import ModelPool
from serve.page.files import only_uploads
from serve.page.keeping import SCRIPT, restore, settle
from serve.page.site import CSS, PATH, QUIET, THEME, Page, told
from serve.page.tabs import compare, look, perplexity, runs, train, write
from serve.settings import ServeOptions
from serve.training_queue import TrainingQueue

TABS = {
    "Write": write.build, "Look": look.build, "Perplexity": perplexity.build, "Compare": compare.build,
    "Train": train.build, "Runs": runs.build,
}  # fmt: skip

# Nobody is told that this page exists; a link on it leads nowhere but here.
_HEAD = (
    '<meta name="robots" content="noindex"><meta name="color-scheme" content="light dark">'
    '<link rel="icon" href="/favicon.ico" type="image/svg+xml">' + SCRIPT
)
_MASTHEAD = "<div id='masthead'><b>Inkling</b><span>a small language model of your own</span>{}</div>"
_LOGOUT = (
    "<form action='/logout' method='post' style='margin-left:auto'><button class='lg secondary'>Log out</button></form>"
)
STATE_SECONDS = 3600
"""How long what a visitor left behind is kept."""


def mount(app: FastAPI) -> None:
    """Put the page into the app that `serve.app.make_app` made."""
    options: ServeOptions = app.state.options
    models: ModelPool = app.state.models
    jobs = TrainingQueue(models, options)
    page = Page(models, options, jobs)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app):
            yield
            await jobs.close()

    app.router.lifespan_context = lifespan
    gr.mount_gradio_app(
        app, build(page, keys=app.state.has_keys), PATH, footer_links=[], run_history=False, show_error=False,
        max_file_size=int(options.max_upload), ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        theme=THEME, css=CSS, head=_HEAD, app_kwargs={"dependencies": [Depends(only_uploads)]},
    )  # fmt: skip


def build(page: Page, *, keys: bool = False) -> gr.Blocks:
    """All tabs."""
    blocks = gr.Blocks(
        title="Inkling", analytics_enabled=False, fill_width=True, delete_cache=(STATE_SECONDS, STATE_SECONDS)
    )
    with blocks:
        gr.HTML(_MASTHEAD.format(_LOGOUT if keys else ""), apply_default_css=False)
        with gr.Tabs():
            tabs = []
            for name, build_tab in TABS.items():
                with gr.Tab(name, id=name.lower()) as tab:
                    build_tab(page)
                tabs.append(tab)
        restore(page, blocks)
        # What was trained meanwhile is there as soon as somebody looks. Which of them a picker shows is for the browser
        # to decide: a visitor may pick another one before the answer is there.
        pickers = [picker.component for picker in page.model_pickers.values()]
        shelf = gr.JSON(None, visible=False)
        looks = [blocks.load, *(tab.select for tab in tabs), *(picker.focus for picker in pickers)]
        offered = gr.on(looks, told(page.offer), None, [shelf, *pickers], **QUIET)
        offered.then(
            None, [shelf, *pickers], pickers, js=settle(list(page.model_pickers)), api_visibility="private"
        )  # fmt: skip
    blocks.queue(api_open=False, default_concurrency_limit=None)
    # Only then does Gradio look at which files it is asked for; nobody launches what is mounted.
    blocks.has_launched = True
    return blocks
