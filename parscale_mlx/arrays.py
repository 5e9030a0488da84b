"""A checkpoint's tensors as MLX arrays, and quantised layers to hold them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from parscale_core.checkpoint import mlx_quantized
from parscale_core.checkpoint.names import PUBLISHED_COLUMNS, internal_columns
from parscale_core.checkpoint.tensors import Checkpoint


def read_weights(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """A checkpoint's tensors by their names in memory, left on disk until they are used."""
    files = {stored.file for stored in checkpoint.stored.values() if stored.pickled is None}
    opened = {file: _open(file) for file in files}
    weights = {}
    for name, stored in checkpoint.stored.items():
        if name.endswith("_scale_inv"):
            continue
        if decoded := checkpoint.decoded_type(name):
            weights[name] = mx.array(checkpoint.tensor(name)).astype(getattr(mx, decoded))
        elif stored.pickled is not None or opened[stored.file] is None:
            weights[name] = _from_numpy(checkpoint.read(name))
        elif stored.name == PUBLISHED_COLUMNS:
            value = opened[stored.file][stored.name]
            weights[name] = internal_columns(value, checkpoint.config.streams)
        else:
            weights[name] = opened[stored.file][stored.name]
    return weights


def quantize_layers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put quantised layers where the checkpoint holds them, in place."""

    def settings(path: str, module: nn.Module) -> dict[str, Any] | bool:
        if not checkpoint.is_quantized(f"{path}.weight"):
            return False
        mode, group_size, bits = mlx_quantized.settings(checkpoint.quantization, path)
        return {"group_size": group_size, "bits": bits, "mode": mode}

    nn.quantize(model, class_predicate=settings)


def _open(file: Path) -> Any:
    """The arrays of a safetensors file; None where it holds one of a type that MLX has not."""
    try:
        return mx.load(str(file))
    except RuntimeError:
        return None


def _from_numpy(value: np.ndarray) -> mx.array:
    if value.dtype == np.dtype("bfloat16"):  # MLX takes no such array from numpy: move its bits
        return mx.array(value.view(np.uint16)).view(mx.bfloat16)
    return mx.array(value)
