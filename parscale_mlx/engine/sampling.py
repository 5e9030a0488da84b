"""Choosing a token from log-probabilities: as mlx-lm's samplers, with random numbers of one's own.

mlx-lm compiles its samplers with their settings as constants, which on the CPU costs a second of a
C++ compiler for each new temperature; these are plain operations.
"""

import math
import secrets
from collections.abc import Callable, Sequence

import mlx.core as mx
from parscale_core.engine import Sampling

Sampler = Callable[[mx.array], mx.array]


def random_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbits(64)


def likeliest(logprobs: mx.array) -> mx.array:
    """Greedy decoding: from log-probabilities [n, vocabulary] to tokens [n]."""
    return mx.argmax(logprobs, axis=-1)


def make_sampler(sampling: Sampling, spared: Sequence[int]) -> Sampler | None:
    """From log-probabilities [n, vocabulary] to tokens [n]; None for the likeliest.

    Args:
        sampling: the seed must be set, where the temperature is not 0.
        spared: tokens that XTC never leaves out.
    """
    if sampling.temperature == 0:
        return None
    assert sampling.seed is not None
    key = mx.random.key(sampling.seed % 2**64)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, own, xtc = mx.random.split(key, 3)
        logprobs = _filtered(logprobs.astype(mx.float32), sampling, spared, xtc)
        return mx.random.categorical(logprobs / sampling.temperature, key=own)

    return sample


def _filtered(
    logprobs: mx.array, sampling: Sampling, spared: Sequence[int], key: mx.array
) -> mx.array:
    if sampling.top_p < 1:
        logprobs = _top_p(logprobs, sampling.top_p)
    if sampling.min_p > 0:
        least = logprobs.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
    if sampling.xtc_probability > 0:
        logprobs = _xtc(logprobs, sampling, spared, key)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        least = mx.topk(logprobs, sampling.top_k, axis=-1).min(axis=-1, keepdims=True)
        logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
    return logprobs


def _top_p(logprobs: mx.array, top_p: float) -> mx.array:
    ascending = mx.sort(logprobs, axis=-1)
    above = mx.cumsum(mx.exp(ascending), axis=-1, reverse=True, inclusive=False)
    total = mx.exp(ascending).sum(axis=-1, keepdims=True)
    dropped = (above >= top_p * total).sum(axis=-1, keepdims=True)
    least = mx.take_along_axis(ascending, dropped, axis=-1)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def _xtc(logprobs: mx.array, sampling: Sampling, spared: Sequence[int], key: mx.array) -> mx.array:
    """Leave out all likely tokens but the least likely of them, at random."""
    probabilities = mx.softmax(logprobs, axis=-1)
    likely = probabilities > sampling.xtc_threshold
    least = mx.where(likely, probabilities, mx.inf).min(axis=-1, keepdims=True)
    left_out = probabilities > least
    if spared:
        left_out[..., mx.array(list(spared))] = False
    applies = mx.random.uniform(shape=(logprobs.shape[0], 1), key=key) < sampling.xtc_probability
    return mx.where(applies & left_out, -mx.inf, logprobs)
