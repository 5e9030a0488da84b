"""Block-wise integer quantisation of matrices, for MatMulNBits and DequantizeLinear.

With 8 bits a block has a scale and is symmetric. With 4 bits it has a scale and an offset: its
smallest and largest weight are both codes, as in MLX's affine mode and GGUF's Q4_1, which therefore
come through unharmed. The operators' zero points are whole codes, so what an offset is beyond that
(the remainder) is multiplied by the sum of the block's inputs. These sums are appended to the input
and the remainders, quantised likewise, to the matrix, which grows by a column a block and by as
many columns of zeros as make its width a multiple of 32: CUDA's kernels for few rows need that.

Symmetric blocks of 4 bits have a scale alone, as in GGUF's Q4_0: there is nothing to append, and
CUDA has its fastest kernels for them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WIDTH = 32  # columns, of which a matrix with remainders has a multiple
ELEMENTS_AT_ONCE = 1 << 24  # so that temporaries stay small beside the matrix


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix [rows, columns], with a column for each remainder where there are any.

    Attributes:
        codes: uint8 [rows, blocks, block_size], one code a byte; the last block padded.
        scales: float32 [rows, blocks]; a weight is scale * (code - zero point).
        zero_points: uint8 [rows, blocks]; None stands for 2^(bits - 1).
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def has_remainders(columns: int, bits: int, block_size: int) -> bool:
    """Whether a matrix of so many columns is stored with remainders, if it has offsets."""
    return bits == 4 and columns % block_size == 0


def stored_columns(columns: int, block_size: int) -> int:
    """How many columns a matrix has once its remainders are appended."""
    return -(-(columns + columns // block_size) // WIDTH) * WIDTH


def quantize(
    weight: np.ndarray,
    *,
    bits: int,
    block_size: int,
    remainders: bool = True,
    symmetric: bool = False,
) -> Blocks:
    """Round a matrix [rows, columns] to codes of 4 bits (with offsets) or 8 (symmetric).

    Args:
        remainders: append them, where ``has_remainders``; a table that is looked up has no sums.
        symmetric: 4 bits without offsets, and so without remainders.
    """
    if symmetric or bits == 8:
        return _in_parts(weight, lambda part: _symmetric(_blocks(part, block_size), bits))
    remainders = remainders and has_remainders(weight.shape[1], bits, block_size)
    return _in_parts(weight, lambda part: _with_offsets(part, block_size, remainders))


def _in_parts(weight: np.ndarray, round_rows: Callable[[np.ndarray], Blocks]) -> Blocks:
    step = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    parts = [round_rows(weight[start : start + step]) for start in range(0, len(weight), step)]
    return parts[0] if len(parts) == 1 else _joined(parts, axis=0)


def dequantize(blocks: Blocks, columns: int, bits: int) -> np.ndarray:
    """The float32 matrix [rows, columns] that the codes stand for, remainders added."""
    zeros = 2 ** (bits - 1) if blocks.zero_points is None else blocks.zero_points[..., None]
    values = (blocks.codes.astype(np.float32) - zeros) * blocks.scales[..., None]
    rows, _, block_size = values.shape
    flat = values.reshape(rows, -1)
    weight = flat[:, :columns]
    if blocks.zero_points is not None and has_remainders(columns, bits, block_size):
        remainders = flat[:, columns : columns + columns // block_size]
        weight = weight + np.repeat(remainders, block_size, axis=1)
    return weight


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis packed into bytes, the first in the lowest bits."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _blocks(weight: np.ndarray, block_size: int) -> np.ndarray:
    """A matrix [rows, columns] as float32 [rows, blocks, block_size], zeros at its end."""
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // block_size) * block_size), np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, -1, block_size)


def _with_offsets(weight: np.ndarray, block_size: int, remainders: bool) -> Blocks:
    values, columns = _blocks(weight, block_size), weight.shape[1]
    if not remainders:
        return _asymmetric(values, np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0))[0]
    main, offsets = _asymmetric(values, values.min(-1), values.max(-1))
    appended = np.zeros((len(weight), stored_columns(columns, block_size) - columns), np.float32)
    appended[:, : offsets.shape[1]] = offsets
    last = _blocks(appended, block_size)
    low, high = np.minimum(last.min(-1), 0), np.maximum(last.max(-1), 0)
    return _joined([main, _asymmetric(last, low, high)[0]], axis=1)


def _symmetric(values: np.ndarray, bits: int) -> Blocks:
    if bits == 8:
        scales = np.abs(values).max(-1) / 127
    else:
        # The weight farthest from zero is the code 0, which is 8 steps away; 15 is but 7.
        farthest = np.abs(values).argmax(-1)[..., None]
        scales = np.take_along_axis(values, farthest, -1)[..., 0] / -8
    scales[scales == 0] = 1
    codes = np.rint(values / scales[..., None]) + 2 ** (bits - 1)
    return Blocks(np.clip(codes, 0, 2**bits - 1).astype(np.uint8), scales, None)


def _asymmetric(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[Blocks, np.ndarray]:
    """Four-bit codes from ``low`` to ``high``, and what each block's offset is beyond them."""
    scales = (high - low) / 15
    # A block of equal weights: one code, and the offset says which.
    scales[scales == 0] = 1
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint((values - low[..., None]) / scales[..., None]), 0, 15)
    blocks = Blocks(codes.astype(np.uint8), scales, zeros.astype(np.uint8))
    return blocks, low + zeros * scales


def _joined(parts: list[Blocks], axis: int) -> Blocks:
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return Blocks(
        np.concatenate([part.codes for part in parts], axis=axis),
        np.concatenate([part.scales for part in parts], axis=axis),
        np.concatenate(zeros, axis=axis) if zeros else None,
    )
