"""Dequantise weights that AWQ or GPTQ packed: whole-number codes, groups of which share a scale.

Both keep a linear layer of [out, in] as ``qweight``, ``qzeros``, ``scales`` and, in GPTQ,
``g_idx``; they differ in the axis that the codes of a word lie along, and in their order. Layouts
as in AutoAWQ's ``gemm`` kernels and in AutoGPTQ.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from parscale_core.checkpoint.mlx_quantized import unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AWQ puts the codes of eight columns


@dataclass(frozen=True)
class Packing:
    """How a model's weights are packed.

    Attributes:
        method: "awq" or "gptq".
        bits: of a code.
        group_size: inputs that share a scale; -1 for all of a layer.
        offset: what a zero point is short of.
    """

    method: str
    bits: int
    group_size: int
    offset: int

    def shape(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        """The weight's shape [out, in] from that of its codes."""
        first, second = qweight
        many = 32 // self.bits
        return (second * many, first) if self.method == "awq" else (second, first * many)

    def part_shapes(self, qweight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes that the other parts must have."""
        rows, columns = self.shape(qweight)
        groups = 1 if self.group_size == -1 else -(-columns // self.group_size)
        zeros = (groups, rows * self.bits // 32)
        return {"qzeros": zeros, "scales": (groups, rows), "g_idx": (columns,)}


def read_packing(settings: dict[str, Any]) -> Packing:
    """From ``config.json``'s ``quantization_config``.

    Raises:
        ValueError: it names a layout that is not read here.
    """
    method, bits, group_size = (settings.get(k) for k in ("quant_method", "bits", "group_size"))
    layouts = {
        "bits": (bits, (4,) if method == "awq" else (2, 4, 8)),
        "version": (str(settings.get("version", "gemm")).lower(), ("gemm",)),
        "checkpoint_format": (settings.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2")),
        "pack_dtype": (settings.get("pack_dtype", "int32"), ("int32",)),
        "dynamic": (settings.get("dynamic") or None, (None,)),
    }
    for key, (value, known) in layouts.items():
        if value not in known:
            names = " or ".join(map(str, known))
            raise ValueError(f"{method} with {key} {value!r} is not supported, only {names}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise ValueError(
            f"{method}: group_size {group_size!r} is not a positive whole number or -1"
        )
    is_first = method == "gptq" and settings.get("checkpoint_format", "gptq") == "gptq"
    return Packing(str(method), int(settings["bits"]), group_size, int(is_first))


def dequantize(packing: Packing, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Weights as float32 [out, in].

    Args:
        parts: ``qweight`` and ``qzeros`` of int32; ``scales``; ``g_idx``, the group of each input,
            if they are not in order.

    Raises:
        ValueError: an input is of a group that is not there.
    """
    scales = parts["scales"].astype(np.float32).T
    if packing.method == "awq":
        codes, zeros = (_columns(parts[name]).T for name in ("qweight", "qzeros"))
    else:
        codes = unpack(_words(parts["qweight"].T), packing.bits)
        zeros = unpack(_words(parts["qzeros"]), packing.bits).T
    group_size = codes.shape[1] if packing.group_size == -1 else packing.group_size
    groups = parts.get("g_idx", np.arange(codes.shape[1]) // group_size)
    if groups.min() < 0 or groups.max() >= scales.shape[1]:
        raise ValueError(f"g_idx names groups outside the {scales.shape[1]} that have scales")
    # The sum wraps round, as in AutoGPTQ.
    zeros = (zeros + np.uint8(packing.offset)) & np.uint8(2**packing.bits - 1)
    values = codes.astype(np.float32) - zeros.astype(np.float32)[:, groups]
    values *= scales[:, groups]
    return values


def _columns(words: np.ndarray) -> np.ndarray:
    codes = unpack(_words(words), 4)
    return codes.reshape(*words.shape, 8)[..., _ORDER].reshape(len(words), -1)


def _words(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)
