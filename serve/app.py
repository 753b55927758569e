"""The ASGI app: `make_app(ServeOptions(...))`. All state belongs to the app.

    /v1/completions  /v1/chat/completions  /v1/models  /v1/score
    /tokenize  /detokenize  /tokenizer_info
    /health  /health/ready  /metrics  /admin/reload  /docs  /openapi.json

and the page, after `add_page(app)`:

    /page/  /login  /logout

`app.state.models` has the models, also for apps that are mounted next to the API.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from lm.errors import ConfigError
from lm.version import __version__
from serve import http_errors
from serve.api import chat, completions, docs, operations, scoring, token_routes
from serve.engines.model_pool import ModelPool
from serve.metrics import Metrics
from serve.security import login
from serve.security.gate import Gate
from serve.security.hosts import Proxies
from serve.security.login import Keys
from serve.settings import ServeOptions

SWITCH_SECONDS = 0.001
"""Longest time that an engine's thread keeps the event loop from running; Python's default is 5 ms."""


def make_app(options: ServeOptions, *, may_be_empty: bool = False) -> FastAPI:
    """The app, with no model loaded yet.

    Args:
        may_be_empty: accept a runs folder without runs.

    Raises:
        LMError: a named run does not exist, or the key file cannot be read.
    """
    models = ModelPool(options, may_be_empty=may_be_empty)
    metrics = Metrics(models)
    keys = Keys(options.keys(os.environ.get("INKLING_API_KEY")))
    proxies = _proxies(options, os.environ.get("FORWARDED_ALLOW_IPS", ""))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sys.setswitchinterval(SWITCH_SECONDS)
        sampling = asyncio.create_task(metrics.sample_lag())
        yield
        sampling.cancel()
        models.close()

    app = FastAPI(
        title="Inkling", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Small language models behind OpenAI's API, with its form of errors.",
    )  # fmt: skip
    app.state.options, app.state.models, app.state.metrics = options, models, metrics
    app.state.keys, app.state.has_keys = keys, bool(keys)
    app.state.draining = asyncio.Event()
    http_errors.install(app)
    for routes in (completions, chat, scoring, token_routes, operations):
        app.include_router(routes.router)
    docs.install(app)
    cors = None
    if options.cors_origin:
        rules: dict[str, Any] = {
            "allow_origins": options.cors_origin, "allow_methods": ["*"], "allow_headers": ["*"],
            "expose_headers": ["x-request-id", "retry-after"],
        }  # fmt: skip
        app.add_middleware(CORSMiddleware, **rules)
        # For the error answers of the gate, which is outside the middleware.
        cors = functools.partial(CORSMiddleware, **rules)
    app.add_middleware(Gate, options=options, keys=keys, metrics=metrics, proxies=proxies, cors=cors)
    return app


def _proxies(options: ServeOptions, environment: str) -> Proxies:
    """The trusted proxies, also those in uvicorn's variable FORWARDED_ALLOW_IPS.

    Raises:
        ConfigError: the variable has another form.
    """
    try:
        return Proxies((*options.trusted_proxy, *(part.strip() for part in environment.split(",") if part.strip())))
    except ValueError as error:
        raise ConfigError(f"FORWARDED_ALLOW_IPS: {error}: give addresses or networks, with commas.") from None


def add_page(app: FastAPI) -> None:
    """Add the page and its login form.

    Raises:
        ImportError: a package for the page is not installed.
    """
    # Imported here: it takes seconds, and not every server has the page.
    from serve.page import mount

    mount(app)
    app.include_router(login.router)
