"""Projections: an activation times a matrix of the checkpoint, in any precision."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from parscale_export.builder import MICROSOFT, Builder
from parscale_export.quantize import has_remainders, stored_columns
from parscale_export.w8a8 import BLOCK, LARGEST, MIDDLE, hadamard
from parscale_export.weights import BITS


def linear(
    b: Builder, x: ir.Value, modules: Sequence[str], rows: int, columns: int, precision: str
) -> ir.Value:
    """A projection [..., columns] to [..., rows]; several modules are stacked into one."""
    name = modules[0] if len(modules) == 1 else _joint_name(modules)
    sources = tuple(f"{module}.weight" for module in modules)
    b.products.setdefault(x, []).extend(modules)
    if precision == "w8a8" and modules[0] in b.options.kept:
        precision = "int8"
    if precision == "w8a8":
        rotated = modules[0] in b.options.rotated
        y = _integer_product(b, x, name, sources, (rows, columns), rotated)
    elif precision in BITS:
        y = _quantized_matmul(b, x, name, sources, rows, columns, BITS[precision])
    else:
        weight = b.weights.floats(
            f"{name}.weight", (columns, rows),
            lambda: np.ascontiguousarray(b.weights.array(sources).T),
        )  # fmt: skip
        y = b("MatMul", x, b.tensor(weight))
    biases = tuple(f"{module}.bias" for module in modules)
    if b.weights.has(biases[0]):
        y = b("Add", y, b.bias(f"{name}.bias", biases))
    return y


def _integer_product(
    b: Builder,
    x: ir.Value,
    name: str,
    sources: tuple[str, ...],
    shape: tuple[int, int],
    rotated: bool,
) -> ir.Value:
    if x not in b.rounded:
        b.rounded[x] = _rounded_rows(b, x, shape[1], rotated=rotated)
    stored = b.weights.channels(name, sources, shape, rotated=rotated)
    codes, scales = map(b.tensor, stored)
    return b.as_activation(_product_of_codes(b, b.rounded[x], codes, scales))


def _quantized_matmul(
    b: Builder, x: ir.Value, name: str, sources: tuple[str, ...], rows: int, columns: int, bits: int
) -> ir.Value:
    size = b.options.block_size
    if has_remainders(columns, bits, size) and not b.options.symmetric:
        stored = stored_columns(columns, size)
        x = _with_block_sums(b, x, columns // size, stored - columns)
        columns = stored
    if b.options.ops == "standard":
        codes, scales, zeros = b.weights.linear_codes(name, sources, (rows, columns), bits)
        weight = b(
            "DequantizeLinear", *map(b.tensor, (codes, scales, zeros)),
            axis=0, block_size=b.options.block_size,
        )  # fmt: skip
        return b("MatMul", x, weight)
    tensors = b.weights.codes(name, sources, (rows, columns), bits)
    return b(
        "MatMulNBits", x, *(b.tensor(t) for t in tensors if t is not None),
        domain=MICROSOFT, K=columns, N=rows, bits=bits,
        block_size=b.options.block_size, accuracy_level=b.options.accuracy_level,
    )  # fmt: skip


def _with_block_sums(b: Builder, x: ir.Value, blocks: int, width: int) -> ir.Value:
    """Inputs [B, L, columns], and after them each block's sum, in so many columns."""
    if x not in b.with_sums:
        shape = b.constant([0, 0, blocks, b.options.block_size])
        sums = b("ReduceSum", b("Reshape", x, shape), b.constant([-1]), keepdims=0)
        parts = [x, sums]
        if width > blocks:
            parts.append(_zeros(b, x, width - blocks))
        b.with_sums[x] = b("Concat", *parts, axis=-1)
    return b.with_sums[x]


def _zeros(b: Builder, x: ir.Value, columns: int) -> ir.Value:
    """Zeros [B, L, columns], made once for all inputs of the same rows and tokens as ``x``."""
    if columns not in b.zero_columns:
        shape = b("Concat", b("Shape", x, start=0, end=2), b.constant([columns]), axis=0)
        zero = b.constant(0, b.weights.numpy_dtype)
        b.zero_columns[columns] = b("Expand", zero, shape)
    return b.zero_columns[columns]


def _rounded_rows(
    b: Builder, x: ir.Value, columns: int, *, rotated: bool
) -> tuple[ir.Value, ir.Value]:
    """Activations [B, L, columns] as uint8 codes, and the factors of their products.

    A row of zeros has arbitrary codes: 0 / 0 is not a number, but its code is, and zero times it 0.
    """
    x = b.as_float32(x)
    if rotated:
        blocks = b("Reshape", x, b.constant([0, 0, -1, BLOCK]))
        mixed = b("MatMul", blocks, b.constant(hadamard(), np.float32))
        x = b("Reshape", mixed, b.constant([0, 0, columns]))
    largest = b("ReduceMax", b("Abs", x), b.constant([-1]), keepdims=1)
    # The row's scale is divided out first: QuantizeLinear takes a scale a row for two axes only.
    step, middle = b.constant(1 / LARGEST, np.float32), b.constant(MIDDLE, np.uint8)
    rounded = b("QuantizeLinear", b("Div", x, largest), step, middle)
    return rounded, largest if b.options.ops == "fused" else b("Mul", largest, step)


def _product_of_codes(
    b: Builder, rows: tuple[ir.Value, ir.Value], codes: ir.Value, scales: ir.Value
) -> ir.Value:
    """Rounded rows [..., in] times codes [in, out]: float32 [..., out]."""
    x, factors = rows
    step, middle = b.constant(1 / LARGEST, np.float32), b.constant(MIDDLE, np.uint8)
    if b.options.ops == "fused":
        y = b.microsoft("MatMulIntegerToFloat", x, codes, step, scales, middle)
    else:
        sums = b.cast(b("MatMulInteger", x, codes, middle), ir.DataType.FLOAT)
        y = b("Mul", sums, scales)
    return b("Mul", y, factors)


def _joint_name(modules: Sequence[str]) -> str:
    parent, _, _ = modules[0].rpartition(".")
    return f"{parent}.{'_'.join(m.rpartition('.')[2].removesuffix('_proj') for m in modules)}_proj"
