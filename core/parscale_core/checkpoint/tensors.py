"""A model folder's tensors by name, one at a time, in numpy; PyTorch only for its pickles.

Names and columns are those that models hold in memory; see ``names``.
"""

import re
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # numpy knows bfloat16 once this is imported
import numpy as np
from safetensors import safe_open

from parscale_core.checkpoint import adapter as adapters
from parscale_core.checkpoint import float8, mlx_quantized, packed_codes
from parscale_core.checkpoint.adapter import AdapterFolder
from parscale_core.checkpoint.config import read_config, tensor_shapes
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.names import (
    PUBLISHED_COLUMNS,
    STREAM_TENSOR,
    internal_columns,
    internal_name,
    is_prefix,
)
from parscale_core.checkpoint.packed_codes import Packing, read_packing
from parscale_core.checkpoint.pickles import read_pickle, to_numpy, type_name
from parscale_core.checkpoint.weight_files import (
    DTYPES,
    Entry,
    find_weights,
    read_header,
    read_headers,
)

FLOATS = ("float32", "bfloat16", "float16", "float64")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        name: its name in that file.
        dtype: the name of its type: float32, bfloat16, uint32...
        start: where its bytes begin.
        shape: as stored: packed, where it is quantised.
        pickled: the tensor itself, mapped from disk, where the file is a pickle.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int = 0
    pickled: Any = None


class Checkpoint:
    """An opened model folder, published or converted.

    Args:
        folder: where it is, or a name on the hub.
        adapter: streams to put over it.

    Attributes:
        folder: where it is.
        config: its ``config.json``, with the adapter's streams.
        quantization: MLX's quantisation, as ``config.json`` has it; may be empty.
        blocks: rows and columns that share a scale in float8 weights, if they are such.
        packing: how AWQ or GPTQ packed the weights, if one did.
        stored: where each tensor lies, by its name in memory.

    Raises:
        FileNotFoundError: no such folder, no config, no weights, or not all that the index lists.
        ValueError: a file is truncated, lacks a tensor or holds one of the wrong shape or one too
            many, or the adapter is not for this model's sizes.
        ImportError: the weights are PyTorch pickles and PyTorch is not installed.
    """

    def __init__(self, folder: str | Path, adapter: AdapterFolder | None = None):
        self.folder, self.adapter = find_folder(folder), adapter
        self.config = read_config(self.folder)
        file = self.folder / "config.json"
        self.quantization, self.blocks, self.packing = _quantization(self.config.raw, file)
        self.stored: dict[str, Stored] = {}
        self._packed: dict[str, dict[str, Stored]] = {}  # the parts of a weight, by its name
        self._open_files()
        if self.packing is not None:
            self._join_parts(self.packing)
        if adapter is not None:
            self._add_streams(adapter)
        self._check()

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    @property
    def is_pickled(self) -> bool:
        """Whether the weights are PyTorch pickles, which are read by a process that has torch."""
        return any(stored.pickled is not None for stored in self.stored.values())

    def names(self) -> list[str]:
        """The tensors of the model, quantised ones by their weight alone."""
        return [name for name in tensor_shapes(self.config) if name in self]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, dequantised."""
        shape, module = self.stored[name].shape, name.removesuffix(".weight")
        if name in self._packed:
            assert self.packing is not None
            return self.packing.shape(shape)
        if not self.is_quantized(name):
            return shape
        if not self.quantization:
            raise ValueError(
                f"{self.folder / 'config.json'}: no quantization, but {module} is quantised"
            )
        mode, group_size, bits = mlx_quantized.settings(self.quantization, module)
        if len(shape) != 2 or self.stored[name].dtype != "uint32":
            raise ValueError(f"{self.stored[name].file}: {name} is not a matrix that MLX quantised")
        columns = shape[-1] * 32 // bits
        scales = self.stored[f"{module}.scales"].shape
        biases = self.stored.get(f"{module}.biases")
        if scales != (*shape[:-1], columns // group_size) or (
            mode == "affine" and (biases is None or biases.shape != scales)
        ):
            raise ValueError(
                f"{self.stored[name].file}: {module} is not quantised with {bits} bits in groups "
                f"of {group_size} as config.json says"
            )
        return (*shape[:-1], columns)

    def is_quantized(self, name: str) -> bool:
        """Whether MLX quantised the tensor of this name, a module's ``weight``."""
        return name.endswith(".weight") and f"{name.removesuffix('.weight')}.scales" in self

    def decoded_type(self, name: str) -> str | None:
        """The type to hold a tensor in that is not stored as numbers, nor as MLX would have it."""
        if name in self._packed:
            return self._packed[name]["scales"].dtype
        return "bfloat16" if f"{name}_scale_inv" in self else None

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32 where it is quantised, else as stored."""
        if f"{name}_scale_inv" in self:
            return float8.dequantize(self.read(name), self.read(f"{name}_scale_inv"), self.blocks)
        if self.packing is not None and name in self._packed:
            parts = {part: self._read(stored) for part, stored in self._packed[name].items()}
            try:
                return packed_codes.dequantize(self.packing, parts)
            except ValueError as error:
                raise ValueError(f"{self.stored[name].file}: {name}: {error}") from error
        if not self.is_quantized(name):
            return self.read(name)
        module = name.removesuffix(".weight")
        mode, group_size, bits = mlx_quantized.settings(self.quantization, module)
        return mlx_quantized.dequantize(
            self.read(name),
            self.read(f"{module}.scales"),
            self.read(f"{module}.biases") if mode == "affine" else None,
            mode=mode,
            group_size=group_size,
            bits=bits,
        )

    def read(self, name: str) -> np.ndarray:
        """One tensor as stored, but for the order of the aggregator's columns."""
        return self._read(self.stored[name])

    def _read(self, stored: Stored) -> np.ndarray:
        if stored.pickled is not None:
            value = to_numpy(stored.pickled)
        elif stored.dtype.startswith("float8"):  # numpy has none of its own
            dtype = np.dtype(getattr(ml_dtypes, stored.dtype))
            value = np.fromfile(stored.file, dtype, prod(stored.shape), offset=stored.start)
            value = value.reshape(stored.shape)
        else:
            with safe_open(stored.file, framework="numpy") as opened:
                value = opened.get_tensor(stored.name)
        if value.dtype == np.float64:  # more than any engine computes in
            value = value.astype(np.float32)
        if stored.name == PUBLISHED_COLUMNS:
            return internal_columns(value, self.config.streams)
        return value

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some rows of a tensor of the backbone, as stored."""
        stored = self.stored[name]
        if stored.pickled is not None:
            return to_numpy(stored.pickled[start:stop])
        with safe_open(stored.file, framework="numpy") as opened:
            return opened.get_slice(stored.name)[start:stop]

    def _open_files(self) -> None:
        weights = find_weights(self.folder)
        if not weights.are_pickles:
            self._add_safetensors(read_headers(weights))
            return
        for file in weights.files:
            for name, tensor in read_pickle(file).items():
                self._add(
                    Stored(file, name, tuple(tensor.shape), type_name(tensor), pickled=tensor)
                )

    def _join_parts(self, packing: Packing) -> None:
        """Put each packed weight under its name, its parts out of the way of other tensors."""
        for codes in [name for name in self.stored if name.endswith(".qweight")]:
            module = codes.removesuffix(".qweight")
            parts = {
                part: self.stored.pop(f"{module}.{part}")
                for part in packed_codes.PARTS
                if f"{module}.{part}" in self.stored
            }
            self._check_parts(module, packing, parts)
            self.stored[f"{module}.weight"] = parts["qweight"]
            self._packed[f"{module}.weight"] = parts

    def _check_parts(self, module: str, packing: Packing, parts: dict[str, Stored]) -> None:
        codes = parts["qweight"]
        if codes.pickled is not None:
            raise ValueError(f"{codes.file}: {packing.method} in a PyTorch pickle is not supported")
        if len(codes.shape) != 2:
            raise ValueError(f"{codes.file}: {module}.qweight has {len(codes.shape)} axes, not 2")
        wanted = packing.part_shapes(codes.shape) | {"qweight": codes.shape}
        for part, shape in wanted.items():
            found = parts.get(part)
            if found is None and part == "g_idx":
                continue
            if found is None:
                raise ValueError(f"{codes.file}: {module} is packed, and lacks its {part}")
            types = ("float16", "bfloat16", "float32") if part == "scales" else ("int32",)
            if found.shape != shape or found.dtype not in types:
                raise ValueError(
                    f"{found.file}: {module}.{part} is {found.dtype} {list(found.shape)}, where "
                    f"{packing.method} in groups of {packing.group_size} has {types[0]} "
                    f"{list(shape)}"
                )

    def _add_safetensors(self, entries: dict[str, Entry]) -> None:
        for name, entry in entries.items():
            dtype = DTYPES.get(entry.dtype, entry.dtype)
            self._add(Stored(entry.file, name, entry.shape, dtype, entry.start))

    def _add_streams(self, adapter: AdapterFolder) -> None:
        if self.config.prefix_length:
            own = f"{self.config.streams} stream{'s' * (self.config.streams > 1)}"
            raise ValueError(
                f"{self.folder}: has {own} of its own, so it takes none from {adapter.folder}"
            )
        self.config = replace(
            self.config,
            streams=adapter.streams,
            prefix_length=adapter.prefix_length,
            smoothing=adapter.smoothing,
        )
        self._add_safetensors(read_header(adapter.weights))
        for name, stored in self.stored.items():
            if stored.file == adapter.weights and not STREAM_TENSOR.fullmatch(name):
                raise ValueError(f"{stored.file}: {name} is no part of a stream adapter")

    def _add(self, stored: Stored) -> None:
        self.stored[internal_name(stored.name)] = stored

    def _check(self) -> None:
        self._settle_tie()
        config = self.config
        asking = "config.json" if self.adapter is None else adapters.CONFIG
        if not config.prefix_length:
            for name, stored in self.stored.items():
                if is_prefix(name):
                    raise ValueError(
                        f"{stored.file}: holds {name}, but config.json says parscale_n 1"
                    )
        self._check_layers()
        expected = tensor_shapes(config)
        for name, shape in expected.items():
            if name not in self:
                streams = self.adapter and STREAM_TENSOR.fullmatch(name)
                place = self.adapter.weights if self.adapter and streams else self.folder
                raise ValueError(f"{place}: the weights lack {name}")
            found = self.shape(name)
            if found != shape:
                raise ValueError(_misshapen(self.stored[name].file, name, found, shape, asking))
            self._check_type(name)
        self._refuse_unknown(expected)

    def _settle_tie(self) -> None:
        """Tie as transformers: a head that differs is kept, and one alone is the embedding."""
        if not self.config.tie_word_embeddings:
            return
        heads = {name for name in self.stored if name.startswith("lm_head.")}
        pairs = {name: name.replace("lm_head", "model.embed_tokens") for name in heads}
        if not any(name in self for name in pairs.values()):
            for head, embedding in pairs.items():
                self.stored[embedding] = self.stored.pop(head)
        elif all(other in self and self._same(head, other) for head, other in pairs.items()):
            for head in pairs:
                del self.stored[head]
        else:
            raw = self.config.raw | {"tie_word_embeddings": False}
            self.config = replace(self.config, tie_word_embeddings=False, raw=raw)

    def _same(self, one: str, other: str) -> bool:
        a, b = self.stored[one], self.stored[other]
        return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(
            self.read(one).view(np.uint8), self.read(other).view(np.uint8)
        )

    def _check_layers(self) -> None:
        # Before each tensor of each layer is looked for: there could be a billion in config.json.
        numbers = {int(m[1]) for name in self.stored if (m := _LAYER.match(name))}
        for n in range(len(numbers) + 1):
            if n not in numbers and n < self.config.num_hidden_layers:
                raise ValueError(
                    f"{self.folder}: the weights lack model.layers.{n}, and config.json says "
                    f"num_hidden_layers {self.config.num_hidden_layers}"
                )

    def _check_type(self, name: str) -> None:
        stored = self.stored[name]
        quantised = self.is_quantized(name) or self.decoded_type(name)
        if not quantised and stored.dtype not in FLOATS:
            raise ValueError(
                f"{stored.file}: {name} is {stored.dtype}, and config.json names no quantization "
                "that says what its numbers stand for"
            )

    def _is_part(self, module: str, part: str) -> bool:
        """Whether a tensor is what MLX's quantisation keeps beside a module's weight."""
        if part not in ("scales", "biases") or not self.is_quantized(f"{module}.weight"):
            return False
        mode, _, _ = mlx_quantized.settings(self.quantization, module)
        return part == "scales" or mode == "affine"

    def _refuse_unknown(self, expected: dict[str, tuple[int, ...]]) -> None:
        for name in list(self.stored):
            module, _, part = name.rpartition(".")
            if name in expected or self._is_part(module, part):
                continue
            if self.blocks and name.removesuffix("_scale_inv") in expected:
                continue
            if part == "bias" and f"{module}.weight" in self._packed and not self.read(name).any():
                del self.stored[name]  # AutoGPTQ writes one to each layer
                continue
            if not name.endswith("rotary_emb.inv_freq"):  # computed, in old checkpoints also saved
                raise ValueError(f"{self.stored[name].file}: the model has no place for {name}")
            del self.stored[name]


def _misshapen(
    file: Path, name: str, found: tuple[int, ...], shape: tuple[int, ...], asking: str
) -> str:
    if is_prefix(name) and len(found) == 4:
        field, axis = ("parscale_n", 0) if found[0] != shape[0] else ("parscale_n_tokens", 2)
        return f"{file}: {name} has shape {list(found)}, but {asking} says {field} {shape[axis]}"
    return f"{file}: {name} has shape {list(found)}, where config.json asks for {list(shape)}"


def _quantization(
    raw: dict[str, Any], file: Path
) -> tuple[dict[str, Any], tuple[int, int] | None, Packing | None]:
    """MLX's quantisation, float8's blocks that share a scale, or a packing: one of them at most."""
    for name in ("quantization", "quantization_config"):
        settings = raw.get(name)
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{file}: {name} is {settings!r}, where an object is needed")
    if raw.get("quantize_activations"):
        raise ValueError(f"{file}: quantize_activations true is not supported")
    theirs = raw.get("quantization_config") or {}
    if raw.get("quantization") or "quant_method" not in theirs:
        return raw.get("quantization") or theirs, None, None
    method, blocks = theirs["quant_method"], theirs.get("weight_block_size")
    if method == "fp8" and isinstance(blocks, list) and [n > 0 for n in blocks] == [True, True]:
        return {}, (blocks[0], blocks[1]), None
    if method in ("awq", "gptq"):
        try:
            return {}, None, read_packing(theirs)
        except ValueError as error:
            raise ValueError(f"{file}: quantization_config: {error}") from error
    raise ValueError(
        f"{file}: weights quantised with {method!r} cannot be read (MLX's quantisation, AWQ, GPTQ "
        "and fp8 in blocks can); use the model before it was quantised"
    )
