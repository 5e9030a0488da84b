"""Attention, norms and MLP in the standard operators of opset 23 (domain ``ai.onnx``) alone.

Attention takes a past, several new tokens and any number of rows at once, and a mask of our own
making, so padding may stay where it is: the mask shuts it out and positions count real tokens. The
prefix's keys go, without rotary embedding, before the first call's own; every query sees them.
"""

import numpy as np
import onnx_ir as ir

from parscale_export.builder import Builder, folded_heads
from parscale_export.fused import prefix_rows
from parscale_export.linear import linear


class StandardOperators:
    """One graph's attention, norms and MLP; made once its inputs exist.

    Attributes:
        token_ids: the token ids [B, L] as they came.
    """

    def __init__(self, b: Builder, token_ids: ir.Value, mask: ir.Value):
        self.b, self.token_ids, config = b, token_ids, b.config
        self.prefix_length = config.prefix_length
        self.heads, self.kv_heads, self.rows = folded_heads(config, b.options.kv_layout)
        batch, length, total = (
            b.dimension(token_ids, 0),
            b.dimension(token_ids, 1),
            b.dimension(mask, 1),
        )
        self.past = b("Sub", total, length)
        self.chunk_mask = b.slice(mask, self.past, axis=1)
        # What holds for a sequence holds for each of its rows, [P * B, ...].
        rows_mask = b("Tile", mask, b.constant([self.rows, 1])) if self.rows > 1 else mask
        self.cos, self.sin = self._rotary(rows_mask)
        self.mask = self._attention_mask(rows_mask, total)
        if self.prefix_length:
            is_first = b.cast(b("Equal", length, total), ir.DataType.INT64)
            count = b("Mul", is_first, b.constant([self.prefix_length]))
            self.prefix_rows = prefix_rows(b, batch, count)

    def _rotary(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of the new tokens' angles, [rows, L, head_dim / 2]."""
        b = self.b
        counted = b("Sub", b("CumSum", mask, b.constant(1)), b.constant([1]))
        positions = b.slice(b("Max", counted, b.constant([0])), self.past, axis=1)
        rotation = b.config.rope.rotation()
        scale = rotation.scale
        frequencies = b.constant(rotation.frequencies, np.float32)
        if rotation.long_frequencies is not None:
            count = b("Unsqueeze", b("ReduceSum", mask, b.constant([1])), b.constant([2]))
            frequencies = b(
                "Where", b("Greater", count, b.constant(rotation.original)),
                b.constant(rotation.long_frequencies, np.float32), frequencies,
            )  # fmt: skip
        angles = b(
            "Mul",
            b("Unsqueeze", b.cast(positions, ir.DataType.FLOAT), b.constant([2])),
            frequencies,
        )
        tables = []
        for function in ("Cos", "Sin"):
            table = b(function, angles)
            if scale != 1:
                table = b("Mul", table, b.constant(scale, np.float32))
            tables.append(b.cast(table, b.weights.dtype))
        return tables[0], tables[1]

    def _attention_mask(self, mask: ir.Value, total: ir.Value) -> ir.Value:
        """Who sees whom, bool [rows, 1, L, prefix + total]."""
        b, n = self.b, self.b.constant([self.prefix_length])
        zero, one = b.constant(0), b.constant(1)
        visible = mask
        if self.prefix_length:
            shape = b("Concat", b.dimension(mask, 0), b.constant([self.prefix_length]), axis=0)
            visible = b("Concat", b("Expand", b.constant([1]), shape), mask, axis=1)
        end = b("Squeeze", b("Add", total, n))
        keys = b("Range", zero, end, one)
        queries = b("Range", b("Squeeze", b("Add", self.past, n)), end, one)
        queries = b("Unsqueeze", queries, b.constant([1]))
        visible = b("Unsqueeze", b.cast(visible, ir.DataType.BOOL), b.constant([1, 2]))
        # Padding sees at least itself: a softmax over nothing could spread NaN through its value.
        visible = b("Or", visible, b("Equal", keys, queries))
        return b("And", visible, b("LessOrEqual", keys, queries))

    def attention(
        self, x: ir.Value, name: str, past: tuple[ir.Value, ir.Value], *, rotated: bool
    ) -> tuple[ir.Value, ...]:
        """Attention of one layer: its output, and the present keys and values."""
        b, config = self.b, self.b.config
        d, q = config.hidden_size, config.num_attention_heads * config.head_dim
        queries = self._heads(x, f"{name}.q_proj", config.num_attention_heads)
        keys = self._heads(x, f"{name}.k_proj", config.num_key_value_heads)
        values = self._heads(x, f"{name}.v_proj", config.num_key_value_heads)
        if rotated:
            queries = self._rotate(queries, self.heads)
            keys = self._rotate(keys, self.kv_heads)
        if self.prefix_length:
            keys = self._after_prefix(keys, f"{name}.prefix_k")
            values = self._after_prefix(values, f"{name}.prefix_v")
        y, *present = b.many(
            "Attention", queries, keys, values, self.mask, *past,
            n=3, q_num_heads=self.heads, kv_num_heads=self.kv_heads,
            scale=config.attention_scale, softmax_precision=ir.DataType.FLOAT.value,
        )  # fmt: skip
        if config.streams > 1 and self.rows == 1:
            y = b("Reshape", y, b.constant([0, -1, q]))
        return linear(b, y, [f"{name}.o_proj"], d, q, b.options.precision), *present

    def _heads(self, x: ir.Value, module: str, heads: int) -> ir.Value:
        """A projection, streams folded into its last axis where streams are heads."""
        b, config = self.b, self.b.config
        width = heads * config.head_dim
        y = linear(b, x, [module], width, config.hidden_size, b.options.precision)
        if config.qk_norm and not module.endswith("v_proj"):
            y = b.head_norm(y, module.replace("_proj", "_norm"), heads)
        if config.streams > 1 and self.rows == 1:
            y = b("Reshape", y, b.constant([0, -1, config.streams * width]))
        return y

    def _rotate(self, x: ir.Value, heads: int) -> ir.Value:
        return self.b(
            "RotaryEmbedding", x, self.cos, self.sin,
            num_heads=heads, interleaved=int(self.b.config.rope_traditional),
        )  # fmt: skip

    def _after_prefix(self, x: ir.Value, name: str) -> ir.Value:
        b, config = self.b, self.b.config
        width = self.kv_heads * config.head_dim
        count = config.prefix_length * self.rows

        def compute() -> np.ndarray:
            prefix = b.weights.array([name])  # [P, kv_heads, n, head_dim]
            axes = (0, 2, 1, 3) if self.rows > 1 else (2, 0, 1, 3)
            return prefix.transpose(axes).reshape(count, width)

        prefix = b.tensor(b.weights.floats(name, (count, width), compute))
        return b("Concat", b("Gather", prefix, self.prefix_rows, axis=0), x, axis=1)

    def add_and_norm(self, h: ir.Value, x: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        """The residual sum, and that sum normalised."""
        b = self.b
        total = b("Add", h, x)
        return total, b("RMSNormalization", total, b.vector(weight),
                        axis=-1, epsilon=b.config.rms_norm_eps)  # fmt: skip

    def mlp(self, x: ir.Value, name: str) -> ir.Value:
        b, d, hidden = self.b, self.b.config.hidden_size, self.b.config.intermediate_size
        gate = linear(b, x, [f"{name}.gate_proj"], hidden, d, b.options.precision)
        up = linear(b, x, [f"{name}.up_proj"], hidden, d, b.options.precision)
        x = b("Mul", b("Mul", gate, b("Sigmoid", gate)), up)
        return linear(b, x, [f"{name}.down_proj"], d, hidden, b.options.precision)

    def pick(self, x: ir.Value) -> ir.Value:
        """Of hidden states [B, L, P * d], each row's last that is not padding; or all of them."""
        b = self.b
        if b.options.all_logits:
            return x
        # As many columns as have a token in them or after them, less one: ArgMax of integers has no
        # kernel on CUDA, and would send the mask to the host in every step.
        to_come = b("CumSum", self.chunk_mask, b.constant(1), reverse=1)
        there = b.cast(b("Greater", to_come, b.constant([0])), ir.DataType.INT64)
        count = b("ReduceSum", there, b.constant([1]), keepdims=1)
        last = b("Sub", count, b.constant([1]))
        return b("GatherND", x, b("Unsqueeze", last, b.constant([2])), batch_dims=1)
