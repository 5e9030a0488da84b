"""SmoothQuant (arXiv 2211.10438): scales moved from activations into the weights they meet.

A few input channels of a product are far larger than the rest, and with one scale a row they leave
the rest few codes. So channel c of the activation is divided by s[c], in the weights that make it
(a norm, v_proj, up_proj), and column c of the matrix is multiplied by it: the float model stays the
same function. s[c] = (root mean square activation)^alpha / (largest weight)^(1 - alpha).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from parscale_core.checkpoint.tensors import Checkpoint

from parscale_export.w8a8 import BLOCK, LARGEST, rotate_blocks, round_channels

# Called with what is done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WORTH_ROTATING = 0.6  # what is left of the error; a rotation takes time at every token
LARGEST_ERROR = 1e-3
SMALLEST = 1e-30  # instead of 0, so that what is divided by it does not become NaN
REACH = 1e3  # scales are within 1 / REACH and REACH


@dataclass
class Smoothing:
    """Factors for tensors by name; each broadcasts against its tensor."""

    factors: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def apply(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """A tensor of the checkpoint, scaled."""
        for factor in self.factors.get(name, ()):
            tensor = tensor.astype(np.float32) * factor
        return tensor

    def add(self, name: str, factor: np.ndarray) -> None:
        self.factors.setdefault(name, []).append(factor.astype(np.float32))


@dataclass(frozen=True)
class Site:
    """An activation that is multiplied with matrices, seen in a calibration run.

    Attributes:
        modules: of the matrices.
        samples: some of its rows, float32 [rows, columns].
    """

    modules: tuple[str, ...]
    samples: np.ndarray


@dataclass(frozen=True)
class Plan:
    """How each product of a model is best rounded; products go by their first module."""

    smoothing: Smoothing
    rotated: frozenset[str]
    kept: frozenset[str]  # those that are too far off in 8-bit integers


def plan(checkpoint: Checkpoint, sites: list[Site], progress: Progress | None = None) -> Plan:
    """Choose for each site the alpha that leaves the smallest error, with a rotation or without.

    The error is the mean over the sampled rows of |error|^2 / |output|^2.
    """
    smoothing, rotated, kept = Smoothing(), set[str](), set[str]()
    for done, site in enumerate(sites, start=1):
        weight = np.concatenate(
            [checkpoint.tensor(f"{module}.weight").astype(np.float32) for module in site.modules]
        )
        x, expected = site.samples, site.samples @ weight.T
        can_rotate = weight.shape[1] % BLOCK == 0
        ones = np.ones(weight.shape[1], np.float32)
        choices = []
        for scales in (ones, *_candidates(checkpoint, site, weight)):
            rows, matrix = x / scales, weight * scales
            choices.append((product_error(rows, matrix, expected), False, scales))
            if can_rotate:
                rows, matrix = rotate_blocks(rows), rotate_blocks(matrix)
                choices.append((product_error(rows, matrix, expected), True, scales))
        error, rotate, best = min(choices, key=lambda c: c[0] / WORTH_ROTATING if c[1] else c[0])
        if rotate:
            rotated.update(site.modules)
        if error > LARGEST_ERROR:
            kept.update(site.modules)
        if best is not ones:
            _fold(checkpoint, site, best, smoothing)
        if progress is not None:
            progress("smoothing", done, len(sites))
    return Plan(smoothing, frozenset(rotated - kept), frozenset(kept))


def product_error(x: np.ndarray, weight: np.ndarray, expected: np.ndarray) -> float:
    """How far the integer product is from ``expected``, as ``smooth`` measures it."""
    codes, scales = round_channels(weight)
    steps = np.maximum(np.abs(x).max(axis=1, keepdims=True), SMALLEST) / LARGEST
    y = (np.rint(x / steps) @ codes.T.astype(np.float32)) * steps * scales
    norms = np.maximum((expected**2).sum(axis=1), SMALLEST)
    return float((((y - expected) ** 2).sum(axis=1) / norms).mean())


def _candidates(checkpoint: Checkpoint, site: Site, weight: np.ndarray) -> Iterator[np.ndarray]:
    """Scales [columns] for each alpha; none where no weights before the site can take them."""
    layer, _, module = site.modules[0].rpartition(".")
    if not layer.startswith("model.layers."):
        return  # the head and the aggregator read one norm
    # Of 128 rows the root of the mean square is surer than the largest, and does better.
    activation, matrix = np.sqrt((site.samples**2).mean(axis=0)), np.abs(weight).max(axis=0)
    if module == "o_proj":
        activation, matrix = (_over_group(checkpoint, a) for a in (activation, matrix))
    for alpha in ALPHAS:
        a = np.maximum(activation, activation.max() * 1e-5 + SMALLEST)
        w = np.maximum(matrix, matrix.max() * 1e-5 + SMALLEST)
        logarithms = alpha * np.log(a) - (1 - alpha) * np.log(w)
        logarithms -= logarithms.mean()
        yield np.exp(np.clip(logarithms, -np.log(REACH), np.log(REACH))).astype(np.float32)


def _over_group(checkpoint: Checkpoint, channels: np.ndarray) -> np.ndarray:
    """The largest of the query heads that read one head's values, for each of them."""
    config = checkpoint.config
    kv = config.num_key_value_heads
    heads = channels.reshape(kv, -1, config.head_dim)
    return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)


def _fold(checkpoint: Checkpoint, site: Site, scales: np.ndarray, smoothing: Smoothing) -> None:
    """Multiply the site's matrices by the scales, and divide by them the weights before it."""
    for module in site.modules:
        smoothing.add(f"{module}.weight", scales)
    parent, _, module = site.modules[0].rpartition(".")
    layer = parent.rpartition(".")[0]
    if module == "q_proj":
        smoothing.add(f"{layer}.input_layernorm.weight", 1 / scales)
    elif module == "gate_proj":
        smoothing.add(f"{layer}.post_attention_layernorm.weight", 1 / scales)
    elif module == "down_proj":
        _divide_rows(f"{parent}.up_proj", scales, smoothing)
    else:
        config = checkpoint.config
        kv, head_dim = config.num_key_value_heads, config.head_dim
        scales = scales.reshape(kv, -1, head_dim)[:, 0]
        _divide_rows(f"{parent}.v_proj", scales.reshape(-1), smoothing)
        smoothing.add(f"{parent}.prefix_v", 1 / scales[:, None])


def _divide_rows(module: str, scales: np.ndarray, smoothing: Smoothing) -> None:
    smoothing.add(f"{module}.weight", 1 / scales[:, None])
    smoothing.add(f"{module}.bias", 1 / scales)
