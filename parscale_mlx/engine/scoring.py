"""How likely given texts are."""

from collections.abc import Iterator, Sequence
from typing import Any

from parscale_mlx.cache import Cache
from parscale_mlx.cross_entropy import cross_entropy
from parscale_mlx.engine.mlx_lm_parts import trim_prompt_cache
from parscale_mlx.engine.work import Work
from parscale_mlx.model import Model

import mlx.core as mx

STEP = 256  # tokens whose logits, [STEP, vocabulary] in float32, are held at a time


def score(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[float, bool]]:
    """As ``parscale_core.engine.Engine.score``: equal contexts in a row are computed once."""
    last: list[int] | None = None
    caches: list[Cache] = []
    for context, continuation in pairs:
        if last != list(context):
            last, caches = list(context), model.make_cache()
            for begin in range(0, len(last) - 1, Work.prefill_step):
                model(mx.array([last[:-1][begin : begin + Work.prefill_step]]), caches)
                mx.eval([cache.state for cache in caches])
        ids = mx.array([[last[-1], *continuation]])
        total, is_likeliest = 0.0, True
        for begin in range(0, len(continuation), STEP):
            targets = ids[:, begin + 1 : begin + 1 + STEP]
            logits = model(ids[:, begin : begin + targets.shape[1]], caches)
            loss: Any = cross_entropy(logits, targets).sum().item()
            total -= loss
            is_likeliest = is_likeliest and bool(mx.all(logits.argmax(axis=-1) == targets).item())
        trim_prompt_cache(caches, len(continuation))
        yield total, is_likeliest
