"""What a server tells Prometheus of itself."""

from time import monotonic

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

__all__ = ["CONTENT_TYPE", "AnswerWatch", "Metrics"]


class Metrics:
    """Counters and times of one server; tokens by the full name of the model."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "parscale_requests",
            "Requests by path and HTTP status (499: the client hung up)",
            ["path", "status"],
            registry=registry,
        )
        self.waiting = Gauge(
            "parscale_requests_waiting",
            "Requests without a token of their answer yet",
            registry=registry,
        )
        self.running = Gauge(
            "parscale_requests_running", "Requests being answered", registry=registry
        )
        self.prompt_tokens = Counter(
            "parscale_prompt_tokens", "Tokens of prompts", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "parscale_cached_prompt_tokens",
            "Tokens of prompts whose keys and values were in the prompt cache",
            ["model"],
            registry=registry,
        )
        self.generated_tokens = Counter(
            "parscale_generated_tokens", "Tokens generated", ["model"], registry=registry
        )
        self.first_token = Histogram(
            "parscale_time_to_first_token_seconds",
            "From a request's arrival to its answer's first token",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.token_rate = Histogram(
            "parscale_answer_tokens_per_second",
            "Tokens per second of one answer after its first token",
            ["model"],
            buckets=RATES,
            registry=registry,
        )
        self.cache_bytes = Gauge(
            "parscale_prompt_cache_bytes", "KV caches kept for later prompts", registry=registry
        )
        self.cached_prompts = Gauge(
            "parscale_prompt_cache_sequences", "Sequences they are of", registry=registry
        )
        memory = Gauge("parscale_memory_bytes", "What MLX holds in arrays", registry=registry)
        memory.set_function(mx.get_active_memory)
        peak = Gauge("parscale_peak_memory_bytes", "What it held at most", registry=registry)
        peak.set_function(mx.get_peak_memory)

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)


class AnswerWatch:
    """Counts and times one answer, from its request's arrival; a context that ends with it.

    Args:
        arrived: on ``time.monotonic``'s clock.
    """

    def __init__(self, metrics: Metrics, model: str, arrived: float):
        self.metrics, self.model, self.arrived = metrics, model, arrived
        self.tokens, self.first, self.last = 0, 0.0, 0.0

    def token(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Take note of a token that has come."""
        self.tokens, self.last = self.tokens + 1, monotonic()
        self.metrics.generated_tokens.labels(self.model).inc()
        if self.tokens == 1:
            self.first = self.last
            self.metrics.waiting.dec()
            self.metrics.running.inc()
            self.metrics.prompt_tokens.labels(self.model).inc(prompt_tokens)
            self.metrics.cached_tokens.labels(self.model).inc(cached_tokens)
            self.metrics.first_token.labels(self.model).observe(self.first - self.arrived)

    def __enter__(self) -> "AnswerWatch":
        self.metrics.waiting.inc()
        return self

    def __exit__(self, *_) -> None:
        (self.metrics.running if self.tokens else self.metrics.waiting).dec()
        if self.last > self.first:
            rate = (self.tokens - 1) / (self.last - self.first)
            self.metrics.token_rate.labels(self.model).observe(rate)
