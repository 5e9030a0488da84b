"""The container: a GGUF file's metadata, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package's own reader
trusts the numbers in a file, so a damaged one could take any amount of time and memory.
"""

import mmap
import struct
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}  # struct's letters
DIMENSIONS = 4
ALIGNMENT = "general.alignment"
CHUNK = 1 << 24  # numbers to dequantise at a time


class Tensor(NamedTuple):
    """A tensor: its name and shape (numpy's order), how it is stored, and where."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass
class GGUF:
    """An open GGUF file: its metadata, and its tensors mapped from disk."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[Tensor]
    bytes: np.ndarray

    def value(self, key: str, default: Any = None) -> Any:
        """A value; arrays with an entry for each layer count where all are the same.

        Raises:
            ValueError: the layers differ.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, np.ndarray):
            return value
        if not len(value) or (value != value[0]).any():
            raise self.wrong(key, value.tolist(), "the same in every layer")
        return value[0].item()

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int | None:
        """A whole number; arrays as for ``value``.

        Raises:
            ValueError: it is something else, or the layers differ.
        """
        value = self.value(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, value, f"a whole number of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        """A finite number; arrays as for ``value``.

        Raises:
            ValueError: as ``whole``.
        """
        value = self.value(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise self.wrong(key, value, "a number")
        return float(value)

    def text(self, key: str) -> str | None:
        """A text, or None.

        Raises:
            ValueError: it is something else.
        """
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            ValueError: it is something else.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, wanted: str) -> ValueError:
        """The error for a value that is not what is wanted."""
        text = repr(value)
        shown = text if len(text) < 60 else f"{text[:60]}..."
        return ValueError(f"{self.path}: {key} is {' '.join(shown.split())}, not {wanted}")

    def read(self, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
        """A tensor's numbers, dequantised."""
        rows, columns = prod(tensor.shape[:-1]), tensor.shape[-1]
        stored = self.bytes[tensor.start : tensor.start + tensor.size].reshape(rows, -1)
        values, step = np.empty((rows, columns), dtype), max(1, CHUNK // columns)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            for begin in range(0, rows, step):
                part = dequantize(stored[begin : begin + step], tensor.kind)
                values[begin : begin + step] = part.reshape(-1, columns)
        return values.reshape(tensor.shape)


def open_container(path: Path) -> GGUF:
    """Read a GGUF file's header.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not GGUF, is truncated, or contradicts itself.
    """
    with path.open("rb") as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ValueError(f"{path}: not a whole GGUF file: it is empty") from error
    try:
        metadata, tensors = _read(data)
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: not a whole GGUF file: {error}") from error
    return GGUF(path, metadata, tensors, np.frombuffer(data, np.uint8))


class _Cursor:
    """Reads one value after the other, and never past the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> int:
        """Where ``size`` bytes begin; what follows comes after them."""
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends in the header, after {len(self.data)} bytes")
        self.at += size
        return self.at - size

    def number(self, letter: str) -> Any:
        size = struct.calcsize(f"<{letter}")
        return struct.unpack_from(f"<{letter}", self.data, self.take(size))[0]

    def text(self) -> str:
        size = self.number("Q")
        start = self.take(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the text at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return [self.text() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"an array of values of type {kind}")
        dtype = np.dtype(f"<{NUMBERS[kind]}")
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start).copy()


def _read(data: mmap.mmap) -> tuple[dict[str, Any], list[Tensor]]:
    cursor = _Cursor(data)
    if data[cursor.take(4) : cursor.at] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not one of {VERSIONS} (or it is big-endian)")
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{key!r} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    found: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(n_tensors):
        name = cursor.text()
        if name in found:
            raise ValueError(f"the tensor {name!r} is there twice")
        found[name] = _place(cursor, name)
    alignment = metadata.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
        raise ValueError(f"{ALIGNMENT} is {alignment!r}, not a multiple of 8")
    begin = -(-cursor.at // alignment) * alignment
    tensors = [_tensor(name, *place, begin) for name, place in found.items()]
    for tensor in tensors:
        if tensor.start + tensor.size > len(data):
            raise ValueError(f"it ends before {tensor.name!r} does, after {len(data)} bytes")
        if (tensor.start - begin) % alignment:
            raise ValueError(f"the tensor {tensor.name!r} is not aligned to {alignment} bytes")
    return metadata, tensors


def _place(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
    count = cursor.number("I")
    if not 1 <= count <= DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {count} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(count))
    kind = cursor.number("I")
    try:
        return shape[::-1], GGMLQuantizationType(kind), cursor.number("Q")
    except ValueError as error:
        raise ValueError(f"the tensor {name!r} has the unknown type {kind}") from error


def _tensor(
    name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, begin: int
) -> Tensor:
    block, size = GGML_QUANT_SIZES[kind]
    if not prod(shape) or shape[-1] % block:
        raise ValueError(f"the tensor {name!r} of shape {list(shape)} has no whole blocks")
    return Tensor(name, shape, kind, begin + offset, prod(shape) // block * size)
