"""Routes for operators: /v1/models, /health, /health/ready, /metrics, /admin/reload."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from serve.api.dependencies import ERRORS, MetricsDep, ModelsDep
from serve.api.responses import ModelCard, ModelList
from serve.engines.model_pool import ModelPool
from serve.http_errors import RequestError

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    """The answer of /health."""

    status: str
    dead: list[str]
    skipped: list[str]


class Reloaded(BaseModel):
    """The answer of /admin/reload."""

    models: dict[str, str]


def _card(models: ModelPool, name: str) -> dict[str, Any]:
    model = models.loaded.get(name)
    try:
        created = models.available_runs[name].created
    except OSError:
        created = 0
    return {
        "id": name, "object": "model", "created": created, "owned_by": "inkling", "loaded": model is not None,
        "context_length": None if model is None else model.decoder.context_length,
        "chat_template": None if model is None else model.tokenizer.chat_template is not None,
    }  # fmt: skip


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(models: ModelsDep) -> Response:
    """The available models."""
    skipped = [{"id": name, "reason": reason} for name, reason in models.skipped.items()]
    data = [_card(models, name) for name in models.available_runs]
    return JSONResponse({"object": "list", "data": data, "skipped": skipped})


@router.get("/v1/models/{model}", response_model=ModelCard, responses=ERRORS)
async def show_model(models: ModelsDep, model: Annotated[str, Path(description="The model's id.")]) -> Response:
    """One model."""
    return JSONResponse(_card(models, models.resolve(model)))


def _health(models: ModelPool, *, draining: bool) -> Response:
    status = "dead" if models.dead else "draining" if draining else "ok"
    # A run that cannot be loaded does not make the server unhealthy.
    content = {"status": status, "dead": models.dead, "skipped": list(models.skipped)}
    return JSONResponse(content, 200 if status == "ok" else 503)


@router.get("/health", response_model=Health, responses={503: {"model": Health, "description": "An engine died."}})
async def health(models: ModelsDep) -> Response:
    """Liveness: 200, or 503 if an engine died or hangs. Then restart the server or reload its models."""
    return _health(models, draining=False)


@router.get(
    "/health/ready", response_model=Health,
    responses={503: {"model": Health, "description": "An engine died, or the server is shutting down."}},
)  # fmt: skip
async def ready(request: Request, models: ModelsDep) -> Response:
    """Readiness: live, and not shutting down."""
    return _health(models, draining=request.app.state.draining.is_set())


@router.get(
    "/metrics", responses={**ERRORS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_model=None, response_class=Response,
)  # fmt: skip
async def metrics(app_metrics: MetricsDep) -> Response:
    """Metrics for Prometheus."""
    return Response(generate_latest(app_metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.post("/admin/reload", response_model=Reloaded, responses={**ERRORS, 403: ERRORS[401]})
async def reload(request: Request, models: ModelsDep) -> Response:
    """Load runs that were trained again, and list new ones. Open streams keep their weights."""
    if not request.app.state.has_keys:
        raise RequestError(403, "Without an API key, a reload over HTTP is not allowed: send the server SIGHUP.")
    return JSONResponse({"models": await models.reload()})
