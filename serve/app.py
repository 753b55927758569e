"""The app: `make_app(ServeOptions(...))` gives what any ASGI server runs. There is no state outside it.

    /v1/completions  /v1/chat/completions  /v1/models  /v1/score
    /tokenize  /detokenize  /tokenizer_info
    /health  /health/ready  /metrics  /admin/reload  /docs  /openapi.json

`app.state.models` holds the engines, for whoever is mounted beside the API.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from lm.version import __version__
from serve import errors
from serve.gate import Gate
from serve.metrics import Metrics
from serve.models import Models
from serve.routes import chat, completions, documents, operations, score, tokens
from serve.settings import ServeOptions

SWITCH_SECONDS = 0.001
"""How long the engine's thread may keep Python from the event loop, instead of 5 ms."""


def make_app(options: ServeOptions) -> FastAPI:
    """The server's app, with its models found but none loaded.

    Raises:
        LMError: a named run does not exist, or the file of keys cannot be read.
    """
    models = Models(options)
    metrics = Metrics(models)
    keys = options.keys(os.environ.get("INKLING_API_KEY"))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sys.setswitchinterval(SWITCH_SECONDS)
        yield
        models.close()

    app = FastAPI(
        title="Inkling", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Small language models behind OpenAI's API. Errors have OpenAI's form.",
    )  # fmt: skip
    app.state.options, app.state.models, app.state.metrics = options, models, metrics
    app.state.has_keys = bool(keys)
    app.state.draining = False
    errors.install(app)
    for routes in (completions, chat, score, tokens, operations, documents):
        app.include_router(routes.router)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.cors_origin, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    app.add_middleware(Gate, options=options, keys=keys, metrics=metrics)
    return app
