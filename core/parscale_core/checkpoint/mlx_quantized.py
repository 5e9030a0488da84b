"""Dequantise the tensors of MLX's quantisation modes, in numpy.

MLX packs ``bits`` wide codes little-endian into uint32 words along the last axis. ``affine`` has a
float scale and bias a group; the others are the OCP microscaling formats and NVIDIA's FP4, whose
scales are one byte a group.
"""

from typing import Any

import ml_dtypes
import numpy as np

# mode: type of the codes, type of the scales
_FLOAT_MODES = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu),
    "mxfp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu),
    "nvfp4": (ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn),
}
_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)


def settings(quantization: dict[str, Any], module: str) -> tuple[str, int, int]:
    """Mode, group size and bits of one module, from ``config["quantization"]``.

    Raises:
        ValueError: a mode, or a number of bits, that MLX does not have.
    """
    own = quantization.get(module)
    chosen = quantization | own if isinstance(own, dict) else quantization
    mode = chosen.get("mode", "affine")
    if mode not in _DEFAULTS:
        raise ValueError(
            f"{module}: quantisation mode {mode!r} is not one of {', '.join(_DEFAULTS)}"
        )
    group, bits = _DEFAULTS[mode]
    group, bits = chosen.get("group_size") or group, chosen.get("bits") or bits
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"{module}: group_size {group!r} is not a positive whole number")
    if mode != "affine" and (group, bits) != _DEFAULTS[mode]:
        raise ValueError(f"{module}: {mode} has groups of {_DEFAULTS[mode][0]}, not of {group!r}")
    if mode == "affine" and bits not in _AFFINE_BITS:
        raise ValueError(f"{module}: {bits} bits is not one of {_AFFINE_BITS}")
    return mode, group, bits


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes as uint8 [..., n * 32 / bits] from uint32 words [..., n]."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return packed
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    else:
        stream = np.unpackbits(packed, axis=-1, bitorder="little")
        codes = np.packbits(
            stream.reshape(*packed.shape[:-1], -1, bits), axis=-1, bitorder="little"
        )
    return codes.reshape(*packed.shape[:-1], -1)


def dequantize(
    weight: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray | None,
    *,
    mode: str,
    group_size: int,
    bits: int,
) -> np.ndarray:
    """Weights as float32 [..., columns] from packed words, scales and (affine only) biases."""
    codes = unpack(weight, bits).reshape(*scales.shape, group_size)
    if mode == "affine":
        assert biases is not None
        values = codes * scales.astype(np.float32)[..., None]
        values += biases.astype(np.float32)[..., None]
    else:
        code_type, scale_type = _FLOAT_MODES[mode]
        scale = scales.view(scale_type).astype(np.float32)
        values = codes.view(code_type).astype(np.float32) * scale[..., None]
    return values.reshape(*scales.shape[:-1], -1)
