"""Rotary embedding tables for the ``rope_scaling`` types of ``config.json``.

The definitions are those of the papers as mlx-lm computes them (its ``models/rope_utils.py``), so
that an exported graph gives what the same folder gives in MLX.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from parscale_core.checkpoint.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position for each pair of dimensions, float64 [head_dim / 2], and the scale.

    The scale multiplies queries and keys of the tokens (YaRN, LongRoPE; 1 otherwise).

    Raises:
        ValueError: a ``rope_scaling`` type that a fixed table cannot express, or one that lacks a
            field.
    """
    scaling = config.rope_scaling
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    periods = config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    kinds: dict[str, Callable[[np.ndarray, dict, ModelConfig], tuple[np.ndarray, float]]] = {
        "default": lambda periods, scaling, config: (periods, 1.0),
        "linear": lambda periods, scaling, config: (periods * scaling["factor"], 1.0),
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
    if kind not in kinds:
        raise ValueError(f"rope_scaling type {kind!r} is not one of {', '.join(kinds)}")
    try:
        periods, scale = kinds[kind](periods, scaling, config)
    except KeyError as error:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {error}") from error
    return 1.0 / periods, scale


def rotate(x: np.ndarray, angles: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """Rotate ``x`` [..., head_dim] by ``angles`` [..., head_dim / 2] in radians, in float64.

    Pairs are (i, i + head_dim / 2), or neighbours where ``interleaved``.
    """
    x = x.astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _llama3(periods: np.ndarray, scaling: dict[str, Any], config: ModelConfig):
    factor = scaling["factor"]
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    context = scaling.get("original_max_position_embeddings", 8192)
    wavelengths = 2 * math.pi * periods
    blend = (context / wavelengths - low) / (high - low)
    between = periods / ((1 - blend) / factor + blend)
    scaled = np.where(wavelengths > context / low, periods * factor, periods)
    return np.where(
        (wavelengths > context / high) & (wavelengths < context / low), between, scaled
    ), 1.0


def _yarn(periods: np.ndarray, scaling: dict[str, Any], config: ModelConfig):
    factor, dims, base = scaling["factor"], config.head_dim, config.rope_theta
    context = scaling.get("original_max_position_embeddings", 4096)

    def dimension(rotations: float) -> float:
        return dims * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    low = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow", 1))), dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low or 0.001), 0, 1)
    extrapolated, interpolated = periods, periods * factor
    mixed = interpolated * extrapolated / (interpolated * (1 - ramp) + extrapolated * ramp)
    scale = magnitude(scaling.get("mscale", 1)) / magnitude(scaling.get("mscale_all_dim", 0))
    return mixed, scale


def _longrope(periods: np.ndarray, scaling: dict[str, Any], config: ModelConfig):
    context = scaling["original_max_position_embeddings"]
    growth = config.max_position_embeddings / context
    scale = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(context))
    return periods * np.asarray(scaling["long_factor"], np.float64), scale
