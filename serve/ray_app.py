"""The server on several machines: a Ray Serve application. Each replica is the app of `lm serve`.

    serve run serve.ray_app:application runs=shakespeare-gru min_replicas=2        # Ray's own command

Replicas share nothing. Each can answer any request, with the same text for the same seed. Ray starts more of them under
load, replaces one whose process or engine dies, and lets a replica finish its requests before it stops.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import Field, ValidationInfo, field_validator

# `ray.serve`, not this package.
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
"""Time between two health checks. Ray replaces a replica after three failed ones."""
HEALTH_TIMEOUT_SECONDS = 10.0
"""Time limit of a health check: a process that hangs does not answer. Ray's default is 30."""
START_ATTEMPTS = 3
"""Attempts to start a replica. Then the application fails with the reason."""


class RayOptions(ServeOptions):
    """Options of `lm serve`, and of the replicas."""

    min_replicas: int = Field(1, ge=0, description="Replicas without load; 0 starts one on the first request.")
    max_replicas: int | None = Field(
        None, ge=1, description="Replicas under load. Default: 4, or min_replicas if that is more."
    )
    target_requests: float = Field(16.0, gt=0, description="Open requests per replica. Above that, Ray adds replicas.")
    cpus: float = Field(1.0, ge=0, description="Cores of each replica, and threads of its kernels.")
    gpus: float = Field(0.0, ge=0, description="GPUs of each replica; may be a fraction.")

    @field_validator("runs", "api_key", "cors_origin", "allowed_host", "trusted_proxy", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        # The arguments of `serve run` are strings.
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("host", "port")
    @classmethod
    def _belongs_to_ray(cls, value: object) -> object:
        raise ValueError("belongs to Ray's proxies: set it under http_options")

    @field_validator("max_replicas")
    @classmethod
    def _not_fewer(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_replicas", 0)
        if value is not None and value < least:
            raise ValueError(f"must not be less than min_replicas {least}")
        return value


class _OneRequestId:
    """ASGI middleware that removes the app's x-request-id: Ray's proxy adds the same header."""

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
    """One process with the app and its own engines."""

    def __init__(self, options: RayOptions) -> None:
        start_logging()
        self._app = make_app(options)
        self._app.add_middleware(_OneRequestId)
        # Ray sends requests after __init__.
        self._app.state.models.preload()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app."""
        return self._app

    async def reconfigure(self, user_config: object) -> None:
        """Load runs that were trained again. Ray calls this in each replica when `user_config` changes."""
        await self._app.state.models.reload()

    def check_health(self) -> None:
        """Ray's health check.

        Raises:
            EngineDeadError: an engine died or hangs: Ray must replace this replica.
        """
        if dead := self._app.state.models.dead:
            raise EngineDeadError(f"The engine died of: {', '.join(dead)}")


def application(arguments: Mapping[str, Any]) -> ray_serve.Application:
    """The application for `serve run` and `serve deploy`.

    Args:
        arguments: fields of RayOptions. The default of `runs_dir` is INKLING_RUNS. Every machine needs the folder.

    Raises:
        ConfigError: an argument is unknown or out of range.
    """
    where = {"runs_dir": os.environ["INKLING_RUNS"]} if os.environ.get("INKLING_RUNS") else {}
    options = validate(RayOptions, {**where, **arguments})
    # Replicas run in other working folders.
    options = options.model_copy(update={"runs_dir": Path(options.runs_dir).absolute()})
    deployment = ray_serve.deployment(
        name="inkling",
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas or max(4, options.min_replicas),
            target_ongoing_requests=options.target_requests,
        ),
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        # Each replica has its own queue; Ray queues requests only while all of those are full.
        max_ongoing_requests=options.max_requests,
        max_queued_requests=options.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=options.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=START_ATTEMPTS,
        # The app has its own access log.
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment(Replica).bind(options)
