"""What the routes need from the app, and the error responses that they document."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from serve.engines.model_pool import ModelPool
from serve.http_errors import ErrorBody
from serve.metrics import Metrics
from serve.settings import ServeOptions

_DESCRIPTIONS: dict[int | str, str] = {
    400: "The request is wrong.",
    401: "The API key is missing or wrong.",
    404: "The model does not exist.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    429: "Too many requests. Retry after the time in Retry-After.",
    500: "The server failed.",
    503: "There is no memory for the model, or the server is shutting down.",
    504: "The request took too long.",
    # Replaces FastAPI's own 422, which this server never sends.
    "default": "Any other error.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _DESCRIPTIONS.items()
}
STREAMED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {}}},
}
"""`ERRORS`, and that the answer may be server-sent events."""


def _from_app(name: str) -> Any:
    """Injects an object of `app.state`."""

    # A coroutine: FastAPI would call a plain function in a thread.
    async def get(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(get)


async def _log_fields(request: Request) -> Any:
    return request.state.log_fields


ModelsDep = Annotated[ModelPool, _from_app("models")]
OptionsDep = Annotated[ServeOptions, _from_app("options")]
MetricsDep = Annotated[Metrics, _from_app("metrics")]
LogFieldsDep = Annotated[dict[str, Any], Depends(_log_fields)]
"""Fields of the request's line in the access log."""
