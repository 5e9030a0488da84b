"""Refuse weights and logits that hold NaN or infinity."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from parscale_mlx.model import Model

import mlx.core as mx
from parscale_core.error_text import not_finite


def check_weights(files: Iterable[Path], dtype: mx.Dtype | None = None) -> None:
    """Check the floating-point tensors of safetensors files, one in memory at a time.

    Args:
        dtype: check that they are finite in this type, to which they are about to be cast.

    Raises:
        ValueError: one is not.
    """
    for file in files:
        weights: Any = mx.load(str(file))
        for name in list(weights):
            weight = weights.pop(name)
            if mx.issubdtype(weight.dtype, mx.floating):
                weight = weight if dtype is None else weight.astype(dtype)
                if not mx.all(mx.isfinite(weight)).item():
                    raise ValueError(not_finite(f"{file}: {name} has"))


def check_logits(model: Model, name: object) -> None:
    """Check a model's logits after one token.

    What is not finite in any layer makes them so, at the cost of one step, where looking at the
    weights themselves would take seconds.

    Raises:
        ValueError: they are not finite.
    """
    if not mx.all(mx.isfinite(model(mx.array([[0]]), cache=model.make_cache()))).item():
        raise ValueError(not_finite(f"{name}: the logits have"))
