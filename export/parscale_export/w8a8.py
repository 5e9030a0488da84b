"""Products of 8-bit integers: weights with a scale an output channel, activations with one a row.

A row is one token of one stream. P streams are rows, and this product does eight rows for little
more than one, where MatMulNBits does them one after the other. It is made of standard operators, or
of onnxruntime's MatMulIntegerToFloat, which multiplies with the weights' scales in the same pass.
Activations become uint8 around 128 and weights int8 around 0, the pair that VNNI multiplies. On
x86 processors without VNNI the product of such pairs saturates at 16 bits, unless the session has
``session.x64quantprecision`` set to 1, as ours have.
"""

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from parscale_export.builder import Builder

MIDDLE = 128  # the code of zero
LARGEST = 127  # codes on either side of it
BLOCK = 16  # channels that a rotation mixes


def round_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [out, in] and scales float32 [out] of a matrix [out, in]."""
    scales = np.abs(weight).max(axis=1).astype(np.float32) / LARGEST
    scales[scales == 0] = 1
    codes = np.rint(weight / scales[:, None])
    return codes.astype(np.int8), scales


def rotate_blocks(x: np.ndarray) -> np.ndarray:
    """Rows [n, columns], each block of channels mixed by a Hadamard matrix, which is orthogonal.

    One large channel becomes 16 that are a quarter as large, so that a row's scale is smaller; and
    where a matrix is rotated like its activations, their product is what it was.
    """
    return (x.reshape(len(x), -1, BLOCK) @ hadamard()).reshape(x.shape)


def hadamard() -> np.ndarray:
    """The orthogonal Hadamard matrix of Sylvester's construction, float32 [BLOCK, BLOCK]."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(BLOCK))


def rounded_rows(
    b: "Builder", x: ir.Value, columns: int, *, rotated: bool
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


def integer_product(
    b: "Builder", rows: tuple[ir.Value, ir.Value], codes: ir.Value, scales: ir.Value
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


def gather_columns(
    b: "Builder", codes: ir.TensorProtocol, scales: ir.TensorProtocol, ids: ir.Value
) -> ir.Value:
    """Rows of an embedding that is stored as its head's codes [d, vocab]: float32 [B, L, d]."""
    columns = b.cast(b("Gather", b.tensor(codes), ids, axis=1), ir.DataType.FLOAT)
    return b("Transpose", b("Mul", columns, b("Gather", b.tensor(scales), ids)), perm=[1, 2, 0])


def gather_rows(
    b: "Builder", codes: ir.TensorProtocol, scales: ir.TensorProtocol, ids: ir.Value
) -> ir.Value:
    """Rows of an embedding's own codes [vocab, d]: float32 [B, L, d]."""
    rows = b.cast(b("Gather", b.tensor(codes), ids), ir.DataType.FLOAT)
    return b("Mul", rows, b("Unsqueeze", b("Gather", b.tensor(scales), ids), b.constant([2])))
