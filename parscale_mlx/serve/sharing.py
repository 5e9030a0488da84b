"""What the ranks of a shared model tell each other while they serve."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

from parscale_mlx.parallel import Parallel

from mlx_lm import server as mlx_lm_server
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)


def to_bytes(request: CompletionRequest, args: GenerationArguments, **more: Any) -> bytes:
    """What another rank has to know of a request; mlx-lm would pickle all of it.

    Args:
        more: further fields for the request.
    """
    told = {field.name: getattr(request, field.name) for field in fields(CompletionRequest)}
    return json.dumps([told | more, asdict(args)]).encode()


def from_bytes(data: bytes) -> tuple[dict[str, Any], GenerationArguments]:
    """The fields of the request that ``to_bytes`` was given, and its arguments."""
    request, args = json.loads(data)
    logits = LogitsProcessorArguments(**args["logits"])
    if logits.logit_bias is not None:
        logits.logit_bias = {int(token): bias for token, bias in logits.logit_bias.items()}
    parts = {
        "model": ModelDescription(**args["model"]),
        "sampling": SamplingArguments(**args["sampling"]),
        "logits": logits,
    }
    return request, GenerationArguments(**args | parts)


@contextmanager
def same_tokens(parallel: Parallel | None) -> Iterator[None]:
    """While this runs, every rank takes the tokens that rank 0 samples."""
    if parallel is None or parallel.ranks_agree:
        yield
        return
    # mlx-lm's server makes its samplers by itself and asks nobody.
    make = mlx_lm_server._make_sampler
    mlx_lm_server._make_sampler = lambda *args: parallel.sampler(make(*args))
    try:
        yield
    finally:
        mlx_lm_server._make_sampler = make
