"""The app: `make_app(ServeOptions(...))` gives what any ASGI server runs. There is no state outside it.

    /v1/completions  /v1/chat/completions  /v1/models  /v1/score
    /tokenize  /detokenize  /tokenizer_info
    /health  /health/ready  /metrics  /admin/reload  /docs  /openapi.json

and, once `add_page(app)` was called, the page:

    /page/  /login  /logout

`app.state.models` holds the engines, for whoever is mounted beside the API.
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
"""How long the engine's thread may keep Python from the event loop, instead of 5 ms."""


def make_app(options: ServeOptions, *, may_be_empty: bool = False) -> FastAPI:
    """The server's app, with its models found but none loaded.

    Args:
        may_be_empty: no run at all is fine, since there soon will be one.

    Raises:
        LMError: a named run does not exist, or the file of keys cannot be read.
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
        description="Small language models behind OpenAI's API. Errors have OpenAI's form.",
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
        # What the gate refuses does not come so far.
        cors = functools.partial(CORSMiddleware, **rules)
    app.add_middleware(Gate, options=options, keys=keys, metrics=metrics, proxies=proxies, cors=cors)
    return app


def _proxies(options: ServeOptions, environment: str) -> Proxies:
    """The proxies that are trusted; uvicorn's variable names some too.

    Raises:
        ConfigError: the variable names something else.
    """
    try:
        return Proxies((*options.trusted_proxy, *(part.strip() for part in environment.split(",") if part.strip())))
    except ValueError as error:
        raise ConfigError(f"FORWARDED_ALLOW_IPS: {error}: give addresses or networks, with commas.") from None


def add_page(app: FastAPI) -> None:
    """Put the page beside the API, with the way in.

    Raises:
        ImportError: what it needs is not installed.
    """
    # It takes seconds, and not every server has it.
    from serve.page import mount

    mount(app)
    app.include_router(login.router)
