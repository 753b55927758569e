"""The server past one machine: a Ray Serve application whose every replica is the app of `lm serve`.

    serve run serve.ray_app:application runs=shakespeare-gru min_replicas=2        # Ray's own command

Replicas share nothing: any of them answers any request, and the same request and seed give the same text from each. Ray
starts more of them under load, replaces one whose process or engine dies, and lets one that it no longer needs finish
what it began. docs/scaling.md has the commands.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import Field, ValidationInfo, field_validator

# Not this package: the one called `ray.serve`.
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm.config import validate
from serve.app import make_app
from serve.engines.worker import EngineDeadError
from serve.logs import start_logging
from serve.settings import ServeOptions

HEALTH_SECONDS = 2.0
"""Between two looks at a replica's engines. Ray replaces the replica after the third bad one."""
HEALTH_TIMEOUT_SECONDS = 10.0
"""How long a replica may take to answer such a look: a process that hangs does not answer. Ray's own is 30."""
START_ATTEMPTS = 3
"""What cannot be loaded thrice will not be loaded: the application fails and says why."""


class RayOptions(ServeOptions):
    """Options of `lm serve`, and how many replicas there are."""

    min_replicas: int = Field(1, ge=0, description="Replicas that are there without load; 0 starts one when asked.")
    max_replicas: int | None = Field(
        None, ge=1, description="Replicas under load. Default: 4, or min_replicas where that is more."
    )
    target_requests: float = Field(
        16.0, gt=0, description="Requests in work that each replica should have: with more, replicas are added."
    )
    cpus: float = Field(1.0, ge=0, description="Cores that each replica reserves; its kernels use as many threads.")
    gpus: float = Field(0.0, ge=0, description="GPUs that each replica reserves; a part of one is fine.")

    @field_validator("runs", "api_key", "cors_origin", "allowed_host", "trusted_proxy", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        # Arguments of `serve run` are all text.
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("host", "port")
    @classmethod
    def _rays_own(cls, value: object) -> object:
        raise ValueError("belongs to Ray's proxies: set it under http_options")

    @field_validator("max_replicas")
    @classmethod
    def _not_fewer(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_replicas", 0)
        if value is not None and value < least:
            raise ValueError(f"must not be less than min_replicas {least}")
        return value


class _OneRequestId:
    """ASGI middleware: Ray's proxy puts the request's id on every answer, so the app's own, which is the same, goes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [each for each in message["headers"] if each[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, pass_on)


@ray_serve.ingress()
class Replica:
    """One process with the server's app and engines of its own."""

    def __init__(self, options: RayOptions) -> None:
        start_logging()
        self._made = make_app(options)
        self._made.add_middleware(_OneRequestId)
        # Ray sends requests once this has returned.
        self._made.state.models.preload()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What answers requests."""
        return self._made

    async def reconfigure(self, user_config: object) -> None:
        """Swap in runs that were trained again: Ray calls this in each replica whose `user_config` changed."""
        await self._made.state.models.reload()

    def check_health(self) -> None:
        """Asked by Ray again and again.

        Raises:
            EngineDeadError: an engine died or hangs, so that another replica has to take this one's place.
        """
        models = self._made.state.models
        if not models.healthy:
            dead = [name for name, model in models.loaded.items() if not model.worker.healthy]
            raise EngineDeadError(f"The engine is dead of: {', '.join(dead)}")


def application(arguments: Mapping[str, Any]) -> ray_serve.Application:
    """The application that `serve run` and `serve deploy` build from `serve.ray_app:application`.

    Args:
        arguments: fields of RayOptions. `runs_dir` is INKLING_RUNS unless given; it has to be there on every machine.

    Raises:
        ConfigError: an argument is unknown or out of bounds.
    """
    where = {"runs_dir": os.environ["INKLING_RUNS"]} if os.environ.get("INKLING_RUNS") else {}
    options = validate(RayOptions, {**where, **arguments})
    # Replicas run in folders of Ray's choice.
    options = options.model_copy(update={"runs_dir": Path(options.runs_dir).absolute()})
    deployment = ray_serve.deployment(
        name="inkling",
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas or max(4, options.min_replicas),
            target_ongoing_requests=options.target_requests,
        ),
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        # Each replica has a queue of its own; Ray holds requests back only while all of those are full.
        max_ongoing_requests=options.max_requests,
        max_queued_requests=options.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=options.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=START_ATTEMPTS,
        # The app's own log has a line for each request.
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment(Replica).bind(options)
