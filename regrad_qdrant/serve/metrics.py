"""What a server tells Prometheus. No label comes from a question, a filter or a document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from regrad_qdrant.serve.job import AnswersJobs, Outcome

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "regrad_requests", "Requests by route, model and status", ["route", "model", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "regrad_request_seconds", "Seconds of a whole request", ["route"], buckets=SECONDS, registry=self.registry
        )
        self._parts = Histogram(
            "regrad_part_seconds", "Seconds of a part of an answer", ["part"], buckets=SECONDS, registry=self.registry
        )
        self._rows = Histogram("regrad_batch_rows", "Rows of a forward pass", buckets=ROWS, registry=self.registry)
        self._tokens = Counter("regrad_tokens", "Tokens read and said", ["kind"], registry=self.registry)

    def watch(self, engine: AnswersJobs[Any]) -> None:
        """Show how many of its requests wait and run."""
        for name, what, value in (
            ("regrad_waiting_requests", "Requests without a row yet", lambda: engine.waiting),
            ("regrad_running_requests", "Requests with a row of a running batch", lambda: engine.running),
        ):
            Gauge(name, what, registry=self.registry).set_function(value)

    def batch(self, rows: int) -> None:
        self._rows.observe(rows)

    def request(self, route: str, model: str, status: int, seconds: float) -> None:
        self._requests.labels(route, model, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answered(self, outcome: Outcome) -> None:
        for part, seconds in outcome.seconds.items():
            self._parts.labels(part).observe(seconds)
        self._tokens.labels("prompt").inc(outcome.answer.prompt_tokens)
        self._tokens.labels("completion").inc(outcome.completion_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)
