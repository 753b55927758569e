"""What Prometheus reads at /metrics. Each app has a registry of its own."""

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
"""Time between two samples of the event loop's lag."""
LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "any")
"""What is counted by name, "any" standing for the requests to no known address. Others are counted as one."""
GAUGES = {
    "running": "Texts that are being written.",
    "prefilling": "Prompts that are being read.",
    "waiting": "Texts that wait for a place in the batch.",
    "cache_bytes": "Memory of the starts of prompts that are kept.",
}
COUNTERS = {
    "steps": "Steps of the engine.",
    "drawn_tokens": "Tokens drawn.",
    "prefilled_tokens": "Tokens of prompts read.",
    "cached_tokens": "Tokens of prompts that did not have to be read again.",
}


class Metrics:
    """The figures of one app."""

    def __init__(self, models: ModelPool) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "inkling_requests", "Requests answered.", ("route", "method", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "inkling_request_seconds", "From a request's first byte to its answer's last.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_text = Histogram(
            "inkling_first_text_seconds", "From a request to the first text that was written for it.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.open = Gauge("inkling_open_requests", "Requests in work.", registry=self.registry)
        self.lag = Histogram(
            "inkling_event_loop_lag_seconds", "How late the event loop does what is due: each request waits for that.",
            buckets=LAG_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.blocked = Histogram(
            "inkling_event_loop_blocked_seconds",
            "The part of the lag that the server's own work makes, and not other programs of the machine.",
            buckets=LAG_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Engines(models))

    async def sample_lag(self) -> None:
        """Observe the lag of the running event loop, until cancelled."""
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
    """What the engines say of themselves, when asked."""

    def __init__(self, models: ModelPool) -> None:
        self._models = models

    def describe(self) -> list[Metric]:
        """Nothing: the names are known once there are engines."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One sample a loaded model."""
        loaded = dict(self._models.loaded)
        stats = {name: model.worker.engine.stats() for name, model in loaded.items()}
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"inkling_engine_{name}", text, labels=("model",))
            for model, figures in stats.items():
                gauge.add_metric((model,), getattr(figures, name))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"inkling_engine_{name}", text, labels=("model",))
            for model, figures in stats.items():
                counter.add_metric((model,), getattr(figures, name))
            yield counter
        healthy = GaugeMetricFamily("inkling_engine_healthy", "1, or 0 once it is dead.", labels=("model",))
        for model, each in loaded.items():
            healthy.add_metric((model,), float(each.worker.healthy))
        yield healthy
        yield GaugeMetricFamily("inkling_models_loaded", "Models in memory.", len(loaded))
        yield GaugeMetricFamily(
            "inkling_models_memory_bytes", "What they are reckoned to take.", self._models.memory_bytes
        )
        yield CounterMetricFamily(
            "inkling_model_evictions", "Models that made room for others.", self._models.evictions
        )
