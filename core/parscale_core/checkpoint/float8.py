"""Dequantise float8 weights whose blocks share a scale, as DeepSeek-V3 and Qwen3 are published."""

import numpy as np


def dequantize(
    weight: np.ndarray, scales: np.ndarray, blocks: tuple[int, int] | None
) -> np.ndarray:
    """Weights as float32 [rows, columns].

    Args:
        weight: float8 [rows, columns].
        scales: [rows / blocks[0], columns / blocks[1]], rounded up: what a block is multiplied by.

    Raises:
        ValueError: there are fewer or more scales than blocks.
    """
    assert blocks is not None
    expected = tuple(-(-size // block) for size, block in zip(weight.shape, blocks, strict=True))
    if scales.shape != expected:
        raise ValueError(
            f"{list(scales.shape)} scales for {list(expected)} blocks of float8 weights"
        )
    rows, columns = weight.shape
    factors = scales.astype(np.float32).repeat(blocks[0], axis=0).repeat(blocks[1], axis=1)
    return weight.astype(np.float32) * factors[:rows, :columns]
