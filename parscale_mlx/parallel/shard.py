"""One model over several ranks: each runs some of the streams, or a share of every layer, or both.

Streams do not talk to each other before the aggregator, so a rank that runs P/N of them only has to
give its final hidden states to the others, once a forward pass. Tensor parallelism shares out the
heads and the hidden units of every layer instead (as mlx-lm's ``shard`` does) and must sum over the
ranks twice in every layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from parscale_mlx.model import Model
from parscale_mlx.parallel.ranks import all_gather, all_sum, gather_bytes

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace
from parscale_core.checkpoint.config import ModelConfig

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Share:
    """One of several parts of a whole.

    It passes for a group where MLX slices weights, which asks one for no more than this.
    """

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


@dataclass(frozen=True)
class Parallel:
    """How the ranks of a group share a model.

    Rank ``s * tensor + t`` runs share s of the streams with share t of every layer.

    Attributes:
        streams: shares of the streams.
        tensor: shares of every layer.
    """

    group: mx.distributed.Group
    streams: int
    tensor: int

    # Any: MLX declares that it wants a Group.
    @property
    def stream_share(self) -> Any:
        return Share(self.group.rank() // self.tensor, self.streams)

    @property
    def tensor_share(self) -> Any:
        return Share(self.group.rank() % self.tensor, self.tensor)

    def gather_streams(self, h: mx.array) -> mx.array:
        """All streams' hidden states, [B, P, L, d], from this rank's, [B, P / streams, L, d]."""
        # The ranks of one share of the streams all hold the same: each sends a part of it.
        part = mx.split(h, self.tensor, axis=-1)[self.tensor_share.number]
        parts = all_gather(part[None], self.group)
        _, B, p, L, d = parts.shape
        parts = parts.reshape(self.streams, self.tensor, B, p, L, d).transpose(2, 0, 3, 4, 1, 5)
        return parts.reshape(B, self.streams * p, L, self.tensor * d)

    def sum_shares(self, x: mx.array) -> mx.array:
        """The sum of [B, P / streams, L, d] over the ranks with the same streams."""
        if self.streams == 1:
            return all_sum(x, self.group)
        # Not every backend can split a group. Each share of the streams has a place of its own in
        # what the whole group sums.
        nothing, own = mx.zeros_like(x), self.stream_share.number
        places = [x if place == own else nothing for place in range(self.streams)]
        return all_sum(mx.stack(places), self.group)[own]

    @cached_property
    def ranks_agree(self) -> bool:
        """Whether every rank computes the same logits to the last bit."""
        # After the streams' exchange all ranks hold the same bits and go on alike, if their devices
        # are alike. A backend may sum in another order on every rank, though.
        info = mx.device_info()
        device = f"{mx.default_device()} {info.get('device_name')} {info.get('architecture')}"
        return self.tensor == 1 and len(set(gather_bytes(self.group, device.encode()))) == 1

    def sampler(self, sampler: Sampler | None) -> Sampler | None:
        """Make every rank take the tokens that rank 0 samples.

        Args:
            sampler: from log probabilities [B, vocab] to tokens [B]; None for the likeliest.
        """
        if self.ranks_agree:
            return sampler

        def rank_0s(logprobs: mx.array) -> mx.array:
            own = mx.argmax(logprobs, axis=-1) if sampler is None else sampler(logprobs)
            return all_gather(own, self.group)[: own.shape[0]]

        return rank_0s


class SummedLinear(nn.Module):
    """A linear layer of whose input every rank has a share, and whose output is summed."""

    def __init__(self, linear: nn.Module, parallel: Parallel):
        super().__init__()
        if "bias" in linear:
            self.bias = linear.pop("bias")
        count = parallel.tensor
        if "scales" in linear and linear.scales.shape[-1] % count:
            raise ValueError(
                f"a layer cannot be shared by {count} ranks: it is quantised in "
                f"{linear.scales.shape[-1]} groups of {linear.group_size}"
            )
        shard_inplace(linear, "sharded-to-all", group=parallel.tensor_share)
        self.linear = linear
        self.sum_shares = parallel.sum_shares

    def __call__(self, x: mx.array) -> mx.array:
        x = self.sum_shares(self.linear(x))
        return x + self.bias if "bias" in self else x


def plan(mode: str, group: mx.distributed.Group, args: ModelConfig) -> Parallel:
    """Decide who runs what.

    Args:
        mode: "streams" to share out the streams, and with more ranks than streams the layers of
            each stream too; "tensor" to share out the layers; "SxT" for S shares of the streams
            with T shares of the layers each.

    Raises:
        ValueError: the model cannot be shared so; the message says what can.
    """
    ranks, P = group.size(), args.streams
    if mode == "streams":
        streams = min(ranks, P)
        if P % streams or ranks % streams:
            fitting = ", ".join(str(n) for n in range(1, P + 1) if P % n == 0)
            raise ValueError(
                f"{P} streams cannot be shared by {ranks} ranks: "
                f"start {fitting} or a multiple of {P}"
            )
        tensor = ranks // streams
    elif mode == "tensor":
        streams, tensor = 1, ranks
    else:
        numbers = mode.split("x")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{mode!r} is none of streams, tensor and SxT (such as 4x2)")
        streams, tensor = map(int, numbers)
        if streams * tensor != ranks:
            raise ValueError(f"{mode} takes {streams * tensor} ranks, but there are {ranks}")
        if P % streams:
            raise ValueError(f"{P} streams cannot be shared out in {streams} shares")
    sizes = ("num_key_value_heads", "num_attention_heads", "intermediate_size", "hidden_size")
    for name in sizes:
        if getattr(args, name) % tensor:
            raise ValueError(
                f"a layer cannot be shared by {tensor} ranks: its {name} is {getattr(args, name)}"
            )
    return Parallel(group, streams, tensor)


def shard_model(model: Model, parallel: Parallel) -> None:
    """Leave a lazily loaded model only what this rank runs, and make it exchange the rest.

    Raises:
        ValueError: the groups of a quantised layer cannot be shared out.
    """
    model.parallel = parallel
    streams, tensor = parallel.stream_share, parallel.tensor_share
    if streams.count > 1:
        model.model.n_streams //= streams.count
        model.model.gather = parallel.gather_streams
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        # [P, kv_heads, prefix_length, head_dim]
        for axis, share in enumerate((streams, tensor)):
            shard_inplace(attention, _axis_of_prefixes(axis), group=share)
        if tensor.count == 1:
            continue
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            shard_inplace(linear, "all-to-sharded", group=tensor)
        for linear in (mlp.gate_proj, mlp.up_proj):
            shard_inplace(linear, "all-to-sharded", group=tensor)
        attention.update_modules({"o_proj": SummedLinear(attention.o_proj, parallel)})
        mlp.update_modules({"down_proj": SummedLinear(mlp.down_proj, parallel)})
        attention.n_heads //= tensor.count
        attention.n_kv_heads //= tensor.count


def _axis_of_prefixes(axis: int) -> Callable[[str, mx.array], int | None]:
    return lambda path, _: axis if path in ("prefix_k", "prefix_v") else None
