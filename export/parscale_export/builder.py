"""Nodes and weights of a graph that is being built, for either operator set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from parscale_core.checkpoint.config import ModelConfig

from parscale_export.weights import Weights

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
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._tensors: dict[str, ir.Value] = {}
        # What ``linear`` adds to an activation once for all matrices that it is multiplied with.
        self.with_sums: dict[ir.Value, ir.Value] = {}
        self.zero_columns: dict[int, ir.Value] = {}
        self.rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        # Which matrices each activation is multiplied with; see ``calibrate``.
        self.products: dict[ir.Value, list[str]] = {}

    def __call__(
        self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        return self.op(op, inputs, attributes, domain=domain)

    def microsoft(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node of onnxruntime's own operators."""
        return self(op, *inputs, domain=MICROSOFT, **attributes)

    def many(
        self, op: str, *inputs: ir.Value | None, n: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
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
        return self.bias(name, (name,))

    def bias(self, name: str, sources: tuple[str, ...]) -> ir.Value:
        """One-dimensional weights, joined, in the activations' type."""
        rows = sum(self.weights.checkpoint.shape(source)[0] for source in sources)
        return self.tensor(self.weights.floats(name, (rows,), lambda: self.weights.array(sources)))

    def change_rows(self) -> None:
        """From here on, hidden states have other rows or tokens than before."""
        self.zero_columns.clear()


def folded_heads(config: ModelConfig, kv_layout: str) -> tuple[int, int, int]:
    """How many query heads and key-value heads attention has, and rows for each sequence."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_layout == "heads":
        return config.streams * heads, config.streams * kv_heads, 1
    return heads, kv_heads, config.streams
