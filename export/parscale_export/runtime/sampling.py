"""Choosing the next token from logits, in numpy; the filters apply in mlx-lm's order."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; temperature 0 takes the likeliest.

    Attributes:
        top_p: choose among the likeliest tokens that together have this probability.
        min_p: leave out tokens less likely than this share of the likeliest.
        top_k: choose among this many likeliest tokens; 0 for all.
        repetition_penalty: divide the (positive) logits of recent tokens by this.
        presence_penalty, frequency_penalty: subtracted from the logits of recent tokens, once or
            for every time they occurred.
        repetition_context: how many tokens are recent.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_context: int = 20


def choose(
    logits: np.ndarray, tokens: list[int], sampling: Sampling, random: np.random.Generator
) -> int:
    """The next token of one sequence, from its logits [vocab] and its tokens so far."""
    logits = _penalise(logits, tokens[-sampling.repetition_context :], sampling)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = _filter(logits.astype(np.float64), sampling)
    # The Gumbel trick: the largest of noisy logits is a sample from their softmax.
    return int((logits / sampling.temperature + random.gumbel(size=logits.shape)).argmax())


def _penalise(logits: np.ndarray, recent: list[int], sampling: Sampling) -> np.ndarray:
    penalties = (
        sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
    )  # fmt: skip
    if not recent or not any(penalties):
        return logits
    logits = logits.copy()
    seen, counts = np.unique(recent, return_counts=True)
    if sampling.repetition_penalty:
        found, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = np.where(found < 0, found * penalty, found / penalty)
    if sampling.presence_penalty:
        logits[seen] -= sampling.presence_penalty
    if sampling.frequency_penalty:
        logits[seen] -= sampling.frequency_penalty * counts
    return logits


def _filter(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same logits, -inf where a token is not to be chosen."""
    logits = logits - logits.max()
    if 0 < sampling.top_p < 1:
        order = np.argsort(-logits)
        probabilities = np.exp(logits[order])
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        logits[order[before >= sampling.top_p]] = -np.inf
    if sampling.min_p > 0:
        logits[logits < np.log(sampling.min_p)] = -np.inf
    if 0 < sampling.top_k < len(logits):
        logits[np.argpartition(-logits, sampling.top_k)[sampling.top_k :]] = -np.inf
    return logits
