"""Tensor names, published and internal (as models have them); and which belong to streams.

The two differ in the aggregator alone. Published, ``model.aggregate_layer.0`` and ``.2``, the first
with columns that run (hidden, stream), the stream fastest; internal, ``model.aggregator.fc1`` and
``fc2``, with columns that run (stream, hidden), as a concatenation of hidden states does.
"""

import re
from typing import Any

_INTERNAL = {
    "model.aggregate_layer.0.": "model.aggregator.fc1.",
    "model.aggregate_layer.2.": "model.aggregator.fc2.",
}
_PUBLISHED = {internal: published for published, internal in _INTERNAL.items()}
PUBLISHED_COLUMNS = "model.aggregate_layer.0.weight"
INTERNAL_COLUMNS = "model.aggregator.fc1.weight"
STREAM_TENSOR = re.compile(
    r"model\.(layers\.\d+\.self_attn\.prefix_[kv]|aggregator\.fc[12]\.(weight|bias))"
)


def internal_name(name: str) -> str:
    """The name in memory of a tensor in a file."""
    return _renamed(name, _INTERNAL)


def published_name(name: str) -> str:
    """The name in a published checkpoint of a tensor in memory."""
    return _renamed(name, _PUBLISHED)


def internal_columns(value: Any, streams: int) -> Any:
    """The aggregator's first weight [d, d * P] with its columns in memory's order.

    Args:
        value: a numpy or MLX array with its columns in the published order.
    """
    rows = value.shape[0]
    return value.reshape(rows, -1, streams).swapaxes(1, 2).reshape(rows, -1)


def published_columns(value: Any, streams: int) -> Any:
    """The reverse of ``internal_columns``."""
    rows = value.shape[0]
    return value.reshape(rows, streams, -1).swapaxes(1, 2).reshape(rows, -1)


def is_prefix(name: str) -> bool:
    """Whether a tensor is a layer's prefix of keys or values."""
    return name.endswith((".prefix_k", ".prefix_v"))


def is_stream_tensor(name: str) -> bool:
    """Whether a tensor, of a model or a file, belongs to its streams, not to its backbone."""
    return is_prefix(name) or ".aggregator." in name or ".aggregate_layer." in name


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
