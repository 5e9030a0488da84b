"""A model folder's tensors by name, one at a time, without MLX; PyTorch only for its pickles.

Names are the published ones, except that the aggregator is ``model.aggregator.fc1`` and ``fc2``
with columns ordered (stream, hidden), as a plain concatenation of the streams' hidden states is.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open

from parscale_export import adapter as adapters
from parscale_export import mlx_quantized
from parscale_export.adapter import Adapter
from parscale_export.config import Config, read_config

_PUBLISHED = {"model.aggregate_layer.0": "model.aggregator.fc1",
              "model.aggregate_layer.2": "model.aggregator.fc2"}  # fmt: skip


class Checkpoint:
    """An opened model folder, published or converted.

    Args:
        folder: where it is, or a name on the hub.
        adapter: streams to put over it.

    Attributes:
        folder: where it is.
        config: its ``config.json``, with the adapter's streams.

    Raises:
        FileNotFoundError: no such folder, no config, no weights, or not all that the index lists.
        ValueError: a file is truncated, lacks a tensor or holds one of the wrong shape, or the
            adapter is not for this model's sizes.
        ImportError: the weights are PyTorch pickles and PyTorch is not installed.
    """

    def __init__(self, folder: str | Path, adapter: Adapter | None = None):
        self.folder, self.adapter = find_folder(folder), adapter
        self.config = read_config(self.folder)
        self.quantization = _quantization(self.config.raw, self.folder)
        # Where each tensor is: its file (None for a pickle, which is held mapped) and name there.
        self._files: dict[str, Path] = {}
        self._names: dict[str, str] = {}
        self._pickled: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open_files()
        if adapter is not None:
            self._add_streams(adapter)
        self._check()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        """The tensors of the model, quantised ones by their weight alone."""
        return [name for name in expected_shapes(self.config) if name in self]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, dequantised."""
        return self._logical_shape(name)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32 where MLX quantised it, else as stored."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and f"{module}.scales" in self:
            mode, group_size, bits = mlx_quantized.settings(self.quantization, module)
            biases = self._stored(f"{module}.biases") if mode == "affine" else None
            return mlx_quantized.dequantize(
                self._stored(name),
                self._stored(f"{module}.scales"),
                biases,
                mode=mode,
                group_size=group_size,
                bits=bits,
            )
        value = self._stored(name)
        if self._names[name] == "model.aggregate_layer.0.weight":
            # Published columns run (hidden, stream), the stream fastest.
            d = value.shape[0]
            value = value.reshape(d, -1, self.config.streams).swapaxes(1, 2).reshape(d, -1)
        return value

    def _stored(self, name: str) -> np.ndarray:
        stored_name = self._names[name]
        if stored_name in self._pickled:
            return _from_torch(self._pickled[stored_name])
        file = self._files[name]
        with safe_open(file, framework="numpy") as opened:
            return opened.get_tensor(stored_name)

    def _open_files(self) -> None:
        files = sorted(self.folder.glob("model*.safetensors"))
        pickles = [] if files else sorted(self.folder.glob("pytorch_model*.bin"))
        for index in sorted(self.folder.glob("*.index.json")):
            _check_index(index)
        if not files and not pickles:
            raise FileNotFoundError(
                f"{self.folder}: no weights (model*.safetensors or pytorch_model*.bin)"
            )
        for file in files:
            self._open_safetensors(file)
        for file in pickles:
            for name, tensor in _read_pickle(file).items():
                self._pickled[name] = tensor
                self._add(name, file, tuple(tensor.shape))

    def _open_safetensors(self, file: Path) -> None:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  a safe_open is not a mapping
                    self._add(name, file, tuple(opened.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error

    def _add_streams(self, adapter: Adapter) -> None:
        if self.config.streams > 1:
            raise ValueError(
                f"{self.folder}: has {self.config.streams} streams of its own, so it takes none "
                f"from {adapter.folder}"
            )
        self.config = replace(
            self.config,
            streams=adapter.streams,
            prefix_length=adapter.prefix_length,
            smoothing=adapter.smoothing,
        )
        self._open_safetensors(adapter.weights)
        for name, file in self._files.items():
            if file == adapter.weights and not adapters.STREAM_TENSOR.fullmatch(name):
                raise ValueError(f"{file}: {name} is no part of a stream adapter")

    def _add(self, stored_name: str, file: Path, shape: tuple[int, ...]) -> None:
        name = stored_name
        for published, ours in _PUBLISHED.items():
            if name.startswith(f"{published}."):
                name = name.replace(published, ours, 1)
        self._names[name], self._files[name], self._shapes[name] = stored_name, file, shape

    def _check(self) -> None:
        config = self.config
        asking = "config.json" if self.adapter is None else adapters.CONFIG
        if config.streams == 1:
            for name in self._names:
                if name.endswith(("prefix_k", "prefix_v")):
                    raise ValueError(
                        f"{self._files[name]}: holds {name}, but config.json says parscale_n 1"
                    )
        for name, shape in expected_shapes(config).items():
            if name not in self:
                streams = self.adapter and adapters.STREAM_TENSOR.fullmatch(name)
                place = self.adapter.weights if self.adapter and streams else self.folder
                raise ValueError(f"{place}: the weights lack {name}")
            found = self._logical_shape(name)
            if found == shape:
                continue
            if name.endswith(("prefix_k", "prefix_v")) and len(found) == 4:
                field, axis = (
                    ("parscale_n", 0) if found[0] != shape[0] else ("parscale_n_tokens", 2)
                )
                raise ValueError(
                    f"{self._files[name]}: {name} has shape {list(found)}, but {asking} says "
                    f"{field} {shape[axis]}"
                )
            raise ValueError(
                f"{self._files[name]}: {name} has shape {list(found)}, "
                f"where config.json asks for {list(shape)}"
            )

    def _logical_shape(self, name: str) -> tuple[int, ...]:
        shape, module = self._shapes[name], name.removesuffix(".weight")
        if not name.endswith(".weight") or f"{module}.scales" not in self:
            return shape
        if not self.quantization:
            raise ValueError(
                f"{self.folder / 'config.json'}: no quantization, but {module} is quantised"
            )
        mode, group_size, bits = mlx_quantized.settings(self.quantization, module)
        columns = shape[-1] * 32 // bits
        scales = self._shapes[f"{module}.scales"]
        if scales != (*shape[:-1], columns // group_size) or (
            mode == "affine" and self._shapes.get(f"{module}.biases") != scales
        ):
            raise ValueError(
                f"{self._files[name]}: {module} is not quantised with {bits} bits in groups of "
                f"{group_size} as config.json says"
            )
        return (*shape[:-1], columns)


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this configuration has, and its shape."""
    d, hidden = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}

    def linear(module: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{module}.weight"] = (rows, columns)
        if bias:
            shapes[f"{module}.bias"] = (rows,)

    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        linear(f"{layer}.self_attn.q_proj", q, d, config.qkv_bias)
        linear(f"{layer}.self_attn.k_proj", kv, d, config.qkv_bias)
        linear(f"{layer}.self_attn.v_proj", kv, d, config.qkv_bias)
        linear(f"{layer}.self_attn.o_proj", d, q, config.output_bias)
        linear(f"{layer}.mlp.gate_proj", hidden, d, config.mlp_bias)
        linear(f"{layer}.mlp.up_proj", hidden, d, config.mlp_bias)
        linear(f"{layer}.mlp.down_proj", d, hidden, config.mlp_bias)
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        if config.streams > 1:
            prefix = (config.streams, config.num_key_value_heads, config.prefix_length)
            shapes[f"{layer}.self_attn.prefix_k"] = (*prefix, config.head_dim)
            shapes[f"{layer}.self_attn.prefix_v"] = (*prefix, config.head_dim)
    shapes["model.norm.weight"] = (d,)
    if config.streams > 1:
        linear("model.aggregator.fc1", d, config.streams * d, True)
        linear("model.aggregator.fc2", config.streams, d, True)
    if not config.tie_word_embeddings:
        linear("lm_head", config.vocab_size, d, False)
    return shapes


def find_folder(path_or_name: str | Path) -> Path:
    """The local folder of a model: the given one, or a hub repository's after downloading it.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it is a file.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: a file, where a model folder is needed")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download = partial(snapshot_download, str(path_or_name))
    try:
        folder = Path(download(allow_patterns=["*.json", "*.jinja", "*.txt", "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(download(allow_patterns=["pytorch_model*.bin"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FileNotFoundError(
            f"{path_or_name}: neither a folder here nor a model on the hub ({reason})"
        ) from error
    return folder


def _quantization(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    quantization = raw.get("quantization")
    if quantization is None and raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        if method is not None:
            raise ValueError(
                f"{folder / 'config.json'}: weights quantised with {method!r} are not supported, "
                "only MLX's; use the unquantised model"
            )
        quantization = raw["quantization_config"]
    return quantization or {}


def _check_index(index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weight files") from error
    for shard in sorted(map(str, shards)):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: {shard!r} is not the name of a file in this folder")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: listed in {index.name} but missing")


def _read_pickle(file: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file}: PyTorch pickles need PyTorch: pip install 'parscale[torch]'"
        ) from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever its unpickler met
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: not a PyTorch pickle of tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise ValueError(f"{file}: not a dictionary of tensors")
    return tensors


def _from_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own: move the bits
        return tensor.view(torch.int16).numpy().view(np.dtype("bfloat16"))
    return tensor.numpy()
