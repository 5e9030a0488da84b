"""Attention, norms and MLP in onnxruntime's own operators (domain ``com.microsoft``).

GroupQueryAttention keeps the tokens of a sequence at the front of its cache rows, so left padding
is rolled to the right end, on the way in and (for all logits) on the way out. It lets past and
present share a buffer, and rotates row i of the cache by R(i) itself. It takes several new tokens
on top of a past only for a single row; hence a prefix cannot come as a past when streams are rows,
and the graph puts it before the first call's own keys and values instead: prefix row i, stored as
R(n - i) k, comes out as R(n) k, which is what tokens that start at position n want to see. The
queries of these rows are zero and their results are cut off.
"""

import numpy as np
import onnx_ir as ir
from parscale_core.checkpoint.rope import rotate

from parscale_export.builder import MICROSOFT, Builder, folded_heads
from parscale_export.linear import linear

# Query heads that the operator takes on CUDA.
MAX_CUDA_HEADS = 1024


class FusedOperators:
    """One graph's attention, norms and MLP; made once its inputs exist.

    Attributes:
        token_ids: the token ids [B, L], padding on the right.
    """

    def __init__(self, b: Builder, token_ids: ir.Value, mask: ir.Value):
        self.b, config = b, b.config
        self.prefix_length = config.prefix_length
        self.heads, self.kv_heads, self.rows = folded_heads(config, b.options.kv_layout)
        total, n = b.dimension(mask, 1), b.constant([self.prefix_length])
        self.total = b.cast(b("Squeeze", b("Add", total, n)), ir.DataType.INT32)
        self.tokens = b("ReduceSum", mask, b.constant([1]), keepdims=0)
        lengths = b.cast(b("Add", self.tokens, b.constant([self.prefix_length - 1])),
                         ir.DataType.INT32)  # fmt: skip
        self.lengths = b("Tile", lengths, b.constant([self.rows])) if self.rows > 1 else lengths
        self.cos, self.sin = self._rotary_tables()
        self.puts_prefix = self.prefix_length > 0 and not b.options.step
        self.token_ids = token_ids if b.options.step else self._roll(token_ids, mask)
        if self.puts_prefix:
            first = b.cast(b("Equal", b.dimension(token_ids, 1), total), ir.DataType.INT64)
            self.new_prefix = b("Mul", first, n)
            self.prefix_rows = self._prefix_rows(b.dimension(token_ids, 0))

    def _roll(self, token_ids: ir.Value, mask: ir.Value) -> ir.Value:
        """The token ids, in a first call with each row's padding at its end."""
        b = self.b
        length, total = b.dimension(token_ids, 1), b.dimension(mask, 1)
        first = b.cast(b("Equal", length, total), ir.DataType.INT64)
        # On a GPU, sizes are in the host's memory and what is computed from the mask is not. A
        # tensor that crosses would cost a copy in every step and forbid CUDA graphs, so what both
        # need is made once more on the device.
        is_first, self.length = self._on_device(first), self._on_device(length)
        # The padding before a row's first token; in later calls its tokens are already where they
        # belong. Counted by sums: the largest of integers is a kernel of cuDNN's on CUDA.
        seen = b("CumSum", mask, b.constant(1))
        before = b.cast(b("Equal", seen, b.constant([0])), ir.DataType.INT64)
        before = b("ReduceSum", before, b.constant([1]), keepdims=1)
        self.start = b("Mul", before, is_first)
        self.columns = b("Range", b.constant(0), b("Squeeze", length), b.constant(1))
        rolled = b("Mod", b("Add", self.columns, self.start), self.length)
        return b("GatherElements", token_ids, rolled, axis=1)

    def _on_device(self, size: ir.Value) -> ir.Value:
        """A number [1] in the host's memory, in the device's."""
        b = self.b
        start = b("Squeeze", size)
        return b("Range", start, b("Add", start, b.constant(1)), b.constant(1))

    def _rotary_tables(self) -> tuple[ir.Value, ir.Value]:
        b, config = self.b, self.b.config
        rotation = config.rope.rotation()
        if rotation.long_frequencies is None:
            return self._tables("", rotation.frequencies, 0)
        # No prefix follows frequencies that change: it stays as it is, and tokens start at 0.
        n = self.prefix_length
        short = self._tables(f".short{n}", rotation.frequencies, n)
        long = self._tables(f".long{n}", rotation.long_frequencies, n)
        beyond = b("Greater", self.tokens, b.constant(rotation.original))
        # Counted by a sum: the largest of integers is a kernel of cuDNN's on CUDA.
        count = b("ReduceSum", b.cast(beyond, ir.DataType.INT64), keepdims=0)
        is_long = b("Greater", count, b.constant(0))
        return b("Where", is_long, long[0], short[0]), b("Where", is_long, long[1], short[1])

    def _tables(self, name: str, frequencies: np.ndarray, start: int) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines for each entry of the cache; the entry ``start`` has position 0."""
        b, config = self.b, self.b.config
        scale = config.rope.rotation().scale
        entries = config.max_position_embeddings + max(self.prefix_length, b.options.longest_prefix)
        shape = (entries, config.head_dim // 2)

        def angles() -> np.ndarray:
            return np.outer(np.maximum(np.arange(entries) - start, 0), frequencies)

        return (
            b.tensor(b.weights.floats(f"cos{name}", shape, lambda: np.cos(angles()) * scale)),
            b.tensor(b.weights.floats(f"sin{name}", shape, lambda: np.sin(angles()) * scale)),
        )

    def _prefix_rows(self, batch: ir.Value) -> ir.Value:
        return prefix_rows(self.b, batch, self.new_prefix)

    def attention(
        self, x: ir.Value, name: str, past: tuple[ir.Value, ir.Value], *, rotated: bool
    ) -> tuple[ir.Value, ...]:
        """Attention of one layer: its output, and the present keys and values."""
        b, config = self.b, self.b.config
        q, kv = config.num_attention_heads, config.num_key_value_heads
        widths = [n * config.head_dim for n in (q, kv, kv)]
        modules = [f"{name}.{part}_proj" for part in "qkv"]
        packed = linear(b, x, modules, sum(widths), config.hidden_size, b.options.precision)
        if config.qk_norm:
            packed = self._normalised(packed, name, widths)
        side_by_side = config.streams > 1 and self.rows == 1
        if side_by_side:
            shape = b.constant([0, -1, config.streams, sum(widths)])
            packed = b("Reshape", packed, shape)
        if self.puts_prefix:
            prefix = b("Gather", self._prefix(name, widths, rotated), self.prefix_rows, axis=0)
            packed = b("Concat", prefix, packed, axis=1)
        projections: list[ir.Value | None] = [packed, None, None]
        if side_by_side:
            parts = b.many("Split", packed, b.constant(widths), n=3, axis=-1)
            projections = [
                b("Reshape", part, b.constant([0, 0, config.streams * width]))
                for part, width in zip(parts, widths, strict=True)
            ]
        y, *present = b.many(
            "GroupQueryAttention", *projections, *past,
            self.lengths, self.total, *((self.cos, self.sin) if rotated else ()),
            n=3, domain=MICROSOFT, num_heads=self.heads, kv_num_heads=self.kv_heads,
            scale=config.attention_scale, do_rotary=int(rotated),
            rotary_interleaved=int(config.rope_traditional),
        )  # fmt: skip
        if self.puts_prefix:
            y = b.slice(y, self.new_prefix, axis=1)
        if side_by_side:
            y = b("Reshape", y, b.constant([0, -1, widths[0]]))
        y = linear(b, y, [f"{name}.o_proj"], config.hidden_size, widths[0], b.options.precision)
        return y, *present

    def _normalised(self, packed: ir.Value, name: str, widths: list[int]) -> ir.Value:
        b, config = self.b, self.b.config
        queries, keys, values = b.many("Split", packed, b.constant(widths), n=3, axis=-1)
        queries = b.head_norm(queries, f"{name}.q_norm", config.num_attention_heads)
        keys = b.head_norm(keys, f"{name}.k_norm", config.num_key_value_heads)
        return b("Concat", queries, keys, values, axis=-1)

    def _prefix(self, name: str, widths: list[int], rotated: bool) -> ir.Value:
        b, config = self.b, self.b.config
        streams, n = config.streams, config.prefix_length
        side_by_side = streams > 1 and self.rows == 1

        def compute() -> np.ndarray:
            keys, values = (
                b.weights.array([f"{name}.prefix_{part}"]).astype(np.float64) for part in "kv"
            )
            rotation = config.rope.rotation()
            angles = np.outer(n - np.arange(n), rotation.frequencies)
            if rotation.long_frequencies is not None:
                angles = np.zeros_like(angles)  # its entries have position 0
            if rotated:
                # The operator's tables carry the embedding's scale, which a prefix does not take.
                keys = rotate(keys, angles, interleaved=config.rope_traditional) / rotation.scale
            queries = np.zeros((streams, n, widths[0]))
            flat = [a.swapaxes(1, 2).reshape(streams, n, -1) for a in (keys, values)]
            rows = np.concatenate([queries, *flat], axis=-1)
            return rows.swapaxes(0, 1) if side_by_side else rows.reshape(-1, sum(widths))

        many = (n, streams) if side_by_side else (streams * n,)
        return b.tensor(b.weights.floats(f"{name}.prefix", (*many, sum(widths)), compute))

    def add_and_norm(self, h: ir.Value, x: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        """The residual sum, and that sum normalised."""
        b = self.b
        normalised, mean, deviation, total = b.many(
            "SkipSimplifiedLayerNormalization", h, x, b.vector(weight),
            n=4, domain=MICROSOFT, epsilon=b.config.rms_norm_eps,
        )  # fmt: skip
        mean.name = deviation.name = ""  # left out
        return total, normalised

    def mlp(self, x: ir.Value, name: str) -> ir.Value:
        b, d, hidden = self.b, self.b.config.hidden_size, self.b.config.intermediate_size
        modules = [f"{name}.gate_proj", f"{name}.up_proj"]
        both = linear(b, x, modules, 2 * hidden, d, b.options.precision)
        gate, up = b.many("Split", both, n=2, axis=-1, num_outputs=2)
        x = b("Mul", b("Mul", gate, b("Sigmoid", gate)), up)
        return linear(b, x, [f"{name}.down_proj"], d, hidden, b.options.precision)

    def pick(self, x: ir.Value) -> ir.Value:
        """Of hidden states [B, L, P * d], each row's last; or all, where their tokens were."""
        b = self.b
        if b.options.step:
            return x
        if b.options.all_logits:
            shifted = b("Sub", b("Add", self.columns, self.length), self.start)
            where = b("Unsqueeze", b("Mod", shifted, self.length), b.constant([2]))
            return b("GatherND", x, where, batch_dims=1)
        # In later calls a row has more tokens than are new.
        last = b("Sub", b("Min", self.tokens, self.length), b.constant([1]))
        return b("GatherND", x, b("Unsqueeze", last, b.constant([1, 2])), batch_dims=1)


def prefix_rows(b: Builder, batch: ir.Value, count: ir.Value) -> ir.Value:
    """Which stored prefix rows go before each row's keys: [B, count], or [P * B, count]."""
    rows = b("Range", b.constant(0), b("Squeeze", count), b.constant(1))
    n, streams = b.config.prefix_length, b.config.streams
    if b.options.kv_layout == "batch":
        first = b.constant(np.arange(streams)[:, None] * n)
        repeats = b("Concat", b.constant([1]), batch, axis=0)
        firsts = b("Reshape", b("Tile", first, repeats), b.constant([-1, 1]))
        return b("Add", firsts, rows)
    shape = b("Concat", batch, b.constant([1]), axis=0)
    return b("Expand", b("Unsqueeze", rows, b.constant([0])), shape)
