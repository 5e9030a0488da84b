"""A decoder's dimensions, and what they count up to: parameters and bytes."""

import json
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from parscale_core.checkpoint.config import ModelConfig

PREFIX = 48  # positions, where streams are only planned


@dataclass(frozen=True)
class Precision:
    """Bits of each number.

    Attributes:
        weights: of matrices; below 16 they are quantised in groups, as MLX does it.
        others: of activations, norms, biases, prefixes, the aggregator, and scales of groups.
        cache: of the KV cache.
        group: weights that share a scale and an offset.
    """

    weights: int = 16
    others: int = 16
    cache: int = 16
    group: int = 64

    @property
    def weight_bytes(self) -> float:
        """Bytes of one matrix element, its part of scale and offset included."""
        return _grouped(self.weights, self.others, self.group)

    @property
    def cache_bytes(self) -> float:
        """Bytes of one number in the KV cache, likewise."""
        return _grouped(self.cache, self.others, self.group)

    @property
    def other_bytes(self) -> float:
        return self.others / 8


def _grouped(bits: int, others: int, group: int) -> float:
    return bits / 8 + (2 * others / 8 / group if bits < 16 else 0)


@dataclass(frozen=True)
class Shape:
    """A decoder; widths may be fractions where they stand between two models.

    Attributes:
        streams: P; 1 for a plain decoder.
        prefix: positions of a stream's prefix.
        prefix_alone: whether one stream has a prefix, too.
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        qk_norm: whether each layer normalises the heads' queries and keys.
    """

    layers: int
    hidden: float
    intermediate: float
    heads: int
    kv_heads: int
    head_dim: float
    vocabulary: int
    tied: bool = True
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    streams: int = 1
    prefix: int = 48
    prefix_alone: bool = False

    @property
    def query_width(self) -> float:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> float:
        """Numbers that a layer's cache takes for one position of one stream, keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def prefix_positions(self) -> int:
        """Positions of the cache that the prefix takes: none in a plain decoder."""
        return self.prefix if self.streams > 1 or self.prefix_alone else 0

    def matrices(self) -> dict[str, float]:
        """Parameters of the matrices that can be quantised."""
        d, f = self.hidden, self.intermediate
        return {
            "embedding": self.vocabulary * d,
            "attention": self.layers * d * (2 * self.query_width + self.kv_width),
            "mlp": self.layers * 3 * d * f,
            "head": 0 if self.tied else self.vocabulary * d,
        }

    def vectors(self) -> dict[str, float]:
        """Parameters that keep their precision: biases, norms, prefixes, the aggregator."""
        d, f, p = self.hidden, self.intermediate, self.streams
        biases = self.qkv_bias * (self.query_width + self.kv_width) + self.output_bias * d
        return {
            "biases": self.layers * (biases + self.mlp_bias * (2 * f + d)),
            "norms": (2 * self.layers + 1) * d + self.qk_norm * 2 * self.layers * self.head_dim,
            "prefixes": self.layers * p * self.kv_width * self.prefix_positions,
            "aggregator": p * d * d + d + d * p + p if p > 1 else 0,
        }

    def parameters(self) -> float:
        """All parameters."""
        return sum(self.matrices().values()) + sum(self.vectors().values())

    def parameters_outside_embedding(self) -> float:
        """The scaling law's N: all but the embedding and the head."""
        matrices = self.matrices()
        return self.parameters() - matrices["embedding"] - matrices["head"]

    def weight_bytes(self, precision: Precision) -> float:
        """Bytes of all weights."""
        return (
            sum(self.matrices().values()) * precision.weight_bytes
            + sum(self.vectors().values()) * precision.other_bytes
        )

    def cache_bytes(self, precision: Precision, *, batch: int, tokens: float) -> float:
        """Bytes of the KV cache that holds the prefix and this many tokens of each sequence."""
        positions = self.prefix_positions + tokens
        numbers = self.layers * batch * self.streams * self.kv_width * positions
        return numbers * precision.cache_bytes

    def widened(self, parameters: float) -> "Shape":
        """The plain decoder of the same depth and head counts with this many parameters.

        As in arXiv 2505.10475, whose models differ in width only.

        Args:
            parameters: outside the embedding.
        """
        plain = replace(self, streams=1)
        # Matrices grow with the square of the width, biases and norms with the width itself.
        once, twice = (s.parameters_outside_embedding() for s in (plain, plain._times(2)))
        square = (twice - 2 * once) / 2
        linear = once - square
        return plain._times((sqrt(linear**2 + 4 * square * parameters) - linear) / (2 * square))

    def _times(self, factor: float) -> "Shape":
        return replace(
            self,
            hidden=self.hidden * factor,
            intermediate=self.intermediate * factor,
            head_dim=self.head_dim * factor,
        )


# arXiv 2505.10475, section 3.2: Qwen2.5's vocabulary, 36 layers, 16 heads over 2 key-value heads.
# Their widths follow from the published parameter counts, which they give exactly.
PAPER_SHAPES = {
    name: Shape(36, hidden, intermediate, 16, 2, hidden / 16, vocabulary=151936)
    for name, hidden, intermediate in (
        ("0.5B", 896, 4864),
        ("0.7B", 1024, 5504),
        ("1.1B", 1280, 6912),
        ("1.6B", 1536, 8320),
        ("2.8B", 2048, 11008),
        ("4.4B", 2560, 13824),
    )
}


def read_shape(path: Path) -> tuple[Shape, Precision]:
    """The shape and the precision that a model folder's ``config.json``, or such a file, tells of.

    Raises:
        FileNotFoundError, ValueError: as ``read_config``.
    """
    config = read_config(path)
    return shape_of(config), precision_of(config)


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's ``config.json``, or such a file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it describes no Qwen2 or Llama decoder; the
            message names the file.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    try:
        shape_of(config)
        precision_of(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that a ``config.json``, read already, tells of.

    Raises:
        ValueError: it describes no decoder that can be built; the message names the field.
    """
    if not isinstance(config, dict):
        raise ValueError("not a JSON object")
    model = ModelConfig.from_dict(config)
    return Shape(
        layers=model.num_hidden_layers,
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        vocabulary=model.vocab_size,
        tied=model.tie_word_embeddings,
        qkv_bias=model.qkv_bias,
        output_bias=model.output_bias,
        mlp_bias=model.mlp_bias,
        qk_norm=model.qk_norm,
        streams=model.streams,
        prefix=model.prefix_length or PREFIX,
        prefix_alone=model.streams == 1 and model.prefix_length > 0,
    )


def precision_of(config: dict[str, Any]) -> Precision:
    """The precision that a ``config.json`` tells of, likewise."""
    others = 32 if config.get("dtype", config.get("torch_dtype")) == "float32" else 16
    packed = config.get("quantization")
    if not isinstance(packed, dict):
        return Precision(others, others, others)
    bits, group = _whole(packed, "bits"), _whole(packed, "group_size", 64)
    return Precision(bits, others, others, group)


def _whole(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, where a positive whole number is needed")
    return value
