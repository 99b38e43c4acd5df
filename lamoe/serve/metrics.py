"""What /metrics tells, in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server; nothing is shared between two in one process."""

    def __init__(self):
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "lamoe_requests",
            "answers by route and status (499: the client left first)",
            ["route", "status"],
            registry=r,
        )
        self.duration = Histogram(
            "lamoe_request_seconds",
            "from the headers of a request to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=r,
        )
        self.first_token = Histogram(
            "lamoe_time_to_first_token_seconds",
            "from admission to the first token",
            buckets=SECONDS,
            registry=r,
        )
        self.between = Histogram(
            "lamoe_time_per_output_token_seconds",
            "mean over a finished sequence, without its first token",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
            registry=r,
        )
        self.rejected = Counter(
            "lamoe_rejected", "requests refused because the queue was full", registry=r
        )
        self.left = Counter(
            "lamoe_disconnected", "requests whose client left before the end", registry=r
        )
        self.tokens = Counter("lamoe_generated_tokens", "tokens generated", registry=r)
        self.gauges = {
            name: Gauge(f"lamoe_{name}", help, registry=r)
            for name, help in (
                ("running", "sequences computing"),
                ("waiting", "sequences waiting for a place"),
                ("cache_used_bytes", "cache pages that sequences own"),
                ("cache_total_bytes", "size of the cache"),
                ("prompt_tokens", "prompt tokens of finished sequences, since the start"),
                ("cached_tokens", "of those, found in the cache"),
                ("drafted_tokens", "tokens of drafts, since the start"),
                ("accepted_tokens", "of those, right"),
            )
        }

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.duration.labels(route).observe(seconds)

    def text(self, stats: dict) -> bytes:
        """The exposition, with the gauges set from the engine's numbers (Service.stats)."""
        cache = stats["cache"]
        for name, value in (
            ("running", stats["running"]),
            ("waiting", stats["waiting"]),
            ("cache_used_bytes", cache["used_bytes"]),
            ("cache_total_bytes", cache["total_bytes"]),
            ("prompt_tokens", stats["prompt_tokens"]),
            ("cached_tokens", stats["cached_tokens"]),
            ("drafted_tokens", stats["drafted"]),
            ("accepted_tokens", stats["accepted"]),
        ):
            self.gauges[name].set(value)
        return generate_latest(self.registry)
