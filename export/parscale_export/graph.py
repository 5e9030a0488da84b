"""The decoder as an ONNX graph: embedding, layers, aggregator and head, for either operator set.

How the P streams are laid out is a choice (``kv_layout``), because the KV cache is an input:

- ``batch``: streams are rows of the batch, stream-major (row p * B + b), cache
  [P * B, kv_heads, T, head_dim]; hidden states [P * B, L, d].
- ``heads``: streams are heads, cache [B, P * kv_heads, T, head_dim], as an ordinary decoder with P
  times the heads has it; hidden states [B, L * P, d], a token's streams side by side.

Attention, norms and what the padding means are in ``fused`` and ``standard``. Both put the prefix
into the cache themselves, in the call whose ``attention_mask`` is as long as its ``input_ids``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.tensors import Checkpoint

from parscale_export.quantize import has_remainders, stored_columns
from parscale_export.smooth import Smoothing
from parscale_export.w8a8 import gather_columns, gather_rows, integer_product, rounded_rows
from parscale_export.weights import BITS, Weights

OPSET = 23
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Options:
    """What kind of graph to build; see ``export_onnx`` for the meaning of each."""

    kv_layout: str = "batch"
    ops: str = "fused"
    precision: str = "fp32"
    activations: str = "fp32"
    head_precision: str = "fp32"
    embedding_precision: str = "fp32"
    aggregator_precision: str = "fp32"
    block_size: int = 32
    symmetric: bool = False
    accuracy_level: int = 4
    all_logits: bool = False
    aggregation_weights: bool = False
    # A graph of single steps, of one token each after a first call: it needs no prefix, and no
    # padding to see to. Of fused operators only.
    step: bool = False
    # Matrices that stay int8 where the precision is w8a8, by the names of their modules.
    kept: frozenset[str] = frozenset()
    # Those of the others whose activations are rotated.
    rotated: frozenset[str] = frozenset()
    # The longest prefix of all graphs over the same data: their rotary tables are one.
    longest_prefix: int = 0


class Builder(ir.tape.Tape):
    """Records nodes and initializers; calling it adds a node."""

    def __init__(self, config: ModelConfig, options: Options, weights: Weights):
        super().__init__()
        self.config, self.options, self.weights = config, options, weights
        self._constants: dict[tuple, ir.Value] = {}
        self._tensors: dict[str, ir.Value] = {}
        self._with_sums: dict[ir.Value, ir.Value] = {}
        self._zero_columns: dict[int, ir.Value] = {}
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        # Which matrices each activation is multiplied with; see ``calibrate``.
        self.products: dict[ir.Value, list[str]] = {}

    def __call__(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any):
        return self.op(op, inputs, attributes, domain=domain)

    def many(self, op: str, *inputs: ir.Value | None, n: int, domain: str = "", **attributes: Any):
        """A node with ``n`` outputs."""
        return self.op_multi_out(op, inputs, attributes, num_outputs=n, domain=domain)

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant, shared by all who ask for the same."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self.initializer(ir.Tensor(array, name=name))
        return self._constants[key]

    def tensor(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight as an initializer; the same one for the same name."""
        assert tensor.name is not None
        if tensor.name not in self._tensors:
            self._tensors[tensor.name] = self.initializer(tensor)
        return self._tensors[tensor.name]

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self("Cast", x, to=dtype.value)

    def as_float32(self, x: ir.Value) -> ir.Value:
        """An activation in float32."""
        return x if self.weights.dtype == ir.DataType.FLOAT else self.cast(x, ir.DataType.FLOAT)

    def as_activation(self, x: ir.Value) -> ir.Value:
        """A float32 value in the activations' type."""
        return x if self.weights.dtype == ir.DataType.FLOAT else self.cast(x, self.weights.dtype)

    def dimension(self, x: ir.Value, axis: int) -> ir.Value:
        """One dimension's size, int64 [1]."""
        return self("Shape", x, start=axis, end=axis + 1)

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        """Hidden states times a number that the model fixes, where that is not 1."""
        return x if factor == 1 else self("Mul", x, self.constant(factor, self.weights.numpy_dtype))

    def head_norm(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        """Each head of ``x`` [B, L, heads * head_dim] normalised by itself."""
        config = self.config
        split = self("Reshape", x, self.constant([0, 0, heads, config.head_dim]))
        normalised = self("RMSNormalization", split, self.vector(f"{name}.weight"),
                          axis=-1, epsilon=config.rms_norm_eps)  # fmt: skip
        return self("Reshape", normalised, self.constant([0, 0, heads * config.head_dim]))

    def slice(self, x: ir.Value, start: ir.Value, axis: int) -> ir.Value:
        end = self.constant([np.iinfo(np.int64).max])
        return self("Slice", x, start, end, self.constant([axis]))

    def vector(self, name: str) -> ir.Value:
        """A one-dimensional weight in the activations' type."""
        return self._bias(name, (name,))

    def linear(
        self, x: ir.Value, modules: Sequence[str], rows: int, columns: int, precision: str
    ) -> ir.Value:
        """A projection [..., columns] to [..., rows]; several modules are stacked into one."""
        name = modules[0] if len(modules) == 1 else _joint_name(modules)
        sources = tuple(f"{module}.weight" for module in modules)
        self.products.setdefault(x, []).extend(modules)
        if precision == "w8a8" and modules[0] in self.options.kept:
            precision = "int8"
        if precision == "w8a8":
            rotated = modules[0] in self.options.rotated
            y = self._integer_product(x, name, sources, (rows, columns), rotated)
        elif precision in BITS:
            y = self._quantized_matmul(x, name, sources, rows, columns, BITS[precision])
        else:
            weight = self.weights.floats(
                f"{name}.weight", (columns, rows),
                lambda: np.ascontiguousarray(self.weights.array(sources).T),
            )  # fmt: skip
            y = self("MatMul", x, self.tensor(weight))
        biases = tuple(f"{module}.bias" for module in modules)
        if self.weights.has(biases[0]):
            y = self("Add", y, self._bias(f"{name}.bias", biases))
        return y

    def _bias(self, name: str, sources: tuple[str, ...]) -> ir.Value:
        rows = sum(self.weights.checkpoint.shape(source)[0] for source in sources)
        return self.tensor(self.weights.floats(name, (rows,), lambda: self.weights.array(sources)))

    def _integer_product(
        self,
        x: ir.Value,
        name: str,
        sources: tuple[str, ...],
        shape: tuple[int, int],
        rotated: bool,
    ) -> ir.Value:
        if x not in self._rounded:
            self._rounded[x] = rounded_rows(self, x, shape[1], rotated=rotated)
        stored = self.weights.channels(name, sources, shape, rotated=rotated)
        codes, scales = map(self.tensor, stored)
        return self.as_activation(integer_product(self, self._rounded[x], codes, scales))

    def _quantized_matmul(
        self, x: ir.Value, name: str, sources: tuple[str, ...], rows: int, columns: int, bits: int
    ) -> ir.Value:
        size = self.options.block_size
        if has_remainders(columns, bits, size) and not self.options.symmetric:
            stored = stored_columns(columns, size)
            x = self._with_block_sums(x, columns // size, stored - columns)
            columns = stored
        if self.options.ops == "standard":
            codes, scales, zeros = self.weights.linear_codes(name, sources, (rows, columns), bits)
            weight = self(
                "DequantizeLinear", *map(self.tensor, (codes, scales, zeros)),
                axis=0, block_size=self.options.block_size,
            )  # fmt: skip
            return self("MatMul", x, weight)
        tensors = self.weights.codes(name, sources, (rows, columns), bits)
        return self(
            "MatMulNBits", x, *(self.tensor(t) for t in tensors if t is not None),
            domain=MICROSOFT, K=columns, N=rows, bits=bits,
            block_size=self.options.block_size, accuracy_level=self.options.accuracy_level,
        )  # fmt: skip

    def _with_block_sums(self, x: ir.Value, blocks: int, width: int) -> ir.Value:
        """Inputs [B, L, columns], and after them each block's sum, in so many columns."""
        if x not in self._with_sums:
            shape = self.constant([0, 0, blocks, self.options.block_size])
            sums = self("ReduceSum", self("Reshape", x, shape), self.constant([-1]), keepdims=0)
            parts = [x, sums]
            if width > blocks:
                parts.append(self._zeros(x, width - blocks))
            self._with_sums[x] = self("Concat", *parts, axis=-1)
        return self._with_sums[x]

    def _zeros(self, x: ir.Value, columns: int) -> ir.Value:
        """Zeros [B, L, columns], made once for all inputs of the same rows and tokens as ``x``."""
        if columns not in self._zero_columns:
            shape = self(
                "Concat", self("Shape", x, start=0, end=2), self.constant([columns]), axis=0
            )
            zero = self.constant(0, self.weights.numpy_dtype)
            self._zero_columns[columns] = self("Expand", zero, shape)
        return self._zero_columns[columns]

    def change_rows(self) -> None:
        """From here on, hidden states have other rows or tokens than before."""
        self._zero_columns.clear()


def build(
    checkpoint: Checkpoint,
    options: Options,
    smoothing: Smoothing | None = None,
    observe: Callable[[Builder], list[ir.Value]] | None = None,
) -> ir.Model:
    """The whole model; its large tensors are lazy, nothing is read from the checkpoint yet.

    Args:
        smoothing: what to scale the weights with.
        observe: given the finished graph's builder, values that become its only outputs.
    """
    from parscale_export.fused import FusedOperators
    from parscale_export.standard import StandardOperators

    config = checkpoint.config
    weights = Weights(
        checkpoint, options.activations, options.block_size, options.symmetric, smoothing
    )
    b = Builder(config, options, weights)
    inputs, pasts = _inputs(config, options, weights.dtype)
    token_ids, mask = inputs
    operators = (
        FusedOperators(b, token_ids, mask)
        if options.ops == "fused"
        else StandardOperators(b, token_ids, mask)
    )
    h = b.scaled(_embed(b, _fold(b, operators.token_ids)), config.embedding_scale)
    x = b("RMSNormalization", h, b.vector("model.layers.0.input_layernorm.weight"),
          axis=-1, epsilon=config.rms_norm_eps)  # fmt: skip
    presents: list[ir.Value] = []
    for n, past in enumerate(pasts):
        layer, last = f"model.layers.{n}", n == config.num_hidden_layers - 1
        x, *present = operators.attention(
            x, f"{layer}.self_attn", past, rotated=config.rotated_layers[n]
        )
        x = b.scaled(x, config.residual_scale)
        h, x = operators.add_and_norm(h, x, f"{layer}.post_attention_layernorm.weight")
        x = b.scaled(operators.mlp(x, f"{layer}.mlp"), config.residual_scale)
        following = "model.norm" if last else f"model.layers.{n + 1}.input_layernorm"
        h, x = operators.add_and_norm(h, x, f"{following}.weight")
        presents += [
            _present(value, past[0], n, part) for value, part in zip(present, KV, strict=True)
        ]
    x = operators.pick(_side_by_side(b, x))
    b.change_rows()
    x, stream_weights = _aggregate(b, x)
    logits = b.cast(b.scaled(_head(b, x), config.logits_scale), ir.DataType.FLOAT)
    outputs = [_output(logits, "logits", config.vocab_size, options)]
    if stream_weights is not None and options.aggregation_weights:
        outputs.append(_output(stream_weights, "aggregation_weights", config.streams, options))
    outputs = [*outputs, *presents] if observe is None else observe(b)
    graph = ir.Graph(
        [*inputs, *(value for past in pasts for value in past)],
        outputs,
        nodes=b.nodes,
        initializers=b.initializers,
        opset_imports={"": OPSET} | ({MICROSOFT: 1} if options.ops == "fused" else {}),
        name="parscale",
    )
    return ir.Model(graph, ir_version=10, producer_name="parscale")


KV = ("key", "value")


def folded_heads(config: ModelConfig, kv_layout: str) -> tuple[int, int, int]:
    """How many query heads and key-value heads attention has, and rows for each sequence."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_layout == "heads":
        return config.streams * heads, config.streams * kv_heads, 1
    return heads, kv_heads, config.streams


def _inputs(config: ModelConfig, options: Options, dtype: ir.DataType):
    def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    integer = ir.DataType.INT64
    _, kv_heads, rows = folded_heads(config, options.kv_layout)
    batch = "batch_size" if rows == 1 else "batch_size_times_streams"
    cache = (batch, kv_heads, "past_sequence_length", config.head_dim)
    pasts = [
        tuple(value(f"past_key_values.{n}.{part}", dtype, *cache) for part in KV)
        for n in range(config.num_hidden_layers)
    ]
    return (
        value("input_ids", integer, "batch_size", "sequence_length"),
        value("attention_mask", integer, "batch_size", "total_sequence_length"),
    ), pasts


def _present(value: ir.Value, past: ir.Value, layer: int, part: str) -> ir.Value:
    assert past.shape is not None
    shape = list(past.shape.dims)
    shape[2] = ir.SymbolicDim("present_sequence_length")
    value.name, value.type, value.shape = f"present.{layer}.{part}", past.type, ir.Shape(shape)
    return value


def _output(value: ir.Value, name: str, width: int, options: Options) -> ir.Value:
    length = "sequence_length" if options.all_logits else 1
    value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(("batch_size", length, width))
    return value


def _embed(b: Builder, token_ids: ir.Value) -> ir.Value:
    name, shape = "model.embed_tokens", (b.config.vocab_size, b.config.hidden_size)
    sources, options = (f"{name}.weight",), b.options
    if options.embedding_precision not in BITS:
        table = b.tensor(b.weights.floats(sources[0], shape, lambda: b.weights.array(sources)))
        return b("Gather", table, token_ids, axis=0)
    bits = BITS[options.embedding_precision]
    head = options.head_precision if b.config.tie_word_embeddings else None
    if bits == 8 and head == "w8a8":
        stored = b.weights.channels(name, sources, shape)
        return b.as_activation(gather_columns(b, *stored, token_ids))
    if options.ops == "standard" and head == "int8":
        return _gather_blocks(b, name, token_ids)
    if options.ops == "standard" or (head is None and options.precision == "w8a8"):
        stored = b.weights.channels(f"{name}.table", sources, shape, table=True)
        return b.as_activation(gather_rows(b, *stored, token_ids))
    # With 8 bits, the table may be the head's matrix too.
    stored_name = name if bits == 8 else f"{name}.table"
    codes, scales, zeros = b.weights.codes(stored_name, sources, shape, bits, remainders=False)
    table = b("Reshape", b.tensor(codes), b.constant([shape[0], -1]))
    points = [] if zeros is None else [b.tensor(zeros)]
    return b(
        "GatherBlockQuantized", table, token_ids, b.tensor(scales), *points,
        domain=MICROSOFT, bits=bits, block_size=options.block_size,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _gather_blocks(b: Builder, name: str, token_ids: ir.Value) -> ir.Value:
    """Rows of an embedding that is stored as its head's blocks, for DequantizeLinear."""
    shape = (b.config.vocab_size, b.config.hidden_size)
    stored = b.weights.linear_codes(name, (f"{name}.weight",), shape, 8)
    columns = [b("Gather", b.tensor(tensor), token_ids, axis=1) for tensor in stored]
    rows = b("DequantizeLinear", *columns, axis=0, block_size=b.options.block_size)
    return b("Transpose", rows, perm=[1, 2, 0])


def _fold(b: Builder, token_ids: ir.Value) -> ir.Value:
    """Token ids [B, L] for every stream: [P * B, L] or [B, L * P]."""
    streams = b.config.streams
    if streams == 1:
        return token_ids
    if b.options.kv_layout == "batch":
        return b("Tile", token_ids, b.constant([streams, 1]))
    repeated = b("Tile", b("Unsqueeze", token_ids, b.constant([2])), b.constant([1, 1, streams]))
    return b("Reshape", repeated, b.constant([0, -1]))


def _side_by_side(b: Builder, x: ir.Value) -> ir.Value:
    """The streams' hidden states of each token, concatenated: [B, L, P * d]."""
    streams, d = b.config.streams, b.config.hidden_size
    if streams == 1:
        return x
    if b.options.kv_layout == "batch":
        rows = b.many("Split", x, n=streams, axis=0, num_outputs=streams)
        return b("Concat", *rows, axis=-1)
    return b("Reshape", x, b.constant([0, -1, streams * d]))


def _aggregate(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Weigh the streams of each token (paper section 2.2, equation 3, with label smoothing).

    From [B, L, P * d] to [B, L, d], and the weights, float32 [B, L, P] (of one stream, where they
    are an output).
    """
    streams, d, smoothing = b.config.streams, b.config.hidden_size, b.config.smoothing
    if streams == 1:
        if not b.options.aggregation_weights:
            return x, None
        shape = b("Concat", b("Shape", x, start=0, end=2), b.constant([1]), axis=0)
        return x, b("Expand", b.constant([1.0], np.float32), shape)
    precision = b.options.aggregator_precision
    hidden = b.linear(x, ["model.aggregator.fc1"], d, streams * d, precision)
    hidden = b("Mul", hidden, b("Sigmoid", hidden))
    # A matrix of P rows is too small to be worth quantising.
    scores = b.linear(hidden, ["model.aggregator.fc2"], streams, d, b.options.activations)
    weights = b("Softmax", b.cast(scores, ir.DataType.FLOAT), axis=-1)
    weights = b("Mul", weights, b.constant(1 - smoothing, np.float32))
    weights = b("Add", weights, b.constant(smoothing / streams, np.float32))
    rows = b("Reshape", b.cast(x, ir.DataType.FLOAT), b.constant([0, 0, streams, d]))
    mixed = b("MatMul", b("Unsqueeze", weights, b.constant([2])), rows)
    return b.cast(b("Squeeze", mixed, b.constant([2])), b.weights.dtype), weights


def _head(b: Builder, x: ir.Value) -> ir.Value:
    """Logits [B, L, vocab]."""
    vocab, d = b.config.vocab_size, b.config.hidden_size
    tied = b.config.tie_word_embeddings
    module = "model.embed_tokens" if tied else "lm_head"
    if not tied or b.options.head_precision in (*BITS, "w8a8"):
        return b.linear(x, [module], vocab, d, b.options.head_precision)
    # Both ways read the embedding's own rows, so that the file holds them once.
    table = b.tensor(
        b.weights.floats(
            f"{module}.weight", (vocab, d), lambda: b.weights.array([f"{module}.weight"])
        )
    )
    if (b.options.ops, b.options.activations) == ("fused", "fp32"):
        # GroupQueryAttention has float32 on the CPU only. There a MatMul is faster, and onnxruntime
        # transposes once, when it loads; on a GPU that would be a second copy for good.
        return b("MatMul", x, b("Transpose", table, perm=[1, 0]))
    shape = b("Concat", b("Shape", x, start=0, end=2), b.constant([vocab]), axis=0)
    return b("Reshape", b("Gemm", b("Reshape", x, b.constant([-1, d])), table, transB=1), shape)


def _joint_name(modules: Sequence[str]) -> str:
    parent, _, _ = modules[0].rpartition(".")
    return f"{parent}.{'_'.join(m.rpartition('.')[2].removesuffix('_proj') for m in modules)}_proj"
