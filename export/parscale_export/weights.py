"""ONNX initializers that are computed from a checkpoint only when they are written.

Every large tensor is an ``onnx_ir.LazyTensor``, so that saving the model holds one at a time.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_core.error_text import not_finite

from parscale_export.quantize import Blocks, pack, quantize
from parscale_export.smooth import Smoothing
from parscale_export.w8a8 import rotate_blocks, round_channels

FLOATS = {
    "fp32": (ir.DataType.FLOAT, np.dtype(np.float32)),
    "fp16": (ir.DataType.FLOAT16, np.dtype(np.float16)),
    "bf16": (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
BITS = {"int8": 8, "int4": 4}


class Weights:
    """Named tensors of a checkpoint in the shapes and types that operators want.

    Args:
        activations: "fp32", "fp16" or "bf16", the type of everything that is not quantised.
        block_size: columns that share a scale, in quantised matrices.
        symmetric: matrices of 4 bits have no offsets; see ``quantize``.
        smoothing: what to scale the weights with.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        activations: str,
        block_size: int,
        symmetric: bool = False,
        smoothing: Smoothing | None = None,
    ):
        self.checkpoint, self.smoothing = checkpoint, smoothing
        self.dtype, self.numpy_dtype = FLOATS[activations]
        self.block_size, self.symmetric = block_size, symmetric
        # A quantised matrix gives two or three tensors, written one after the other.
        self._quantized = lru_cache(maxsize=1)(self._quantize)
        self._channels = lru_cache(maxsize=1)(self._round_channels)

    def has(self, name: str) -> bool:
        return name in self.checkpoint

    def array(self, names: Sequence[str]) -> np.ndarray:
        """Tensors stacked along their rows: a packed projection's weight [out, in], or a bias."""
        tensors = [self.checkpoint.tensor(name) for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            _check_finite(name, tensor)
        if self.smoothing is not None:
            pairs = zip(names, tensors, strict=True)
            tensors = [self.smoothing.apply(name, tensor) for name, tensor in pairs]
        return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)

    def floats(
        self,
        name: str,
        shape: Sequence[int],
        compute: Callable[[], np.ndarray],
        dtype: ir.DataType | None = None,
    ) -> ir.LazyTensor:
        """A tensor of the activations' type (or ``dtype``), computed when it is written."""
        numpy_dtype = self.numpy_dtype if dtype is None else dtype.numpy()

        def cast() -> np.ndarray:
            with np.errstate(over="ignore"):  # what becomes infinite is refused
                return compute().astype(numpy_dtype)

        return lazy(name, shape, dtype or self.dtype, cast)

    def codes(
        self,
        name: str,
        sources: tuple[str, ...],
        shape: Sequence[int],
        bits: int,
        *,
        remainders: bool = True,
    ) -> tuple[ir.LazyTensor, ir.LazyTensor, ir.LazyTensor | None]:
        """A matrix [out, in] for MatMulNBits: packed codes, scales and (4 bits) zero points.

        ``shape`` is the stored one, with the columns of the remainders, if any (see ``quantize``).
        """
        rows, columns = shape
        blocks = -(-columns // self.block_size)
        byte = ir.DataType.UINT8
        quantized = partial(self._quantized, sources, bits, remainders)
        codes = lazy(
            f"{name}.codes", (rows, blocks, self.block_size * bits // 8), byte,
            lambda: pack(quantized().codes, bits),
        )  # fmt: skip
        scales = self.floats(f"{name}.scales", (rows, blocks), lambda: quantized().scales)
        if bits == 8 or (self.symmetric and remainders):
            return codes, scales, None
        zeros = lazy(
            f"{name}.zero_points", (rows, -(-blocks * bits // 8)), byte,
            lambda: pack(_present(quantized().zero_points), bits),
        )  # fmt: skip
        return codes, scales, zeros

    def channels(
        self,
        name: str,
        sources: tuple[str, ...],
        shape: Sequence[int],
        *,
        rotated: bool = False,
        table: bool = False,
    ) -> tuple[ir.LazyTensor, ir.LazyTensor]:
        """A matrix [out, in] with a scale a row: int8 codes [in, out], float32 scales [out].

        Args:
            rotated: blocks of its columns are mixed, see ``w8a8.rotate_blocks``.
            table: the codes stay [out, in], to be looked up by rows.
        """
        rows, columns = shape

        def codes() -> np.ndarray:
            whole = self._channels(sources, rotated)[0]
            return whole if table else np.ascontiguousarray(whole.T)

        stored = (rows, columns) if table else (columns, rows)
        return (
            lazy(f"{name}.codes", stored, ir.DataType.INT8, codes),
            lazy(
                f"{name}.scales", (rows,), ir.DataType.FLOAT,
                lambda: self._channels(sources, rotated)[1],
            ),
        )  # fmt: skip

    def _round_channels(
        self, sources: tuple[str, ...], rotated: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        weight = self.array(sources).astype(np.float32)
        return round_channels(rotate_blocks(weight) if rotated else weight)

    def linear_codes(
        self, name: str, sources: tuple[str, ...], shape: Sequence[int], bits: int
    ) -> tuple[ir.LazyTensor, ir.LazyTensor, ir.LazyTensor]:
        """A matrix [in, out] for DequantizeLinear blocked along axis 0: codes, scales, zeros."""
        rows, columns = shape
        blocks = -(-columns // self.block_size)
        quantized = partial(self._quantized, sources, bits, True)
        dtype = ir.DataType.UINT8 if bits == 8 else ir.DataType.UINT4

        def codes() -> np.ndarray:
            whole = quantized().codes
            return np.ascontiguousarray(whole.reshape(rows, -1)[:, :columns].T)

        def zeros() -> np.ndarray:
            zero_points = quantized().zero_points
            if zero_points is None:
                return np.full((blocks, rows), 2 ** (bits - 1), np.uint8)
            return np.ascontiguousarray(zero_points.T)

        return (
            lazy(f"{name}.codes", (columns, rows), dtype, codes),
            self.floats(
                f"{name}.scales", (blocks, rows),
                lambda: np.ascontiguousarray(quantized().scales.T),
            ),
            lazy(f"{name}.zero_points", (blocks, rows), dtype, zeros),
        )  # fmt: skip

    def _quantize(self, sources: tuple[str, ...], bits: int, remainders: bool) -> Blocks:
        return quantize(
            self.array(sources),
            bits=bits,
            block_size=self.block_size,
            remainders=remainders,
            symmetric=self.symmetric and remainders,
        )


def lazy(
    name: str, shape: Sequence[int], dtype: ir.DataType, compute: Callable[[], np.ndarray]
) -> ir.LazyTensor:
    """A tensor that ``compute`` makes each time it is written; 4-bit types take a code a byte."""

    def make() -> ir.TensorProtocol:
        array = compute()
        if dtype.is_floating_point():
            _check_finite(name, array)
        if dtype == ir.DataType.UINT4:
            array = array.astype(ml_dtypes.uint4)
        return ir.Tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)


def _check_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise ValueError(not_finite(f"{name} has"))


def _present(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    return array
