"""The metrics at /metrics, for Prometheus. Each app has its own registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engines.model_pool import ModelPool

LAG_SAMPLE_SECONDS = 0.02
"""Time between two measurements of the event loop's lag."""
LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "any")
"""Values of the label `method`; "any" is for unknown addresses. All other methods are "other"."""
GAUGES = {
    "running": "Texts that are generated now.",
    "prefilling": "Prompts in prefill.",
    "waiting": "Texts that wait for a slot.",
    "cache_bytes": "Memory of the prefix cache.",
}
COUNTERS = {
    "steps": "Steps of the engine.",
    "drawn_tokens": "Tokens generated.",
    "prefilled_tokens": "Prompt tokens read.",
    "cached_tokens": "Prompt tokens from the prefix cache.",
}


class Metrics:
    """The metrics of one app."""

    def __init__(self, models: ModelPool) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "inkling_requests", "Requests answered.", ("route", "method", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "inkling_request_seconds", "Time from the first byte of a request to the end of the answer.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_text = Histogram(
            "inkling_first_text_seconds", "Time from the start of a generation to its first text.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.open = Gauge("inkling_open_requests", "Open requests.", registry=self.registry)
        self.lag = Histogram(
            "inkling_event_loop_lag_seconds", "Delay of due work on the event loop.",
            buckets=LAG_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.blocked = Histogram(
            "inkling_event_loop_blocked_seconds",
            "The part of the lag that is due to the server, not to other programs.",
            buckets=LAG_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Engines(models))

    async def sample_lag(self) -> None:
        """Measure the lag of the event loop until cancelled."""
        while True:
            begun, worked = time.monotonic(), time.process_time()
            await asyncio.sleep(LAG_SAMPLE_SECONDS)
            lag = max(0.0, time.monotonic() - begun - LAG_SAMPLE_SECONDS)
            self.lag.observe(lag)
            self.blocked.observe(min(lag, time.process_time() - worked))

    def answered(self, route: str, method: str, status: int, seconds: float, log_fields: dict[str, Any]) -> None:
        """Count a request."""
        self.requests.labels(route, method if method in METHODS else "other", str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        if "first_text_seconds" in log_fields:
            self.first_text.labels(route).observe(log_fields["first_text_seconds"])


class _Engines(Collector):
    """Metrics of the engines, read on request."""

    def __init__(self, models: ModelPool) -> None:
        self._models = models

    def describe(self) -> list[Metric]:
        """Nothing: the models are not known yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One sample per loaded model."""
        loaded = dict(self._models.loaded)
        stats = {name: model.worker.engine.stats() for name, model in loaded.items()}
        for family, names in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, text in names.items():
                metric = family(f"inkling_engine_{name}", text, labels=("model",))
                for model, figures in stats.items():
                    metric.add_metric((model,), getattr(figures, name))
                yield metric
        healthy = GaugeMetricFamily("inkling_engine_healthy", "1, or 0 if the engine is dead.", labels=("model",))
        for model, each in loaded.items():
            healthy.add_metric((model,), float(each.worker.healthy))
        yield healthy
        yield GaugeMetricFamily("inkling_models_loaded", "Models in memory.", len(loaded))
        yield GaugeMetricFamily(
            "inkling_models_memory_bytes", "Estimated memory of the loaded models.", self._models.memory_bytes
        )
        yield CounterMetricFamily("inkling_model_evictions", "Models that were evicted.", self._models.evictions)
