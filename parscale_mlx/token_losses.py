"""How well a model predicts given tokens."""

from typing import Any

from parscale_mlx.cross_entropy import cross_entropy
from parscale_mlx.model import Model

import mlx.core as mx
from parscale_core.checkpoint.tokenizer import check_tokens

# Tokens at a time: their logits, [batch, STEP, vocabulary] in float32, are what takes memory.
STEP = 256


def token_losses(model: Model, texts: list[list[int]]) -> list[list[float]]:
    """Cross entropy of each token but the first, in nats, given those before it.

    Args:
        texts: token ids, of any lengths.

    Raises:
        ValueError: the model has no embedding for a token.
    """
    for text in texts:
        check_tokens(text, model.args.vocab_size)
    longest = max(map(len, texts))
    ids = mx.array([text + [0] * (longest - len(text)) for text in texts])
    cache, parts = model.make_cache(), []
    for begin in range(0, longest - 1, STEP):
        targets = ids[:, begin + 1 : begin + 1 + STEP]
        logits = model(ids[:, begin : begin + targets.shape[1]], cache=cache)
        parts.append(cross_entropy(logits, targets))
        mx.eval(parts[-1], [c.state for c in cache])
    rows: Any = mx.concatenate(parts, axis=1).tolist()
    return [row[: len(text) - 1] for row, text in zip(rows, texts, strict=True)]
