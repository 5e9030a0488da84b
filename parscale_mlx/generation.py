"""mlx-lm's generators over a model with a prefix.

They work on our models unmodified, but for two things. Given a model that makes its own caches,
mlx-lm ignores ``max_kv_size``: here it makes a rotating cache that keeps the prefix. And mlx-lm
drops an answer's first space, which is the answer's own where a prompt is raw text: here a text is
its tokens decoded together.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parscale_mlx.cache import Cache
from parscale_mlx.model import Model

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchResponse, GenerationResponse
from parscale_core.engine.detokenize import Detokenizer


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    *,
    max_kv_size: int | None = None,
    prompt_cache: list[Cache] | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generate text piece by piece, as ``mlx_lm.stream_generate`` does and with its options.

    Args:
        max_kv_size: keep about this many tokens in a rotating KV cache, besides the prefix.
        prompt_cache: caches from ``model.make_cache()``, continued and updated in place.

    Raises:
        ValueError: both ``max_kv_size`` and ``prompt_cache``, or ``max_kv_size`` with a draft
            model (speculative decoding has to trim its cache, a rotating one cannot be).
    """
    if max_kv_size is not None:
        if prompt_cache is not None:
            raise ValueError("max_kv_size cannot resize a given prompt_cache; leave one out")
        if options.get("draft_model") is not None:
            raise ValueError("max_kv_size cannot be used with a draft model")
        prompt_cache = model.make_cache(max_kv_size=max_kv_size)
    if model.parallel is not None:
        options["sampler"] = model.parallel.sampler(options.get("sampler"))
    return _detokenized(
        mlx_lm.stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, prompt_cache=prompt_cache, **options
        ),
        Detokenizer(tokenizer),
    )


def _detokenized(
    responses: Iterator[GenerationResponse], detokenizer: Detokenizer
) -> Iterator[GenerationResponse]:
    for response in responses:
        text = "" if response.finish_reason == "stop" else detokenizer.push(response.token)
        rest = detokenizer.flush() if response.finish_reason else ""
        yield replace(response, text=text + rest)


def generate(model: Model, tokenizer: Any, prompt: str | list[int], **options: Any) -> str:
    """Generate a whole answer; options as for ``stream_generate``."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **options))


def batch_generate(
    model: Model, tokenizer: Any, prompts: list[list[int]], **options: Any
) -> BatchResponse:
    """Generate for several prompts (token ids) in one continuous batch: ``mlx_lm.batch_generate``.

    Raises:
        ValueError: ``max_kv_size`` is given; mlx-lm's rotating batch cache would evict the prefix.
    """
    if options.get("max_kv_size") is not None:
        raise ValueError("max_kv_size cannot be used in a batch: it would evict the prefix")
    if model.parallel is not None:
        options["sampler"] = model.parallel.sampler(options.get("sampler"))
    return mlx_lm.batch_generate(model, tokenizer, prompts, **options)
