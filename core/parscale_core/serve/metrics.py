"""What a server tells Prometheus of itself."""

from collections.abc import Callable, Mapping
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# What the engine says of itself, by its names for it.
ENGINE = {
    "kept_bytes": ("parscale_prompt_cache_bytes", "KV caches kept for later prompts"),
    "kept_caches": ("parscale_prompt_cache_sequences", "Sequences they are of"),
    "active_bytes": ("parscale_memory_bytes", "What the engine holds in arrays"),
    "peak_bytes": ("parscale_peak_memory_bytes", "What it held at most"),
}

__all__ = ["CONTENT_TYPE", "AnswerWatch", "Metrics"]


class Metrics:
    """Counters and times of one server; tokens by the full name of the model.

    Args:
        statistics: the engine's.
    """

    def __init__(self, statistics: Callable[[], Mapping[str, float]]):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "parscale_requests",
            "Requests by path and HTTP status (499: the client hung up)",
            ["path", "status"],
            registry=registry,
        )

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"parscale_requests_{name}", text, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"parscale_{name}", text, ["model"], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"parscale_{name}", text, ["model"], buckets=buckets, registry=registry
            )

        self.waiting = gauge("waiting", "Requests without a token of their answer yet")
        self.running = gauge("running", "Requests being answered")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter(
            "cached_prompt_tokens", "Tokens of prompts whose keys and values were kept"
        )
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its answer's first token",
            SECONDS,
        )
        self.token_rate = histogram(
            "answer_tokens_per_second", "Tokens per second of one answer after its first", RATES
        )
        for key, (name, text) in ENGINE.items():
            if key in statistics():
                # The name is bound now, not when the loop is over.
                Gauge(name, text, registry=registry).set_function(
                    lambda key=key: statistics()[key]  # type: ignore[misc]
                )

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)


class AnswerWatch:
    """Counts and times the answer to one request, from its arrival.

    Args:
        arrived: on ``time.monotonic``'s clock.
    """

    def __init__(self, metrics: Metrics, model: str, arrived: float, prompt_tokens: int):
        self.metrics, self.model, self.arrived = metrics, model, arrived
        self.prompt_tokens = prompt_tokens
        self.tokens, self.first, self.last = 0, 0.0, 0.0
        metrics.waiting.inc()

    def token(self, cached_tokens: int) -> None:
        """Take note of a token that has come."""
        self.tokens, self.last = self.tokens + 1, monotonic()
        self.metrics.generated_tokens.labels(self.model).inc()
        if cached_tokens:
            self.metrics.cached_tokens.labels(self.model).inc(cached_tokens)
        if self.tokens == 1:
            self.first = self.last
            self.metrics.waiting.dec()
            self.metrics.running.inc()
            self.metrics.prompt_tokens.labels(self.model).inc(self.prompt_tokens)
            self.metrics.first_token.labels(self.model).observe(self.first - self.arrived)

    def end(self) -> None:
        (self.metrics.running if self.tokens else self.metrics.waiting).dec()
        if self.last > self.first:
            rate = (self.tokens - 1) / (self.last - self.first)
            self.metrics.token_rate.labels(self.model).observe(rate)
