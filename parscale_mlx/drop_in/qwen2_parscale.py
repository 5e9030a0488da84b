# Apache-2.0. ParScale decoders (arXiv 2505.10475) for mlx-lm, in one file.
"""Qwen2, Qwen3, Llama and Mistral with P parallel streams.

The streams of a sequence are folded into the attention heads, [B, P * heads, L, head_dim], and
their prefixes are the first entries of the KV cache, so mlx-lm's generators, server, trainers and
quantisers take the model as any other.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as cache_module
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_lm.models.rope_utils import initialize_rope


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rope_traditional: bool = False
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    parscale_n: int = 1
    parscale_n_tokens: int = 48
    parscale_prefix: bool = False  # whether one stream has a prefix, too
    parscale_attn_smooth: float = 0.01

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if not self.head_dim:
            qwen3 = self.model_type.startswith("qwen3")
            self.head_dim = 128 if qwen3 else self.hidden_size // self.num_attention_heads
        if self.rope_parameters:
            self.rope_theta = self.rope_parameters.get("rope_theta", self.rope_theta)
            self.rope_scaling = self.rope_scaling or self.rope_parameters


class PinnedPrefix:
    """What keeps a prefix in a KV cache, besides being its first entries."""

    prefix_length = 0

    @property
    def state(self):
        return (*super().state, mx.array(self.prefix_length))

    @state.setter
    def state(self, value):
        *state, prefix_length = value
        self.prefix_length = int(prefix_length)
        super(PinnedPrefix, type(self)).state.fset(self, tuple(state))

    def trim(self, n):
        return super().trim(min(n, self.offset - self.prefix_length))


class PrefixKVCache(PinnedPrefix, KVCache):
    """A ``KVCache`` that starts with a prefix, [1, P * kv_heads, prefix_length, head_dim]."""

    def __init__(self, keys, values):
        super().__init__()
        super().update_and_fetch(keys, values)
        self.prefix_length = keys.shape[2]

    def update_and_fetch(self, keys, values):
        # The prefix is one row until the first tokens say how many rows there are.
        if self.keys.shape[0] == 1 and keys.shape[0] > 1:
            self.keys = mx.repeat(self.keys, keys.shape[0], axis=0)
            self.values = mx.repeat(self.values, keys.shape[0], axis=0)
        return super().update_and_fetch(keys, values)

    def to_quantized(self, group_size: int = 64, bits: int = 4):
        plain = super().to_quantized(group_size=group_size, bits=bits)
        quantized = PrefixQuantizedKVCache(group_size=group_size, bits=bits)
        quantized.keys, quantized.values, quantized.offset = plain.keys, plain.values, plain.offset
        quantized.prefix_length = self.prefix_length
        return quantized


class PrefixQuantizedKVCache(PinnedPrefix, QuantizedKVCache):
    """What a ``PrefixKVCache`` becomes where the KV cache is quantised."""


# load_prompt_cache looks a saved cache's class up by name among those of its own module.
for _cache in (PrefixKVCache, PrefixQuantizedKVCache):
    setattr(cache_module, _cache.__name__, _cache)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        dim, head_dim = args.hidden_size, args.head_dim
        self.n_heads, self.n_kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.scale = head_dim**-0.5

        # Qwen2 has biases on its queries, keys and values only; Llama on all four or none.
        qwen2 = args.model_type.startswith("qwen2")
        bias = qwen2 or args.attention_bias
        self.q_proj = nn.Linear(dim, self.n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.n_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_heads * head_dim, dim, bias=bias and not qwen2)
        if args.model_type.startswith("qwen3"):
            self.q_norm = nn.RMSNorm(head_dim, eps=args.rms_norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=args.rms_norm_eps)
        self.rope = initialize_rope(
            head_dim,
            base=args.rope_theta,
            traditional=args.rope_traditional,
            scaling_config=args.rope_scaling,
            max_position_embeddings=args.max_position_embeddings,
        )
        if args.parscale_n > 1 or args.parscale_prefix:
            shape = (args.parscale_n, self.n_kv_heads, args.parscale_n_tokens, head_dim)
            self.prefix_k = mx.zeros(shape)
            self.prefix_v = mx.zeros(shape)

    def prefix(self, dtype):
        """The prefix as a past: [1, P * kv_heads, prefix_length, head_dim], keys rotated.

        Prefix keys take no rotary embedding and no position. Since that embedding is relative,
        rotating all of them by the prefix's length and starting the tokens there is the same.
        """
        n = self.prefix_k.shape[2]
        rows = self.prefix_k.reshape(-1, 1, 1, self.prefix_k.shape[3])
        # Some rope_scaling types also scale what they rotate; at position 0 that is all they do.
        scale = self.rope(mx.ones_like(rows[:1]), offset=0)
        keys = self.rope(rows, offset=n) / scale
        shape = (1, -1, *self.prefix_k.shape[2:])
        return keys.reshape(shape).astype(dtype), self.prefix_v.reshape(shape).astype(dtype)

    def __call__(self, x, mask=None, cache=None):
        B, P, L, _ = x.shape

        # Streams are heads: head p * n_heads + h reads key-value head p * n_kv_heads + h // group.
        def heads(projected, n):
            return projected.reshape(B, P, L, n, -1).swapaxes(2, 3).reshape(B, P * n, L, -1)

        queries = heads(self.q_proj(x), self.n_heads)
        keys = heads(self.k_proj(x), self.n_kv_heads)
        values = heads(self.v_proj(x), self.n_kv_heads)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        past = self.prefix(keys.dtype) if cache is None and "prefix_k" in self else None
        offset = cache.offset if cache is not None else 0 if past is None else past[0].shape[2]
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        elif past is not None:
            past_keys, past_values = (mx.repeat(a, B, axis=0) for a in past)
            keys = mx.concatenate([past_keys, keys], axis=2)
            values = mx.concatenate([past_values, values], axis=2)
        out = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        out = out.reshape(B, P, self.n_heads, L, -1).swapaxes(2, 3).reshape(B, P, L, -1)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        dim, hidden, bias = args.hidden_size, args.intermediate_size, args.mlp_bias
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def __call__(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x, mask=None, cache=None):
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Aggregator(nn.Module):
    """Weighs the final hidden states of the streams, token by token (the paper's equation 3)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_streams, self.smooth = args.parscale_n, args.parscale_attn_smooth
        self.fc1 = nn.Linear(args.parscale_n * args.hidden_size, args.hidden_size)
        self.fc2 = nn.Linear(args.hidden_size, args.parscale_n)

    def __call__(self, h):
        """[B, L, d] from [B, P, L, d]."""
        scores = self.fc2(nn.silu(self.fc1(h.swapaxes(1, 2).flatten(2))))
        weights = mx.softmax(scores.astype(mx.float32), axis=-1)
        weights = weights * (1 - self.smooth) + self.smooth / self.n_streams
        return (h * weights.swapaxes(1, 2)[..., None]).sum(axis=1).astype(h.dtype)


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_streams = args.parscale_n
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [TransformerBlock(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        if args.parscale_n > 1:
            self.aggregator = Aggregator(args)

    def __call__(self, inputs, cache=None, input_embeddings=None):
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = cache or [None] * len(self.layers)
        if "prefix_k" in self.layers[0].self_attn and cache[0] is not None and cache[0].empty():
            raise ValueError("an empty KV cache lacks the prefix; make it with model.make_cache()")
        mask = create_attention_mask(h, cache[0])
        B, L, d = h.shape
        h = mx.broadcast_to(h[:, None], (B, self.n_streams, L, d))
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, c)
        h = self.norm(h)
        return self.aggregator(h) if "aggregator" in self else h[:, 0]


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None, input_embeddings=None):
        h = self.model(inputs, cache, input_embeddings)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(h)
        return self.lm_head(h)

    def make_cache(self):
        """KV caches that hold the prefix already."""
        if "prefix_k" not in self.layers[0].self_attn:
            return [KVCache() for _ in self.layers]
        dtype = self.model.norm.weight.dtype
        return [PrefixKVCache(*layer.self_attn.prefix(dtype)) for layer in self.layers]

    def sanitize(self, weights):
        renamed = {}
        for name, value in weights.items():
            if name == "model.aggregate_layer.0.weight":
                # Published columns run (hidden, stream), a concatenation of streams the other way.
                d, streams = value.shape[0], self.args.parscale_n
                value = value.reshape(d, -1, streams).swapaxes(1, 2).reshape(d, -1)
            name = name.replace("aggregate_layer.0", "aggregator.fc1")
            renamed[name.replace("aggregate_layer.2", "aggregator.fc2")] = value
        if self.args.tie_word_embeddings:
            renamed.pop("lm_head.weight", None)
        return {k: v for k, v in renamed.items() if not k.endswith("rotary_emb.inv_freq")}

    @property
    def quant_predicate(self):
        # The aggregator is small, and what it computes every token depends on.
        return lambda path, _: "aggregator" not in path

    @property
    def layers(self):
        return self.model.layers
