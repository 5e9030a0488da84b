"""Stream adapters: the prefixes and the aggregator of P streams, apart from their backbone."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from parscale_export.config import MAX_STREAMS

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
TYPE = "parscale_streams"
SAMPLE = 4096  # bytes of a tensor's beginning, and of its end, that a fingerprint takes in
STREAM_TENSOR = re.compile(
    r"model\.(layers\.\d+\.self_attn\.prefix_[kv]|aggregator\.fc[12]\.(weight|bias))"
)
NOT_BACKBONE = ("prefix_k", "prefix_v", "aggregator", "aggregate_layer")


@dataclass(frozen=True)
class Adapter:
    """P streams for a backbone.

    Attributes:
        weights: the file of its tensors: ``model.layers.N.self_attn.prefix_k`` and ``prefix_v``,
            [P, kv_heads, prefix_length, head_dim], and ``model.aggregator.fc1`` and ``fc2``.
        backbone: the name of the backbone's folder.
        backbone_sha256: the backbone's ``fingerprint``.
    """

    folder: Path
    weights: Path
    streams: int
    prefix_length: int
    smoothing: float
    backbone: str
    backbone_sha256: str


def read_adapter(folder: str | Path) -> Adapter:
    """What an adapter's folder says of itself; its tensors are read when a checkpoint needs them.

    Raises:
        FileNotFoundError: no such folder, or one of its two files is missing.
        ValueError: it is not a stream adapter.
    """
    folder = Path(folder).expanduser()
    file, weights = folder / CONFIG, folder / WEIGHTS
    for needed in (file, weights):
        if not needed.is_file():
            raise FileNotFoundError(f"{folder}: not a stream adapter: no {needed.name} in it")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON") from error
    if not isinstance(raw, dict) or raw.get("adapter_type") != TYPE:
        raise ValueError(f"{file}: not a stream adapter (adapter_type is not {TYPE!r})")
    try:
        adapter = Adapter(
            folder=folder,
            weights=weights,
            streams=raw["parscale_n"],
            prefix_length=raw["parscale_n_tokens"],
            smoothing=raw["parscale_attn_smooth"],
            backbone=raw["backbone"]["name"],
            backbone_sha256=raw["backbone"]["sha256"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: no {error} in it, or something else in its place") from error
    _check_numbers(file, adapter)
    return adapter


def _check_numbers(file: Path, adapter: Adapter) -> None:
    streams, tokens, smoothing = adapter.streams, adapter.prefix_length, adapter.smoothing
    if not isinstance(streams, int) or not 2 <= streams <= MAX_STREAMS:
        raise ValueError(f"{file}: parscale_n {streams!r} is not a number from 2 to {MAX_STREAMS}")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"{file}: parscale_n_tokens {tokens!r} is not at least 1")
    if not isinstance(smoothing, int | float) or not 0 <= smoothing <= 1:
        raise ValueError(f"{file}: parscale_attn_smooth {smoothing!r} is not from 0 to 1")


def fingerprint(folder: Path) -> str:
    """A hash that tells a backbone's weights from any other's without reading all of them.

    It is the SHA-256 of each tensor's name, type and shape and of its first and last bytes, the
    tensors sorted by name; those of streams are left out.

    Raises:
        ValueError: the folder holds no safetensors.
    """
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, entry in _header(file).items():
            if not any(part in name for part in NOT_BACKBONE):
                tensors[name] = (file, *entry)
    if not tensors:
        raise ValueError(f"{folder}: adapters need a backbone in safetensors; convert it first")
    digest = hashlib.sha256()
    for name, (file, dtype, shape, start, size) in sorted(tensors.items()):
        digest.update(f"{name} {dtype} {json.dumps(shape)}\n".encode())
        with file.open("rb") as stream:
            stream.seek(start)
            digest.update(stream.read(min(SAMPLE, size)))
            last = max(SAMPLE, size - SAMPLE)
            stream.seek(start + last)
            digest.update(stream.read(max(0, size - last)))
    return digest.hexdigest()


def _header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Of each tensor in a safetensors file: type, shape, first byte and number of bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        entries[name] = (entry["dtype"], entry["shape"], 8 + length + start, end - start)
    return entries
