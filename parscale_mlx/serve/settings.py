"""What a server allows; sizes in bytes, times in seconds."""

from dataclasses import dataclass


@dataclass
class Settings:
    """Limits and defaults of a server.

    Attributes:
        max_concurrent: requests in work at a time; what comes beyond gets 429.
        max_tokens: tokens in an answer at most, and where a request does not say.
        max_request_bytes: of a request's body.
        timeout: from a request's arrival to the end of its answer.
        read_timeout: for a client to send its request, or to take what it is sent.
        temperature: where a request does not say.
        api_key: what clients have to send as their bearer token, if anything.
        allowed_origins: web pages of other origins that may call, as their ``Origin`` header says;
            "*" for all.
        num_draft_tokens: tokens that a draft model gives at a time, where a request does not say.
        prompt_cache_size: prompts and answers whose KV caches are kept for requests to come.
        prompt_cache_bytes: for all of them.
    """

    max_concurrent: int = 32
    max_tokens: int = 2048
    max_request_bytes: int = 1 << 20
    timeout: float = 600.0
    read_timeout: float = 30.0
    temperature: float = 0.0
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    num_draft_tokens: int = 3
    prompt_cache_size: int = 10
    prompt_cache_bytes: int = 4 << 30
