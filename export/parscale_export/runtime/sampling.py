"""Choosing the next token from logits, in numpy; the filters apply in mlx-lm's order."""

from collections.abc import Sequence

import numpy as np
from parscale_core.engine import Sampling

FEW = 1024  # likeliest tokens to sort at first, instead of a whole vocabulary


def generator(seed: int | None) -> np.random.Generator:
    """Random numbers of one request; any integer of 64 bits is a seed."""
    return np.random.default_rng(None if seed is None else seed % 2**64)


def choose(
    logits: np.ndarray,
    tokens: Sequence[int],
    sampling: Sampling,
    random: np.random.Generator,
    allowed: np.ndarray | None = None,
    spared: Sequence[int] = (),
) -> int:
    """The next token of one sequence.

    Args:
        logits: float32 [vocab]; left as they are.
        tokens: the sequence so far, prompt and answer.
        allowed: bool [vocab], which tokens a grammar lets come next; None for all.
        spared: tokens that XTC never leaves out.
    """
    logits = _adjust(logits, tokens, sampling)
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, logits = _candidates(logits, sampling, random, spared)
    weights = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    sums = np.cumsum(weights)
    place = np.searchsorted(sums, random.random() * sums[-1], side="right")
    return int(ids[min(place, len(ids) - 1)])


def takes_likeliest(sampling: Sampling) -> bool:
    """Whether nothing but the largest logit decides."""
    return sampling.temperature == 0 and not _adjusts(sampling)


def _adjusts(sampling: Sampling) -> bool:
    return bool(sampling.logit_bias) or any(_penalties(sampling))


def _penalties(sampling: Sampling) -> tuple[bool, bool, bool]:
    return (
        sampling.repetition_penalty != 1,
        sampling.presence_penalty != 0,
        sampling.frequency_penalty != 0,
    )


def _adjust(logits: np.ndarray, tokens: Sequence[int], sampling: Sampling) -> np.ndarray:
    """Logits with the bias and the penalties for recent tokens."""
    if not _adjusts(sampling):
        return logits
    penalties = _penalties(sampling)
    logits = logits.copy()
    if sampling.logit_bias:
        biased = np.fromiter(sampling.logit_bias, np.int64)
        logits[biased] += np.fromiter(sampling.logit_bias.values(), np.float32)
    if penalties[0]:
        seen = np.unique(tokens[-sampling.repetition_context :])
        found, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = np.where(found < 0, found * penalty, found / penalty)
    if penalties[1]:
        logits[np.unique(tokens[-sampling.presence_context :])] -= sampling.presence_penalty
    if penalties[2]:
        recent = tokens[-sampling.frequency_context :]
        seen, counts = np.unique(recent, return_counts=True)
        logits[seen] -= (sampling.frequency_penalty * counts).astype(np.float32)
    return logits


def _candidates(
    logits: np.ndarray, sampling: Sampling, random: np.random.Generator, spared: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be chosen, and their logits."""
    ids = np.arange(len(logits))
    if sampling.top_p < 1:
        ids = _likeliest(logits, sampling.top_p)
    if sampling.min_p > 0:
        ids = ids[logits[ids] >= logits[ids].max() + np.log(sampling.min_p)]
    if sampling.xtc_probability > 0 and random.random() <= sampling.xtc_probability:
        weights = _softmax(logits[ids])
        above = weights[weights > sampling.xtc_threshold]
        # All that are above the threshold go, but for the least likely of them.
        if len(above):
            ids = ids[(weights <= above.min()) | np.isin(ids, spared)]
    if 0 < sampling.top_k < len(ids):
        ids = ids[np.argpartition(-logits[ids], sampling.top_k - 1)[: sampling.top_k]]
    return ids, logits[ids]


def _likeliest(logits: np.ndarray, share: float) -> np.ndarray:
    """The likeliest tokens that together have this probability."""
    weights = _softmax(logits)
    for count in (FEW, len(weights)):
        ids = np.arange(len(weights))
        if count < len(weights):
            ids = np.argpartition(-weights, count)[:count]
        ids = ids[np.argsort(-weights[ids], kind="stable")]
        before = np.cumsum(weights[ids]) - weights[ids]
        if before[-1] >= share:
            break
    return ids[before < share]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()
