"""Speed, memory and traffic of a model that ranks share, beside the whole of it on each of them."""

import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

from parscale_mlx.benchmark.models import QWEN2_5_HALF_B, Backbone, with_many_streams
from parscale_mlx.benchmark.timing import Side, measure, mlx_side
from parscale_mlx.load import identity
from parscale_mlx.model import Model
from parscale_mlx.parallel.ranks import all_sum, check_same, check_same_input, join
from parscale_mlx.parallel.shard import plan, shard_model
from parscale_mlx.parallel.traffic import Traffic, sent_bytes, traffic_of_a_token

import mlx.core as mx
from mlx.utils import tree_flatten
from parscale_core.checkpoint.folder import find_folder
from parscale_core.progress import progress_bar

ALONE = "one process"
ON_ITS_WAY = 0.1  # seconds after which what was handed to the system counts as sent


def measure_all(
    backbone: Backbone,
    modes: Sequence[str],
    *,
    streams: Sequence[int],
    prompt: Sequence[int],
    tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """What ``parscale bench --parallel`` prints, as plain data: times are this rank's.

    Args:
        modes: as for ``parscale_mlx.parallel.shard.plan``.
        streams, prompt, tokens, repeats: as in ``report.Plan``.

    Raises:
        FileNotFoundError, ValueError: as ``Backbone.load``; or the ranks were asked different
            things, or cannot share such a model.
    """
    group = join()
    if backbone.model is not None:
        for adapter in (None, *backbone.adapters):
            check_same(group, identity(find_folder(backbone.model), adapter))
    plain, config, adapters = backbone.load(QWEN2_5_HALF_B)
    check_same_input(group, "shape or option", config, modes, streams, prompt, tokens, repeats)
    for P, mode in ((P, mode) for P in streams for mode in modes):
        plan(mode, group, replace(plain.args, streams=P))  # refuses before long work
    rows = []
    turns = len(streams) * len(prompt) * (len(modes) + 1) * (repeats + 1)
    with progress_bar("measuring", turns, "turn") as bar:
        for P in streams:
            whole = with_many_streams(plain, P, adapters)
            for length in prompt:
                sides = measure_shares(
                    whole,
                    modes,
                    group,
                    prompt=length,
                    tokens=tokens,
                    repeats=repeats,
                    turn_done=bar.update,
                )
                alone = sides[ALONE]
                for name, side in sides.items():
                    speed_ups = {
                        f"{k}_speed_up": alone[k] / side[k] for k in ("first_token", "step")
                    }
                    rows.append({"streams": P, "prompt": length, "side": name} | side | speed_ups)
    return {
        "model": backbone.name("Qwen2.5-0.5B's shape, random weights"),
        "ranks": group.size(),
        "device": str(mx.default_device()),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "tokens": tokens,
        "repeats": repeats,
        "rows": rows,
    }


def measure_shares(
    model: Model,
    modes: Sequence[str],
    group: mx.distributed.Group,
    *,
    prompt: int,
    tokens: int,
    repeats: int,
    turn_done: Callable[[], object] = int,
) -> dict[str, dict[str, Any]]:
    """Let the whole model on every rank and its shares, a way each, take turns.

    Args:
        model: the whole model, the same on every rank.
        modes: as for ``parscale_mlx.parallel.shard.plan``.
        prompt, tokens: how many to read, and to generate after the first.
        repeats, turn_done: as for ``timing.measure``.

    Returns:
        For ``ALONE`` and by mode: this rank's ``timing.Timing``; and for one token the bytes
        that it sent, as Linux counted them (``sent_bytes``, elsewhere None) and as is expected of
        MLX's ring (``formula_bytes``), and the ``messages`` that wait for one another.

    Raises:
        ValueError: the model cannot be shared so.
    """
    mx.eval(model.parameters())
    models = {ALONE: model} | {mode: _share(model, mode, group) for mode in modes}
    ids = (mx.arange(prompt) % model.args.vocab_size)[None]
    sides = {name: mlx_side(each, ids, _sampler(each)) for name, each in models.items()}

    def end_turn() -> None:
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
