"""Block-wise integer quantisation of matrices, for MatMulNBits and DequantizeLinear."""

from dataclasses import dataclass

import numpy as np

ROWS_AT_ONCE = 1 << 24  # elements quantised at a time, so that temporaries stay small


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix [rows, columns]; weight = scale * (code - zero point).

    Attributes:
        codes: uint8 [rows, blocks, block_size], one code a byte; the last block padded.
        scales: float32 [rows, blocks].
        zero_points: uint8 [rows, blocks]; None stands for 2^(bits - 1).
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def quantize(weight: np.ndarray, *, bits: int, block_size: int) -> Blocks:
    """Round a matrix [rows, columns] to codes of 4 bits (asymmetric) or 8 (symmetric)."""
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    step = max(1, ROWS_AT_ONCE // (blocks * block_size))
    parts = [
        _quantize_rows(weight[start : start + step], bits, blocks, block_size)
        for start in range(0, rows, step)
    ]
    codes, scales, zeros = (
        None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True)
    )
    assert codes is not None and scales is not None
    return Blocks(codes, scales, zeros)


def _quantize_rows(weight: np.ndarray, bits: int, blocks: int, block_size: int):
    rows, columns = weight.shape
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = weight
    values = padded.reshape(rows, blocks, block_size)
    top = 2**bits - 1
    if bits == 8:
        scales = np.abs(values).max(-1) / 127
        scales[scales == 0] = 1
        codes = np.rint(values / scales[..., None]) + 128
        return np.clip(codes, 0, top).astype(np.uint8), scales, None
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    scales = (high - low) / top
    scales[scales == 0] = 1
    zeros = np.clip(np.rint(-low / scales), 0, top)
    codes = np.rint(values / scales[..., None]) + zeros[..., None]
    return np.clip(codes, 0, top).astype(np.uint8), scales, zeros.astype(np.uint8)


def dequantize(blocks: Blocks, columns: int, bits: int) -> np.ndarray:
    """The float32 matrix [rows, columns] that the codes stand for."""
    zeros = 2 ** (bits - 1) if blocks.zero_points is None else blocks.zero_points[..., None]
    values = (blocks.codes.astype(np.float32) - zeros) * blocks.scales[..., None]
    return values.reshape(len(values), -1)[:, :columns]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis packed into bytes, the first in the lowest bits."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | (codes[..., 1::2] << 4)
