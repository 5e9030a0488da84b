"""Log-probabilities, and what a request that asks for them is told."""

import numpy as np

from parscale_core.engine.request import Logprob


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64 [..., vocabulary], of logits of the same shape."""
    logprobs = logits.astype(np.float64)
    logprobs -= logprobs.max(axis=-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(axis=-1, keepdims=True))
    return logprobs


def told(logits: np.ndarray, token: int, count: int) -> tuple[float, tuple[Logprob, ...]]:
    """The log-probability of a token, and the ``count`` likeliest tokens with theirs.

    Args:
        logits: [vocabulary], the model's own; any constant may have been added to them, so
            log-probabilities will do.
    """
    logprobs = log_softmax(logits)
    count = min(count, len(logprobs))
    likeliest = np.argpartition(-logprobs, count - 1)[:count] if count else np.arange(0)
    # Equal ones in the order of their ids, so that the same logits always tell the same.
    order = likeliest[np.lexsort((likeliest, -logprobs[likeliest]))]
    top = tuple(Logprob(int(n), float(logprobs[n])) for n in order)
    return float(logprobs[token]), top
