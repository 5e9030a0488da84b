"""ParScale decoders (arXiv 2505.10475): Qwen, Llama and their kin with P parallel streams, in MLX.

The P streams of a sequence are folded into the attention heads, so that a batch stays a batch for
every cache, sampler and server of mlx-lm; their prefixes are the first entries of the KV cache.
"""

from collections.abc import Callable
from typing import Any

from parscale_mlx.cache import Cache, Caches, PrefixKVCache, PrefixRotatingKVCache

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.names import PUBLISHED_COLUMNS, internal_columns, internal_name


class Rotary(nn.Module):
    """The rotary embedding of ``config.json``, as ``parscale_core.checkpoint.rope`` computes it."""

    def __init__(self, args: ModelConfig):
        super().__init__()
        rotation = args.rope.rotation()
        self.traditional, self.scale, self.original = (
            args.rope_traditional, rotation.scale, rotation.original
        )  # fmt: skip
        self._periods = mx.array(1 / rotation.frequencies, mx.float32)
        self._long_periods = None
        if rotation.long_frequencies is not None:
            self._long_periods = mx.array(1 / rotation.long_frequencies, mx.float32)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate ``x`` [B, heads, L, head_dim], whose first token has position ``offset``.

        LongRoPE rotates a row by its long frequencies once its last token is beyond the original
        context.
        """
        x = x if self.scale == 1 else x * self.scale
        if self._long_periods is None:
            return self._rotate(x, offset, self._periods)
        is_long = mx.array(offset + x.shape[2] > self.original).reshape(-1, 1, 1, 1)
        long = self._rotate(x, offset, self._long_periods)
        return mx.where(is_long, long, self._rotate(x, offset, self._periods))

    def _rotate(self, x: mx.array, offset: int | mx.array, periods: mx.array) -> mx.array:
        return mx.fast.rope(
            x, x.shape[-1], traditional=self.traditional, base=None, scale=1.0, offset=offset,
            freqs=periods,
        )  # fmt: skip


class Unrotated(nn.Module):
    """In the place of a rotary embedding in a layer that has none."""

    original = 0

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return x


class Attention(nn.Module):
    def __init__(self, args: ModelConfig, rotated: bool = True):
        super().__init__()
        dim, head_dim = args.hidden_size, args.head_dim
        self.n_heads = args.num_attention_heads
        self.n_kv_heads = args.num_key_value_heads
        self.scale = args.attention_scale

        bias = args.qkv_bias
        self.q_proj = nn.Linear(dim, self.n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.n_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_heads * head_dim, dim, bias=args.output_bias)
        if args.qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=args.rms_norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=args.rms_norm_eps)
        self.rope: Rotary | Unrotated = Rotary(args) if rotated else Unrotated()
        if args.prefix_length:
            shape = (args.streams, self.n_kv_heads, args.prefix_length, head_dim)
            self.prefix_k = mx.zeros(shape)
            self.prefix_v = mx.zeros(shape)
        # No prefix follows frequencies that change: it stays as it is, and tokens start at 0.
        self.shift = args.prefix_length if self.rope.original else 0

    def prefix(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The prefix as a past: keys and values, [1, P * kv_heads, prefix_length, head_dim].

        A prefix key takes no rotary embedding. Since that embedding is relative, rotating every
        one of them by the prefix's length and starting the tokens there gives the same scores.
        """
        keys = rotate(self.rope, self.prefix_k, self.prefix_k.shape[2] - self.shift)
        shape = (1, -1, *self.prefix_k.shape[2:])
        return keys.reshape(shape).astype(dtype), self.prefix_v.reshape(shape).astype(dtype)

    def __call__(
        self, x: mx.array, mask: mx.array | None = None, cache: Cache | None = None
    ) -> mx.array:
        B, P, L, _ = x.shape

        # Streams are heads: head p * n_heads + h reads key-value head p * n_kv_heads + h // group.
        def heads(projected: mx.array, n: int) -> mx.array:
            return projected.reshape(B, P, L, n, -1).swapaxes(2, 3).reshape(B, P * n, L, -1)

        queries = heads(self.q_proj(x), self.n_heads)
        keys = heads(self.k_proj(x), self.n_kv_heads)
        values = heads(self.v_proj(x), self.n_kv_heads)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)

        if cache is not None:
            queries = self.rope(queries, offset=cache.offset - self.shift)
            keys = self.rope(keys, offset=cache.offset - self.shift)
            keys, values = cache.update_and_fetch(keys, values)
        elif "prefix_k" in self:
            past_keys, past_values = (mx.repeat(a, B, axis=0) for a in self.prefix(keys.dtype))
            offset = past_keys.shape[2]
            queries = self.rope(queries, offset=offset - self.shift)
            keys = mx.concatenate([past_keys, self.rope(keys, offset=offset - self.shift)], axis=2)
            values = mx.concatenate([past_values, values], axis=2)
        else:
            queries, keys = self.rope(queries), self.rope(keys)

        out = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        out = out.reshape(B, P, self.n_heads, L, -1).swapaxes(2, 3).reshape(B, P, L, -1)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, args: ModelConfig):
        super().__init__()
        dim, hidden, bias = args.hidden_size, args.intermediate_size, args.mlp_bias
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelConfig, layer: int):
        super().__init__()
        self.residual_scale = args.residual_scale
        self.self_attn = Attention(args, args.rotated_layers[layer])
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: mx.array | None = None, cache: Cache | None = None
    ) -> mx.array:
        h = x + self._scaled(self.self_attn(self.input_layernorm(x), mask, cache))
        return h + self._scaled(self.mlp(self.post_attention_layernorm(h)))

    def _scaled(self, x: mx.array) -> mx.array:
        return x if self.residual_scale == 1 else x * self.residual_scale


class Aggregator(nn.Module):
    """Weighs the streams of each token (paper section 2.2, equation 3, with label smoothing)."""

    def __init__(self, args: ModelConfig):
        super().__init__()
        self.n_streams, self.smooth = args.streams, args.smoothing
        self.fc1 = nn.Linear(args.streams * args.hidden_size, args.hidden_size)
        self.fc2 = nn.Linear(args.hidden_size, args.streams)

    def weights(self, h: mx.array) -> mx.array:
        """The streams' weights, float32 [B, L, P], from their hidden states [B, P, L, d]."""
        x = h.swapaxes(1, 2).flatten(2)
        logits = self.fc2(nn.silu(self.fc1(x)))
        weights = mx.softmax(logits.astype(mx.float32), axis=-1)
        return weights * (1 - self.smooth) + self.smooth / self.n_streams

    def __call__(self, h: mx.array, weights: mx.array) -> mx.array:
        """The weighted sum of the streams, [B, L, d]."""
        return (h * weights.swapaxes(1, 2)[..., None]).sum(axis=1).astype(h.dtype)


class Decoder(nn.Module):
    def __init__(self, args: ModelConfig):
        super().__init__()
        self.n_streams, self.embedding_scale = args.streams, args.embedding_scale
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [TransformerBlock(args, n) for n in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.gather: Callable[[mx.array], mx.array] | None = None
        if args.streams > 1:
            self.aggregator = Aggregator(args)

    def __call__(
        self,
        inputs: mx.array,
        cache: Caches | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """The streams' final hidden states, normalised, [B, P, L, d].

        Where other processes run some of the streams, ``gather`` adds theirs.
        """
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if self.embedding_scale != 1:
            h = h * self.embedding_scale
        if cache is None:
            cache = [None] * len(self.layers)
        elif "prefix_k" in self.layers[0].self_attn and cache[0] is not None and cache[0].empty():
            raise ValueError(
                "an empty KV cache holds no prefix; make it with model.make_cache() "
                "(mlx-lm: make_prompt_cache(model))"
            )
        mask = create_attention_mask(h, cache[0])
        B, L, d = h.shape
        h = mx.broadcast_to(h[:, None], (B, self.n_streams, L, d))
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, c)
        h = self.norm(h)
        return h if self.gather is None else self.gather(h)


class Model(nn.Module):
    """A causal language model that follows mlx-lm's model protocol."""

    def __init__(self, args: ModelConfig):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        self.parallel: Any = None  # a parallel.shard.Parallel, if other processes take part
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: Caches | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits [B, L, vocab] for token ids [B, L], the caches (if any) updated in place.

        Raises:
            ValueError: ``cache`` was not made by ``make_cache`` and so lacks the prefix.
        """
        return self.logits_and_weights(inputs, cache, input_embeddings)[0]

    def aggregation_weights(self, inputs: mx.array, cache: Caches | None = None) -> mx.array:
        """How much each stream counts for each token: float32 [B, L, P], rows that sum to 1."""
        return self.logits_and_weights(inputs, cache)[1]

    def logits_and_weights(
        self,
        inputs: mx.array,
        cache: Caches | None = None,
        input_embeddings: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Logits [B, L, vocab] and the streams' weights, float32 [B, L, P], of one forward pass."""
        h = self.model(inputs, cache, input_embeddings)
        if self.args.streams > 1:
            weights = self.model.aggregator.weights(h)
            h = self.model.aggregator(h, weights)
        else:
            weights = mx.ones((h.shape[0], h.shape[2], 1))
            h = h[:, 0]
        if self.args.tie_word_embeddings:
            logits = self.model.embed_tokens.as_linear(h)
        else:
            logits = self.lm_head(h)
        return logits if self.args.logits_scale == 1 else logits * self.args.logits_scale, weights

    @property
    def layers(self) -> list[TransformerBlock]:
        return self.model.layers

    def make_cache(self, max_kv_size: int | None = None) -> list[Cache]:
        """Fresh KV caches, one a layer, that hold the prefix.

        Args:
            max_kv_size: keep only about this many tokens (besides the prefix) in a rotating cache.

        Raises:
            ValueError: ``max_kv_size`` leaves no room beside the four first tokens it always keeps.
        """
        if max_kv_size is not None and max_kv_size <= 4:
            raise ValueError(f"max_kv_size {max_kv_size} is too small: it must be at least 5")
        if not self.args.prefix_length:
            return [
                KVCache() if max_kv_size is None else RotatingKVCache(max_kv_size, keep=4)
                for _ in self.layers
            ]
        # The norms are never quantised: their type is that of the activations.
        prefixes = [layer.self_attn.prefix(self.model.norm.weight.dtype) for layer in self.layers]
        if max_kv_size is None:
            return [PrefixKVCache(keys, values) for keys, values in prefixes]
        return [PrefixRotatingKVCache(keys, values, max_kv_size) for keys, values in prefixes]

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """For mlx-lm's ``quantize_model``: the aggregator keeps its precision, as prefixes do."""
        return lambda path, module: "aggregator" not in path

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Published tensor names and layouts to this model's; its own pass unchanged."""
        internal = {}
        for name, value in weights.items():
            if name == PUBLISHED_COLUMNS:
                value = internal_columns(value, self.args.streams)
            internal[internal_name(name)] = value
        if self.args.tie_word_embeddings:
            internal.pop("lm_head.weight", None)
        return {k: v for k, v in internal.items() if not k.endswith("rotary_emb.inv_freq")}


def rotate(rope: Rotary | Unrotated, x: mx.array, position: int) -> mx.array:
    """Rotate every vector of ``x`` [..., head_dim] by one position, without the embedding's scale.

    Some ``rope_scaling`` types also scale what they rotate (YaRN, LongRoPE). At position 0 the
    rotation is the identity, so what is left there is that scale.
    """
    head_dim = x.shape[-1]
    scale = rope(mx.ones((1, 1, 1, head_dim), x.dtype), offset=0)
    return (rope(x.reshape(-1, 1, 1, head_dim), offset=position) / scale).reshape(x.shape)
