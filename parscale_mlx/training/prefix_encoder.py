"""Prefixes that a small MLP makes while they are trained, folded into plain ones at every step.

Prefix-Tuning's reparameterisation (arXiv 2101.00190, section 4.3) with the sizes, names and layout
of PEFT's ``PrefixEncoder`` under ``prefix_projection``, but for one thing: what the MLP makes is
added to the prefixes that the run starts from, and its last layer starts at zero. So a run starts
from the same model with it as without.
"""

from collections.abc import Iterator
from typing import Any

from parscale_mlx.model import Model

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from parscale_core.checkpoint.names import is_prefix

NAME = "prefix_encoder"


class PrefixEncoder(nn.Module):
    """An embedding for each stream and prefix token, and two layers from it to all prefixes.

    Args:
        model: a model with streams, whose prefixes are the start.
        hidden_size: between the two layers (PEFT's ``encoder_hidden_size``).
    """

    def __init__(self, model: Model, hidden_size: int):
        super().__init__()
        args = model.args
        self.shape = (args.streams, args.prefix_length, args.num_hidden_layers, 2,
                      args.num_key_value_heads, args.head_dim)  # fmt: skip
        width = 2 * args.num_hidden_layers * args.num_key_value_heads * args.head_dim
        self.embedding = nn.Embedding(args.streams * args.prefix_length, args.hidden_size)
        # MLX would start with numbers so small that all tokens were nearly alike; PyTorch does not.
        self.embedding.weight = mx.random.normal(self.embedding.weight.shape)
        last = nn.Linear(hidden_size, width)
        last.weight, last.bias = mx.zeros_like(last.weight), mx.zeros_like(last.bias)
        self.transform = [nn.Linear(args.hidden_size, hidden_size), nn.Tanh(), last]
        self.start = take_prefixes(model.parameters())
        self.set_dtype(self.start.dtype)
        self.freeze(recurse=False, keys=["start"])

    def __call__(self) -> mx.array:
        """Each layer's keys and values, [2 * layers, P, kv_heads, prefix_length, head_dim]."""
        x = self.embedding.weight
        for layer in self.transform:
            x = layer(x)
        made = x.reshape(self.shape).transpose(2, 3, 0, 4, 1, 5)
        return self.start + made.flatten(0, 1)

    def fold(self, model: Model) -> None:
        """Put the prefixes into a model."""
        prefixes = self()
        for n, layer in enumerate(model.layers):
            layer.self_attn.prefix_k, layer.self_attn.prefix_v = prefixes[2 * n : 2 * n + 2]

    def gradients(self, of_prefixes: mx.array) -> Any:
        """The gradients of its own weights from those of the prefixes, by the chain rule."""
        pull = nn.value_and_grad(self, lambda: (self() * of_prefixes).sum())
        return pull()[1]


def take_prefixes(tree: Any) -> mx.array:
    """The prefixes in a tree of a model's weights or gradients, as the encoder makes them."""
    return mx.stack(list(_prefixes(dict(tree_flatten(tree)))))


def instead_of_prefixes(tree: Any, encoder: Any) -> Any:
    """A tree of a model's weights or gradients with the encoder's in the place of the prefixes."""
    flat: dict[str, mx.array] = dict(tree_flatten(tree))
    others = {name: value for name, value in flat.items() if not is_prefix(name)}
    return tree_unflatten(list((others | dict(tree_flatten({NAME: encoder}))).items()))


def _prefixes(flat: dict[str, mx.array]) -> Iterator[mx.array]:
    layers = sum(name.endswith(".prefix_k") for name in flat)
    for n in range(layers):
        for part in "kv":
            yield flat[f"model.layers.{n}.self_attn.prefix_{part}"]
