"""What a server allows; sizes in bytes, times in seconds."""

from dataclasses import dataclass

from parscale_core.engine import Request, Sampling


@dataclass(frozen=True)
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
        draft: what drafts where a request does not say, as in ``Request``.
        num_draft_tokens: tokens to draft at a time, where a request does not say.
    """

    max_concurrent: int = 32
    max_tokens: int = 2048
    max_request_bytes: int = 1 << 20
    timeout: float = 600.0
    read_timeout: float = 30.0
    temperature: float = Sampling.temperature
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    draft: int | str | None = None
    num_draft_tokens: int = Request.num_draft_tokens
