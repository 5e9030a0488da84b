"""Refuse what cannot be answered, before any work."""

from collections.abc import Iterable
from dataclasses import fields
from math import isfinite

from parscale_core.engine.protocol import Engine
from parscale_core.engine.request import Request, Sampling

MOST_LOGPROBS = 20


def check(request: Request, engine: Engine) -> None:
    """Raise ValueError, naming the field, where an engine cannot answer a request."""
    _check_prompt(request, engine)
    check_sampling(request.sampling, engine.vocab_size)
    if request.streams is not None and request.streams not in engine.streams:
        raise ValueError(f"streams {request.streams}: this model has {_listed(engine.streams)}")
    if request.draft is not None and request.draft not in engine.drafts:
        has = f"there are {_listed(engine.drafts)}" if engine.drafts else "there is none"
        raise ValueError(f"draft {request.draft!r}: {has} for this model")
    if request.draft is not None and request.num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens {request.num_draft_tokens}: must be at least 1")
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
        raise ValueError(f"logprobs {request.logprobs}: must be 0 to {MOST_LOGPROBS}")
    if request.stream_weights and not engine.gives_stream_weights:
        raise ValueError("stream_weights: this model does not give them")
    if request.grammar is not None and (request.ignore_end or not engine.end_tokens):
        raise ValueError("grammar: an answer that follows a grammar ends with an end token")


def check_sampling(sampling: Sampling, vocab_size: int | None = None) -> None:
    """Raise ValueError where a field of the sampling is out of its range."""
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{field.name} {value}: must be a finite number")
    ranges = {
        "max_tokens": (sampling.max_tokens >= 1, "at least 1"),
        "temperature": (sampling.temperature >= 0, "at least 0"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1"),
        "top_k": (sampling.top_k >= 0, "at least 0"),
        "min_p": (0 <= sampling.min_p <= 1, "0 to 1"),
        "xtc_probability": (0 <= sampling.xtc_probability <= 1, "0 to 1"),
        "xtc_threshold": (0 <= sampling.xtc_threshold <= 0.5, "0 to 0.5"),
        "repetition_penalty": (sampling.repetition_penalty > 0, "above 0"),
        "repetition_context": (sampling.repetition_context >= 1, "at least 1"),
        "presence_context": (sampling.presence_context >= 1, "at least 1"),
        "frequency_context": (sampling.frequency_context >= 1, "at least 1"),
        "seed": (-(2**63) <= (sampling.seed or 0) < 2**64, "an integer of 64 bits"),
    }
    for name, (is_right, what) in ranges.items():
        if not is_right:
            raise ValueError(f"{name} {getattr(sampling, name)}: must be {what}")
    for token, bias in sampling.logit_bias.items():
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise ValueError(f"logit_bias: the model has no token {token}")
        if not isfinite(bias):
            raise ValueError(f"logit_bias of token {token}: must be a finite number")


def _check_prompt(request: Request, engine: Engine) -> None:
    if len(request.prompt) == 0:
        raise ValueError("prompt: has no tokens")
    outside = next((n for n in request.prompt if not 0 <= n < engine.vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"prompt: token {outside} is not in the model's vocabulary of {engine.vocab_size}"
        )
    longest = engine.context_length
    if longest is not None and len(request.prompt) >= longest:
        raise ValueError(
            f"prompt: {len(request.prompt)} tokens leave no room for an answer in the model's "
            f"context of {longest}"
        )


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
