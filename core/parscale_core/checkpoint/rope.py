"""Rotary position embeddings: what ``config.json`` says of them, and the frequencies it means.

As transformers computes them (its ``modeling_rope_utils.py``), key by key; what it would ignore or
compute otherwise than a table can is refused.
"""

import math
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
# By type, the keys that it needs and those that it may have. _ORIGINAL changes nothing in two.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), {_ORIGINAL}),
    "linear": ({"factor"}, {_ORIGINAL}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_ORIGINAL}),
    "yarn": (
        {"factor"},
        {_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor"}, {_ORIGINAL, "factor", "attention_factor"}),
}  # fmt: skip


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are rotated.

    Attributes:
        frequencies: radians a position for each pair of dimensions, float64 [head_dim / 2].
        scale: what the rotated queries and keys are multiplied with (YaRN, LongRoPE).
        long_frequencies, original: LongRoPE's other frequencies, and the number of tokens beyond
            which they take the place of the first.
    """

    frequencies: np.ndarray
    scale: float = 1.0
    long_frequencies: np.ndarray | None = None
    original: int = 0

    def is_same(self, other: "Rotation") -> bool:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a ``config.json``.

    Attributes:
        kind: its ``rope_type``.
        theta: its ``rope_theta``.
        head_dim: the dimensions of a head, all of which are rotated.
        context: ``max_position_embeddings``.
        keys: those of its ``rope_scaling`` or ``rope_parameters`` that matter to its kind.
    """

    kind: str
    theta: float
    head_dim: int
    context: int
    keys: dict[str, Any]

    @classmethod
    def from_config(cls, raw: dict[str, Any], *, head_dim: int, context: int) -> "Rope":
        """Read and check the fields of a ``config.json`` that are about rotary embedding.

        Raises:
            ValueError: a field that is none of its type's, or not a number; the message names it.
        """
        # transformers 5 writes rope_theta and rope_scaling as one dictionary.
        name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
        scaling = raw.get(name) or {}
        if not isinstance(scaling, dict):
            raise ValueError(f"{name} is {scaling!r}, where an object is needed")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if not isinstance(kind, str) or kind not in _KEYS:
            raise ValueError(f"{name}: rope_type {kind!r} is not one of {', '.join(_KEYS)}")
        needed, possible = _KEYS[kind]
        for key in sorted(needed - set(scaling)):
            raise ValueError(f"{name} of rope_type {kind!r} lacks {key!r}")
        for key in sorted(set(scaling) - needed - possible - _NAMES):
            raise ValueError(f"{name}: {key!r} is not known for rope_type {kind!r}")
        for place in (scaling, raw):
            if place.get("partial_rotary_factor") not in (None, 1):
                raise ValueError(
                    f"partial_rotary_factor {place['partial_rotary_factor']!r} is not supported: "
                    "all dimensions of a head are rotated, or none"
                )
        theta = scaling["rope_theta"] if "rope_theta" in scaling else raw.get("rope_theta", 1e4)
        keys = {
            key: scaling[key] for key in sorted(needed | possible) if scaling.get(key) is not None
        }
        # Where a config.json has it outside, that one counts.
        keys[_ORIGINAL] = raw.get(_ORIGINAL) or scaling.get(_ORIGINAL) or context
        rope = cls(kind, positive("rope_theta", theta, above=1), head_dim, context, keys)
        rope.rotation()  # so that it is computed before anything else is
        return rope

    @property
    def factor(self) -> float | None:
        """By how much the context was stretched; None where the lengths say it."""
        return None if self.keys.get("factor") is None else self._get("factor")

    def rotation(self) -> Rotation:
        """The frequencies, and what else it takes to rotate.

        Raises:
            ValueError: a key's value that no frequencies can be computed from.
        """
        dims = self.head_dim
        periods = self.theta ** (np.arange(0, dims, 2) / dims)
        if self.kind == "linear":
            return Rotation(1 / (periods * self._get("factor")))
        if self.kind == "llama3":
            return Rotation(1 / self._llama3(periods))
        if self.kind == "yarn":
            return self._yarn(periods)
        if self.kind == "longrope":
            return self._longrope(periods)
        return Rotation(1 / periods)

    def _llama3(self, periods: np.ndarray) -> np.ndarray:
        factor, context = self._get("factor"), self._get(_ORIGINAL)
        low, high = self._get("low_freq_factor"), self._get("high_freq_factor")
        if low >= high:
            raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")
        wavelengths = 2 * math.pi * periods
        blend = (context / wavelengths - low) / (high - low)
        between = periods / ((1 - blend) / factor + blend)
        scaled = np.where(wavelengths > context / low, periods * factor, between)
        return np.where(wavelengths < context / high, periods, scaled)

    def _yarn(self, periods: np.ndarray) -> Rotation:
        dims, context = self.head_dim, self._get(_ORIGINAL)
        factor = self.factor or self.context / context

        def dimension(rotations: float) -> float:
            turns = context / (rotations * 2 * math.pi)
            return dims * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self._get("beta_fast", 32)), dimension(self._get("beta_slow", 1))
        if self.keys.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        ramp = np.clip((np.arange(dims // 2) - low) / (high - low or 0.001), 0, 1)
        return Rotation(ramp / (factor * periods) + (1 - ramp) / periods, self._yarn_scale(factor))

    def _yarn_scale(self, factor: float) -> float:
        def magnitude(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        if "attention_factor" in self.keys:
            return self._get("attention_factor")
        if self.keys.get("mscale") and self.keys.get("mscale_all_dim"):
            return magnitude(self._get("mscale")) / magnitude(self._get("mscale_all_dim"))
        return magnitude(1)

    def _longrope(self, periods: np.ndarray) -> Rotation:
        original = int(self._get(_ORIGINAL))
        factor = self.factor or self.context / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return Rotation(
            frequencies=1 / (self._factors("short_factor") * periods),
            scale=self._get("attention_factor", scale),
            long_frequencies=1 / (self._factors("long_factor") * periods),
            original=original,
        )

    def _factors(self, name: str) -> np.ndarray:
        values, count = self.keys[name], self.head_dim // 2
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"{name} is not a list of {count} numbers, one a pair of dimensions")
        return np.array([positive(name, value, above=0) for value in values])

    def _get(self, name: str, default: float | None = None) -> float:
        value = self.keys.get(name)
        if not value and default is not None and name != "attention_factor":
            value = default  # as transformers: 0 stands for the default
        elif value is None:
            value = default
        return positive(name, value, above=0)


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


def finite(name: str, value: Any) -> float:
    """The number that a field of ``config.json`` holds.

    Raises:
        ValueError: it holds none, or one that is not finite.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    raise ValueError(f"{name} is {value!r}, where a number is needed")


def positive(name: str, value: Any, *, above: float = 0) -> float:
    """The same of a field whose number must be above ``above``."""
    number = finite(name, value)
    if number <= above:
        raise ValueError(f"{name} is {value!r}, where a number above {above} is needed")
    return number
