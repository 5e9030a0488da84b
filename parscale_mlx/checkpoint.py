"""The weight files of a model folder: which there are, whether they are whole, and pickles."""

import json
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted by name; empty where there are none."""
    return sorted(folder.glob("model*.safetensors"))


def pickle_files(folder: Path) -> list[Path]:
    """The PyTorch pickles of a folder that has no safetensors, sorted by name."""
    return [] if safetensors_files(folder) else sorted(folder.glob("pytorch_model*.bin"))


def check_files(folder: Path) -> None:
    """Check, from their headers and the index alone, that a folder's weight files are whole.

    Raises:
        FileNotFoundError: there are no weights, or not all that the index lists.
        ValueError: a file is truncated or unreadable, or the index points out of the folder.
    """
    files = safetensors_files(folder)
    if not files and not pickle_files(folder):
        raise FileNotFoundError(
            f"{folder}: no weights (model*.safetensors or pytorch_model*.bin) in this folder"
        )
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index)
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def read_header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Of each tensor in a safetensors file: type, shape, first byte and number of bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def read_pickle(file: Path) -> dict[str, mx.array]:
    """The tensors of a PyTorch pickle, loaded weights-only: nothing in the file is executed.

    Raises:
        ImportError: PyTorch is not installed.
        ValueError: the file is not a pickle of tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file}: PyTorch pickles need PyTorch: pip install 'parscale[torch]'"
        ) from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever its unpickler met
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file}: not a PyTorch pickle of tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise ValueError(f"{file}: not a dictionary of tensors")
    return {name: _from_torch(tensor) for name, tensor in tensors.items()}


def _from_torch(tensor) -> mx.array:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16: move its bits
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def _check_index(index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weight files") from error
    for shard in sorted(shards):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: {shard!r} is not the name of a file in this folder")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: listed in {index.name} but missing")
