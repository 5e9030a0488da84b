"""Stream adapters: the prefixes and the aggregator of P streams, apart from their backbone.

A folder of two files. A backbone with one stream and an adapter make a model with P streams.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parscale_core.checkpoint.config import check_streams, read_config, read_json
from parscale_core.checkpoint.links import check_link
from parscale_core.checkpoint.names import is_stream_tensor
from parscale_core.checkpoint.weight_files import Entry, find_safetensors, read_headers

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
TYPE = "parscale_streams"
SAMPLE = 4096  # bytes of a tensor's beginning, and of its end, that a fingerprint takes in


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter's folder says of itself.

    Attributes:
        weights: the file of its tensors: ``model.layers.N.self_attn.prefix_k`` and ``prefix_v``,
            [P, kv_heads, prefix_length, head_dim], and ``model.aggregator.fc1`` and ``fc2``, whose
            ``weight`` columns run (stream, hidden).
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

    def check_backbone(self, folder: Path, sha256: str | None = None) -> None:
        """Check that the model in a folder is the one that this adapter was made for.

        Args:
            sha256: the model's ``fingerprint``, where it is known already.

        Raises:
            ValueError: it is another, or other weights of it.
        """
        if (sha256 or fingerprint(folder)) != self.backbone_sha256:
            raise ValueError(
                f"{self.folder}: this adapter belongs to another backbone ({self.backbone}), or to "
                f"other weights of it than those in {folder}"
            )


def read_adapter(folder: str | Path) -> AdapterFolder:
    """What an adapter's folder says of itself, without its tensors.

    Raises:
        FileNotFoundError: no such folder, or one of its two files is missing.
        ValueError: it is not a stream adapter.
    """
    folder = Path(folder).expanduser()
    file, weights = folder / CONFIG, folder / WEIGHTS
    for needed in (file, weights):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{folder}: no {needed.name} in this folder; not a stream adapter"
            )
    check_link(weights)
    raw = read_json(file)
    if raw.get("adapter_type") != TYPE:
        raise ValueError(f"{file}: not a stream adapter (adapter_type is not {TYPE!r})")
    try:
        adapter = AdapterFolder(
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
    try:
        check_streams(adapter.streams, adapter.prefix_length, adapter.smoothing)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return adapter


def write_adapter_config(
    folder: Path,
    *,
    streams: int,
    prefix_length: int,
    smoothing: float,
    backbone: str,
    backbone_sha256: str,
) -> None:
    """Write the file from which ``read_adapter`` reads the same."""
    config = {
        "adapter_type": TYPE,
        "parscale_n": streams,
        "parscale_n_tokens": prefix_length,
        "parscale_attn_smooth": smoothing,
        "backbone": {"name": backbone, "sha256": backbone_sha256},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def adapter_folders(model: Path, given: Sequence[str | Path]) -> list[Path]:
    """The adapters over a model: those given, or else those in its own folder ``adapters``."""
    return [Path(path).expanduser() for path in given] or sorted((model / "adapters").glob("*/"))


def find_adapters(folder: Path, adapters: Sequence[str | Path]) -> dict[int, Path | None]:
    """The stream adapters over a model by their number of streams, and None for the model's own.

    Args:
        folder: the model's.
        adapters: folders; with none, those that came with the model, in its folder ``adapters``.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: one is not a stream adapter, or two have equally many streams.
    """
    found: dict[int, Path | None] = {read_config(folder).streams: None}
    for adapter in adapter_folders(folder, adapters):
        n = read_adapter(adapter).streams
        # A prefix for one stream takes the place of the model without any.
        if n in found and (found[n] is not None or n > 1):
            raise ValueError(f"{found[n] or folder} and {adapter} both have {n} streams")
        found[n] = adapter
    return found


def pick_adapter(found: Mapping[int, Path | None], streams: int | None) -> Path | None:
    """Of what ``find_adapters`` found, the adapter with as many streams as are wanted.

    Args:
        streams: None for the most that there are.

    Returns:
        The adapter's folder, or None for the model as it is.

    Raises:
        ValueError: neither the model nor an adapter has so many.
    """
    if streams is None:
        streams = max(found)
    if streams not in found:
        there = ", ".join(map(str, sorted(found)))
        raise ValueError(f"no model or adapter here has {streams} streams, only {there}")
    return found[streams]


def fingerprint(folder: Path) -> str:
    """A hash that tells a backbone's weights from any other's without reading all of them.

    It is the SHA-256 of each tensor's name, type and shape, and of its first and last bytes, with
    the tensors sorted by name. Streams do not count: a model is told by its backbone.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: they are pickles, or a file is damaged.
    """
    tensors = read_headers(find_safetensors(folder))
    return digest({name: e for name, e in tensors.items() if not is_stream_tensor(name)})


def digest(tensors: Mapping[str, Entry]) -> str:
    """A hash of tensors in safetensors files, by the samples that ``fingerprint`` takes."""
    sha = hashlib.sha256()
    for name, entry in sorted(tensors.items()):
        sha.update(f"{name} {entry.dtype} {json.dumps(list(entry.shape))}\n".encode())
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            sha.update(stream.read(min(SAMPLE, entry.size)))
            rest = max(SAMPLE, entry.size - SAMPLE)
            stream.seek(entry.start + rest)
            sha.update(stream.read(max(0, entry.size - rest)))
    return sha.hexdigest()
