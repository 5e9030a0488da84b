"""The decoder as an ONNX graph: embedding, layers, aggregator and head, for either operator set.

How the P streams are laid out is a choice (``kv_layout``), because the KV cache is an input:

- ``batch``: streams are rows of the batch, stream-major (row p * B + b), cache
  [P * B, kv_heads, T, head_dim]; hidden states [P * B, L, d].
- ``heads``: streams are heads, cache [B, P * kv_heads, T, head_dim], as an ordinary decoder with P
  times the heads has it; hidden states [B, L * P, d], a token's streams side by side.

Attention, norms and what the padding means are in ``fused`` and ``standard``. Both put the prefix
into the cache themselves, in the call whose ``attention_mask`` is as long as its ``input_ids``.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.tensors import Checkpoint

from parscale_export.builder import MICROSOFT, Builder, Options, folded_heads
from parscale_export.fused import FusedOperators
from parscale_export.linear import linear
from parscale_export.smooth import Smoothing
from parscale_export.standard import StandardOperators
from parscale_export.weights import BITS, Weights

OPSET = 23
KV = ("key", "value")


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
    logits, dtype = b.scaled(_head(b, x), config.logits_scale), ir.DataType.FLOAT
    if options.step and weights.dtype == ir.DataType.FLOAT16:
        dtype = weights.dtype  # a launch less; bfloat16 would be no type of numpy's
    else:
        logits = b.cast(logits, dtype)
    outputs = [_output(logits, "logits", config.vocab_size, options, dtype)]
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


def _inputs(
    config: ModelConfig, options: Options, dtype: ir.DataType
) -> tuple[tuple[ir.Value, ...], list[tuple[ir.Value, ir.Value]]]:
    def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    integer = ir.DataType.INT64
    _, kv_heads, rows = folded_heads(config, options.kv_layout)
    batch = "batch_size" if rows == 1 else "batch_size_times_streams"
    cache = (batch, kv_heads, "past_sequence_length", config.head_dim)

    def past(layer: int, part: str) -> ir.Value:
        return value(f"past_key_values.{layer}.{part}", dtype, *cache)

    pasts = [(past(n, "key"), past(n, "value")) for n in range(config.num_hidden_layers)]
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


def _output(
    value: ir.Value,
    name: str,
    width: int,
    options: Options,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    length = "sequence_length" if options.all_logits else 1
    value.name, value.type = name, ir.TensorType(dtype)
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
        return b.as_activation(_gather_columns(b, *stored, token_ids))
    if options.ops == "standard" and head == "int8":
        return _gather_blocks(b, name, token_ids)
    if options.ops == "standard" or (head is None and options.precision == "w8a8"):
        stored = b.weights.channels(f"{name}.table", sources, shape, table=True)
        return b.as_activation(_gather_rows(b, *stored, token_ids))
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


def _gather_columns(
    b: Builder, codes: ir.TensorProtocol, scales: ir.TensorProtocol, ids: ir.Value
) -> ir.Value:
    """Rows of an embedding that is stored as its head's codes [d, vocab]: float32 [B, L, d]."""
    columns = b.cast(b("Gather", b.tensor(codes), ids, axis=1), ir.DataType.FLOAT)
    return b("Transpose", b("Mul", columns, b("Gather", b.tensor(scales), ids)), perm=[1, 2, 0])


def _gather_rows(
    b: Builder, codes: ir.TensorProtocol, scales: ir.TensorProtocol, ids: ir.Value
) -> ir.Value:
    """Rows of an embedding's own codes [vocab, d]: float32 [B, L, d]."""
    rows = b.cast(b("Gather", b.tensor(codes), ids), ir.DataType.FLOAT)
    return b("Mul", rows, b("Unsqueeze", b("Gather", b.tensor(scales), ids), b.constant([2])))


def _gather_blocks(b: Builder, name: str, token_ids: ir.Value) -> ir.Value:
    """Rows of an embedding that is stored as its head's blocks, for DequantizeLinear."""
    (vocab, d), size = (b.config.vocab_size, b.config.hidden_size), b.options.block_size
    stored = b.weights.linear_codes(name, (f"{name}.weight",), (vocab, d), 8)
    columns = [b("Gather", b.tensor(tensor), token_ids, axis=1) for tensor in stored]
    if d % size:
        return b("Transpose", b("DequantizeLinear", *columns, axis=0, block_size=size),
                 perm=[1, 2, 0])  # fmt: skip
    # By hand: OpenVINO has no DequantizeLinear of what was looked up.
    codes, scales = (b("Transpose", values, perm=[1, 2, 0]) for values in columns[:2])
    centred = b("Sub", b.cast(codes, b.weights.dtype), b.constant(128, b.weights.numpy_dtype))
    blocks = b("Reshape", centred, b.constant([0, 0, -1, size]))
    rows = b("Mul", blocks, b("Unsqueeze", scales, b.constant([3])))
    return b("Reshape", rows, b.constant([0, 0, d]))


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
    hidden = linear(b, x, ["model.aggregator.fc1"], d, streams * d, precision)
    hidden = b("Mul", hidden, b("Sigmoid", hidden))
    # A matrix of P rows is too small to be worth quantising.
    scores = linear(b, hidden, ["model.aggregator.fc2"], streams, d, b.options.activations)
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
        return linear(b, x, [module], vocab, d, b.options.head_precision)
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
