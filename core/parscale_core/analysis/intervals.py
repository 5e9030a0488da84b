"""Confidence intervals of a mean loss per token, by resampling whole documents or windows.

Tokens of one text are not independent; texts are, more or less. The same resamples are used for
every model, so that a comparison of two says how sure their difference is.
"""

from dataclasses import dataclass

import numpy as np

RESAMPLES, CHUNK = 4000, 250


@dataclass
class Interval:
    low: float
    high: float


def bootstrap_means(losses: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Mean losses per token of resampled texts.

    Args:
        losses: summed over a text's tokens, [models, texts].
        counts: tokens of a text, [texts].

    Returns:
        [models, resamples].
    """
    random, texts = np.random.default_rng(seed), len(counts)
    parts = []
    for _ in range(0, RESAMPLES, CHUNK):
        drawn = random.multinomial(texts, np.full(texts, 1 / texts), size=CHUNK).T
        parts.append((losses @ drawn) / (counts @ drawn))
    return np.concatenate(parts, axis=1)


def percentiles(values: np.ndarray, level: float) -> Interval:
    """The interval that holds ``level`` of the values, with equal parts left out on both sides."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
