"""Speed, memory and traffic of a model that ranks share, beside the whole of it on each of them."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict

from parscale_mlx.benchmark import Side, measure, mlx_side
from parscale_mlx.model import Model
from parscale_mlx.parallel.ranks import all_sum
from parscale_mlx.parallel.shard import plan, shard_model
from parscale_mlx.parallel.traffic import Traffic, sent_bytes, traffic_of_a_token

import mlx.core as mx
from mlx.utils import tree_flatten

ALONE = "one process"
ON_ITS_WAY = 0.1  # seconds after which what was handed to the system counts as sent


def measure_shares(
    model: Model,
    modes: Sequence[str],
    group: mx.distributed.Group,
    *,
    prompt: int,
    tokens: int,
    repeats: int,
    turn_done: Callable[[], object] = int,
) -> dict[str, dict]:
    """Let the whole model on every rank and its shares, a way each, take turns.

    Args:
        model: the whole model, the same on every rank.
        modes: as for ``parscale_mlx.parallel.shard.plan``.
        prompt, tokens: how many to read, and to generate after the first.
        repeats, turn_done: as for ``parscale_mlx.benchmark.measure``.

    Returns:
        For ``ALONE`` and by mode: this rank's ``benchmark.Timing``; and for one token the bytes
        that it sent, as Linux counted them (``sent_bytes``, elsewhere None) and as is expected of
        MLX's ring (``formula_bytes``), and the ``messages`` that wait for one another.

    Raises:
        ValueError: the model cannot be shared so.
    """
    mx.eval(model.parameters())
    models = {ALONE: model} | {mode: _share(model, mode, group) for mode in modes}
    ids = (mx.arange(prompt) % model.args.vocab_size)[None]
    sides = {name: mlx_side(each, ids, _sampler(each)) for name, each in models.items()}

    def end_turn():
        # A rank that is late would be waited for in the next side's time.
        mx.eval(all_sum(mx.array(1.0), group))
        turn_done()

    timings = measure(sides, repeats=repeats, tokens=tokens, turn_done=end_turn)
    results = {}
    for name, timing in timings.items():
        traffic = _expected(models[name])
        results[name] = asdict(timing) | {
            "sent_bytes": _count_sent(sides[name], tokens),
            "formula_bytes": traffic.bytes,
            "messages": traffic.steps,
        }
    return results


def _share(model: Model, mode: str, group: mx.distributed.Group) -> Model:
    """This rank's share of a model; arrays that are not sliced are the model's own."""
    weights = dict(tree_flatten(model.parameters()))
    share = deepcopy(model, {id(array): array for array in weights.values()})
    shard_model(share, plan(mode, group, model.args))
    mx.eval(share.parameters())
    return share


def _sampler(model: Model) -> Callable[[mx.array], mx.array] | None:
    return None if model.parallel is None else model.parallel.sampler(None)


def _expected(model: Model) -> Traffic:
    parallel = model.parallel
    if parallel is None:
        return Traffic(0, 0)
    return traffic_of_a_token(
        model.args,
        parallel.streams,
        parallel.tensor,
        itemsize=model.model.norm.weight.dtype.size,
        share_tokens=not parallel.ranks_agree,
    )


def _count_sent(side: Side, tokens: int) -> int | None:
    """Bytes that this rank sends for a token after the first."""
    state = side.prefill()
    time.sleep(ON_ITS_WAY)
    before = sent_bytes()
    side.decode(state, tokens)
    time.sleep(ON_ITS_WAY)
    after = sent_bytes()
    return None if before is None or after is None else (after - before) // tokens
