"""Time and memory of generation, sides by turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parscale_mlx.cache import Cache

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache


@dataclass(frozen=True)
class Side:
    """One of the things that are compared.

    Attributes:
        prefill: reads the prompt up to the first token; what it returns goes to ``decode``.
        decode: generates this many further tokens.
        weight_bytes: of its weights, whether it shares them with other sides or not.
    """

    prefill: Callable[[], Any]
    decode: Callable[[Any, int], None]
    weight_bytes: int = 0


@dataclass(frozen=True)
class Timing:
    """Medians: seconds to the first token and of a decoding step, and bytes at the peak."""

    first_token: float
    step: float
    peak_memory: int


def mlx_side(
    model: Any, ids: mx.array, sampler: Callable[[mx.array], mx.array] | None = None
) -> Side:
    """A model that generates greedily as mlx-lm does, from prompts [B, L] in one batch.

    As there, the logits of the last token only are computed, and a step is queued before the one
    before it is waited for.

    Args:
        sampler: from logits [B, vocab] to tokens [B]; None for the likeliest.
    """

    def next_token(tokens: mx.array, cache: list[Cache]) -> mx.array:
        logits = model(tokens, cache=cache)[:, -1]
        return (mx.argmax(logits, axis=-1) if sampler is None else sampler(logits))[:, None]

    def prefill() -> tuple[list[Cache], mx.array]:
        cache = make_prompt_cache(model)
        if ids.shape[1] > 1:
            model(ids[:, :-1], cache=cache)
            mx.eval([c.state for c in cache])
        token = next_token(ids[:, -1:], cache)
        mx.eval(token)
        return cache, token

    def decode(state: tuple[list[Cache], mx.array], tokens: int) -> None:
        cache, token = state
        for _ in range(tokens):
            before, token = token, next_token(token, cache)
            mx.async_eval(token)
            mx.eval(before)
        mx.eval(token)

    weights = dict(tree_flatten(model.parameters()))
    return Side(prefill, decode, sum(a.nbytes for a in weights.values()))


def measure(
    sides: dict[str, Side],
    *,
    repeats: int,
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    turn_done: Callable[[], object] = int,
) -> dict[str, Timing]:
    """Time the sides by turns, so that what else the machine does touches all of them alike.

    Args:
        repeats: turns, after one that warms up.
        clock: ``time.process_time`` where other programs take the cores.
        turn_done: called after each side's turn.
    """
    first: dict[str, list[float]] = {name: [] for name in sides}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for turn in range(repeats + 1):
        for name, side in sides.items():
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = clock()
            state = side.prefill()
            middle = clock()
            side.decode(state, tokens)
            end = clock()
            peaks[name] = side.weight_bytes + max(0, mx.get_peak_memory() - before)
            del state
            if turn > 0:
                first[name].append(middle - start)
                steps[name].append((end - middle) / tokens)
            turn_done()
    return {
        name: Timing(statistics.median(first[name]), statistics.median(steps[name]), peaks[name])
        for name in sides
    }
