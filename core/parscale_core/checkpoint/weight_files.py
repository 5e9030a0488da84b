"""Which files of a folder make up a model.

One rule, that of transformers: ``model.safetensors``; else the shards that its index names; else
``pytorch_model.bin``; else that one's shards. Whatever else lies there is not looked at.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from parscale_core.checkpoint.config import read_json
from parscale_core.checkpoint.links import check_link
from parscale_core.error_text import one_line

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


DTYPES = {  # of safetensors, by the names that numpy, MLX and PyTorch share
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor in a safetensors file: its type there, and where its bytes lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        index: by the index, the file of each tensor; empty where there is one file alone.
    """

    files: list[Path]
    are_pickles: bool
    index: dict[str, Path] = field(default_factory=dict)


def find_weights(folder: Path) -> WeightFiles:
    """The files that make up a model's weights.

    Raises:
        FileNotFoundError: there are none, or not all that the index names.
        ValueError: the index cannot be read, or points out of the folder.
    """
    for name in (SAFETENSORS, PICKLE):
        file, are_pickles = folder / name, name == PICKLE
        if file.is_file():
            check_link(file)
            return WeightFiles([file], are_pickles)
        index = file.with_name(f"{name}.index.json")
        if index.is_file():
            places = {tensor: folder / shard for tensor, shard in read_index(index).items()}
            files = sorted(set(places.values()))
            for shard in files:
                if not shard.is_file():
                    raise FileNotFoundError(f"{shard}: listed in {index.name} but missing")
                check_link(shard)
            return WeightFiles(files, are_pickles, places)
    raise FileNotFoundError(
        f"{folder}: no weights in this folder ({SAFETENSORS}, {PICKLE} or an index of its shards)"
    )


def find_safetensors(folder: Path) -> WeightFiles:
    """The files that make up a model's weights, where they are safetensors.

    Raises:
        FileNotFoundError, ValueError: as ``find_weights``; or they are pickles.
    """
    weights = find_weights(folder)
    if weights.are_pickles:
        raise ValueError(
            f"{folder}: these are pickles, and safetensors are needed; convert it first"
        )
    return weights


def read_headers(weights: WeightFiles) -> dict[str, Entry]:
    """The tensors of a model in safetensors: all of its one file, or those that its index names.

    Raises:
        ValueError: a file is not whole, or lacks what the index places there.
    """
    found = {}
    for file in weights.files:
        for name, entry in read_header(file).items():
            if weights.index.get(name, file if not weights.index else None) == file:
                found[name] = entry
    for name, file in weights.index.items():
        if name not in found:
            raise ValueError(f"{file}: lacks {name}, which the index places there")
    return found


def read_index(index: Path) -> dict[str, str]:
    """By an index of shards, the name of each tensor's file.

    Raises:
        ValueError: it is none, or points out of its folder.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: not an index of weight files")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: {shard!r} is not the name of a file in this folder")
    return shards


def read_header(file: Path) -> dict[str, Entry]:
    """Of each tensor in a safetensors file, its type, shape and place.

    Raises:
        ValueError: the file is not whole.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks sizes and offsets
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {one_line(error)}") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        entries[name] = Entry(file, entry["dtype"], shape, 8 + length + start, end - start)
    return entries
