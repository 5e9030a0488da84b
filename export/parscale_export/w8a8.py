"""Products of 8-bit integers: weights with a scale an output channel, activations with one a row.

A row is one token of one stream. P streams are rows, and this product does eight rows for little
more than one, where MatMulNBits does them one after the other. It is made of standard operators, or
of onnxruntime's MatMulIntegerToFloat, which multiplies with the weights' scales in the same pass.
Activations become uint8 around 128 and weights int8 around 0, the pair that VNNI multiplies. On
x86 processors without VNNI the product of such pairs saturates at 16 bits, unless the session has
``session.x64quantprecision`` set to 1, as ours have.
"""

import numpy as np

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
