"""The metrics of `/metrics`, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = {
    "running": "sequences being computed",
    "waiting": "sequences waiting to be computed",
    "cache_used_bytes": "bytes of cache pages that sequences own",
    "cache_total_bytes": "size of the cache",
    "prompt_tokens": "prompt tokens of finished sequences since the start",
    "cached_tokens": "prompt tokens found in the prefix cache since the start",
    "drafted_tokens": "tokens drafted by speculative decoding since the start",
    "accepted_tokens": "drafted tokens that were accepted since the start",
}


class Metrics:
    """The metrics of one server. Two servers in one process share nothing."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lamoe_requests",
            "responses by route and status (499: the client disconnected first)",
            ["route", "status"],
            registry=registry,
        )
        self.duration = Histogram(
            "lamoe_request_seconds",
            "seconds from the headers of a request to the end of its response",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "lamoe_time_to_first_token_seconds",
            "seconds from admission to the first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.token_interval = Histogram(
            "lamoe_time_per_output_token_seconds",
            "mean seconds per token of a finished sequence, not counting its first token",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "lamoe_rejected", "requests refused because a queue was full", registry=registry
        )
        self.disconnected = Counter(
            "lamoe_disconnected",
            "requests whose client disconnected before the end",
            registry=registry,
        )
        self.closed = Counter(
            "lamoe_closed_connections",
            "connections that the server closed, by reason",
            ["reason"],
            registry=registry,
        )
        self.tokens = Counter("lamoe_generated_tokens", "tokens generated", registry=registry)
        self.gauges = {
            name: Gauge(f"lamoe_{name}", help, registry=registry) for name, help in GAUGES.items()
        }

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one response."""
        self.requests.labels(route, str(status)).inc()
        self.duration.labels(route).observe(seconds)

    def text(self, stats: dict[str, Any]) -> bytes:
        """Write all metrics, after setting the gauges from `stats` (see `Service.stats`)."""
        values = {
            "running": stats["running"],
            "waiting": stats["waiting"],
            "cache_used_bytes": stats["cache"]["used_bytes"],
            "cache_total_bytes": stats["cache"]["total_bytes"],
            "prompt_tokens": stats["prompt_tokens"],
            "cached_tokens": stats["cached_tokens"],
            "drafted_tokens": stats["drafted"],
            "accepted_tokens": stats["accepted"],
        }
        for name, value in values.items():
            self.gauges[name].set(value)
        return generate_latest(self.registry)
