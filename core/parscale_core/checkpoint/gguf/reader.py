"""Read a GGUF file of one of the families in ``ARCHITECTURES`` into a Hugging Face-like folder.

The ``gguf`` package dequantises the tensors; here they get their published names and layout back.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES
from safetensors.numpy import save_file

from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.config import tensor_shapes as config_shapes
from parscale_core.checkpoint.gguf.config import ROPE_FACTORS, check_architecture, read_config
from parscale_core.checkpoint.gguf.container import GGUF, Tensor, open_container
from parscale_core.checkpoint.gguf.tokenizer import save_tokenizer

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SHARD_BYTES = 1 << 30


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that ``path`` names, or that is the only one in that folder without weights.

    Raises:
        ValueError: the folder holds several.
    """
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ValueError(f"{path}: holds {len(files)} GGUF files ({names}); name one of them")
    return files[0] if files else None


def open_gguf(path: Path) -> GGUF:
    """Open a GGUF file of a model of one of the ``ARCHITECTURES``.

    Raises:
        ValueError: the file is truncated or not GGUF, is no whole model of a supported
            architecture, has metadata that is not understood, or holds a tensor in a type that the
            ``gguf`` package cannot read.
    """
    file = open_container(path)
    check_architecture(file)
    for tensor in {tensor.kind: tensor for tensor in file.tensors}.values():
        _check_type(file, tensor)
    return file


def unpack_gguf(
    file: GGUF,
    folder: Path,
    *,
    dtype: np.dtype | None = None,
    on_bytes: Callable[[int], object] = lambda n: None,
) -> None:
    """Write a GGUF file's weights, configuration and tokenizer as a Hugging Face-like folder.

    Tensors are dequantised one at a time and written in shards of about 1 GB.

    Args:
        dtype: the type of the written weights; by default ``stored_type``'s.
        on_bytes: called with the size of every tensor once it has been read.

    Raises:
        ValueError: as ``read_config``; or its tokenizer is of a kind that is not known.
    """
    config = read_config(file)
    _check_tensors(file, ModelConfig.from_dict(config))
    dtype = dtype or stored_type(file)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tokenizer(file, config["vocab_size"], folder)
    shard: dict[str, np.ndarray] = {}
    places: dict[str, str] = {}
    for name, weight in _read_tensors(file, config, dtype):
        if sum(w.nbytes for w in shard.values()) >= SHARD_BYTES:
            _save_shard(folder, shard, places)
            shard = {}
        shard[name] = weight
        on_bytes(weight.nbytes)
    _save_shard(folder, shard, places)
    index = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def tensor_shapes(file: GGUF) -> dict[str, tuple[int, ...]]:
    """The tensors by their published names, and their shapes.

    Raises:
        ValueError: the model has no tensor of such a name.
    """
    return {
        published_name(file.path, t.name): t.shape for t in file.tensors if t.name != ROPE_FACTORS
    }


def stored_type(file: GGUF) -> np.dtype:
    """The type to unpack to: the file's own where it is not quantised, else float16.

    Scales of quantised blocks are float16, and so lose least in it: bfloat16 would add an error
    eight times as large.
    """
    types = {t.kind.name for t in file.tensors if len(t.shape) > 1}
    if types == {"F32"}:
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16 if types <= {"BF16", "F32"} else np.float16)


def published_name(path: Path, name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    Raises:
        ValueError: the model has no such tensor.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        raise ValueError(f"{path}: unexpected tensor {name}")
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def _check_type(file: GGUF, tensor: Tensor) -> None:
    block, size = GGML_QUANT_SIZES[tensor.kind]
    try:
        file.read(tensor._replace(shape=(block,), size=size), np.dtype(np.float32))
    except NotImplementedError as error:
        kind = tensor.kind.name
        raise ValueError(
            f"{file.path}: {tensor.name} has type {kind}, which cannot be read"
        ) from error


def _check_tensors(file: GGUF, config: ModelConfig) -> None:
    expected, found = config_shapes(config), tensor_shapes(file)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{file.path}: the weights lack {name}")
        if found[name] != shape:
            raise ValueError(
                f"{file.path}: {name} has shape {list(found[name])}, where the metadata asks for "
                f"{list(shape)}"
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"{file.path}: holds {name}, for which the model has no place")


def _save_shard(folder: Path, shard: dict[str, np.ndarray], places: dict[str, str]) -> None:
    name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    places |= dict.fromkeys(shard, name)


def _read_tensors(
    file: GGUF, config: dict[str, Any], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    is_llama = config["model_type"] not in ("qwen2", "qwen3")
    for tensor in file.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        values = file.read(tensor, dtype)
        if is_llama and ".attn_q." in tensor.name:
            values = _unpermute(values, config["num_attention_heads"])
        elif is_llama and ".attn_k." in tensor.name:
            values = _unpermute(values, config["num_key_value_heads"])
        yield published_name(file.path, tensor.name), np.ascontiguousarray(values)


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    # ggml rotates neighbouring pairs of a Llama head, published checkpoints its two halves: the
    # rows of a head run (half, 2) there and (2, half) here. Qwen's are stored as published.
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
