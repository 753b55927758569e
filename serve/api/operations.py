"""What operators ask: /v1/models, /health, /health/ready, /metrics, /admin/reload."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from serve.api.dependencies import ERRORS, ModelsDep
from serve.api.responses import ModelCard, ModelList
from serve.engines.model_pool import ModelPool
from serve.http_errors import RequestError
from serve.metrics import Metrics

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    """What /health says."""

    status: str
    dead: list[str]
    skipped: list[str]


class Reloaded(BaseModel):
    """What /admin/reload did."""

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
    }  # fmt: skip


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(models: ModelsDep) -> Response:
    """The models that may be asked for."""
    skipped = [{"id": name, "reason": reason} for name, reason in models.skipped.items()]
    data = [_card(models, name) for name in models.available_runs]
    return JSONResponse({"object": "list", "data": data, "skipped": skipped})


@router.get("/v1/models/{model}", response_model=ModelCard, responses=ERRORS)
async def show_model(models: ModelsDep, model: Annotated[str, Path(description="Its id.")]) -> Response:
    """One model."""
    return JSONResponse(_card(models, models.resolve(model)))


def _health(models: ModelPool, *, draining: bool) -> Response:
    dead = [name for name, model in models.loaded.items() if not model.worker.healthy]
    status = "dead" if dead else "draining" if draining else "ok"
    # A run that cannot be loaded makes no server unhealthy: the others are served.
    told = {"status": status, "dead": dead, "skipped": list(models.skipped)}
    return JSONResponse(told, 200 if status == "ok" else 503)


@router.get("/health", response_model=Health, responses={503: {"model": Health, "description": "An engine died."}})
async def health(models: ModelsDep) -> Response:
    """Live: 200 unless an engine died or hangs, and then for good: restart or reload the server."""
    return _health(models, draining=False)


@router.get(
    "/health/ready", response_model=Health,
    responses={503: {"model": Health, "description": "An engine died, or the server is about to end."}},
)  # fmt: skip
async def ready(request: Request, models: ModelsDep) -> Response:
    """Ready: live, and taking requests."""
    return _health(models, draining=request.app.state.draining.is_set())


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


@router.get(
    "/metrics", responses={**ERRORS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_model=None, response_class=Response,
)  # fmt: skip
async def metrics(figures: Annotated[Metrics, Depends(_metrics)]) -> Response:
    """Figures for Prometheus."""
    return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.post("/admin/reload", response_model=Reloaded, responses={**ERRORS, 403: ERRORS[401]})
async def reload(request: Request, models: ModelsDep) -> Response:
    """Swap in runs that were trained again, and list new ones; streams go on with the weights they began with."""
    if not request.app.state.has_keys:
        raise RequestError(403, "This server has no API key, so that nobody may reload it here: send it SIGHUP.")
    return JSONResponse({"models": await models.reload()})
