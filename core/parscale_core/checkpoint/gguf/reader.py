"""Read a GGUF file of the Llama or Qwen2 family into a Hugging Face-like folder.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package parses
the file and dequantises its tensors; here they get their published names and layout back.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor, dequantize
from safetensors.numpy import save_file

from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.gguf.tokenizer import save_tokenizer
from parscale_core.checkpoint.rope import inverse_frequencies

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
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


@dataclass
class GGUF:
    """An open GGUF file: its metadata, and its tensors mapped from disk."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[ReaderTensor]


def open_gguf(path: Path) -> GGUF:
    """Open a GGUF file of a Llama or Qwen2 model.

    Raises:
        ValueError: the file is truncated or not GGUF, of an architecture that is not supported, one
            part of several, or holds a tensor in a type that the ``gguf`` package cannot read.
    """
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader trusts the file: a bad one fails anywhere in it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole GGUF file: {reason}") from error
    metadata = {key: _contents(field) for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise ValueError(f"{path}: mixtures of experts are not supported")
    if (metadata.get("split.count") or 1) > 1:
        raise ValueError(
            f"{path}: one of {metadata['split.count']} parts; join them first "
            "(llama-gguf-split --merge)"
        )
    for tensor in {t.tensor_type: t for t in reader.tensors}.values():
        _check_type(path, tensor)
    return GGUF(path, metadata, reader.tensors)


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
    dtype = dtype or stored_type(file)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tokenizer(file.path, file.metadata, folder)
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
        ValueError: a Llama or Qwen2 model has no tensor of such a name.
    """
    return {
        published_name(file.path, t.name): _shape(t) for t in file.tensors if t.name != ROPE_FACTORS
    }


def stored_type(file: GGUF) -> np.dtype:
    """The type to unpack to: the file's own where it is not quantised, else float16.

    Scales of quantised blocks are float16, and so lose least in it: bfloat16 would add an error
    eight times as large.
    """
    types = {t.tensor_type.name for t in file.tensors if len(t.shape) > 1}
    if types == {"F32"}:
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16 if types <= {"BF16", "F32"} else np.float16)


def read_config(file: GGUF) -> dict:
    """What a published ``config.json`` would say.

    Raises:
        ValueError: the metadata lacks a field, or scales its rotary embedding in a way that
            ``config.json`` has no words for.
    """
    path, metadata = file.path, file.metadata
    names = {t.name: t for t in file.tensors}
    architecture = metadata["general.architecture"]

    def get(key: str):
        try:
            return metadata[f"{architecture}.{key}"]
        except KeyError:
            raise ValueError(f"{path}: the metadata has no {architecture}.{key}") from None

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = metadata.get(f"{architecture}.attention.key_length", hidden // heads)
    if metadata.get(f"{architecture}.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: a rotary embedding of a part of each head is not supported")
    if "token_embd.weight" not in names:
        raise ValueError(f"{path}: holds no token_embd.weight")
    config = {
        "model_type": architecture,
        "architectures": [ARCHITECTURES[architecture]],
        "hidden_size": hidden,
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": metadata.get(f"{architecture}.rope.freq_base", 10000.0),
        "vocab_size": _shape(names["token_embd.weight"])[0],
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    if scaling := _rope_scaling(file, names.get(ROPE_FACTORS), config):
        config["rope_scaling"] = scaling
    return {key: value for key, value in config.items() if value is not None}


def published_name(path: Path, name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    Raises:
        ValueError: a Llama or Qwen2 model has no such tensor.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        raise ValueError(f"{path}: unexpected tensor {name}")
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def _contents(field):
    # Arrays of numbers (scores, token types) come out of contents() one slow Python object each.
    if field.types[0] == GGUFValueType.ARRAY and field.types[-1] != GGUFValueType.STRING:
        return np.concatenate([field.parts[n] for n in field.data]) if len(field.data) else []
    return field.contents()


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _check_type(path: Path, tensor: ReaderTensor) -> None:
    try:
        dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ValueError(f"{path}: {tensor.name} has type {kind}, which cannot be read") from error


def _save_shard(folder: Path, shard: dict[str, np.ndarray], places: dict[str, str]) -> None:
    name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    places |= dict.fromkeys(shard, name)


def _read_tensors(file: GGUF, config: dict, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    is_llama = config["model_type"] == "llama"
    for tensor in file.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        name, shape = published_name(file.path, tensor.name), _shape(tensor)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if prod(shape) != values.size:
            raise ValueError(f"{file.path}: {tensor.name} does not fill its shape {list(shape)}")
        values = values.reshape(shape)
        if is_llama and ".attn_q." in tensor.name:
            values = _unpermute(values, config["num_attention_heads"])
        elif is_llama and ".attn_k." in tensor.name:
            values = _unpermute(values, config["num_key_value_heads"])
        yield name, np.ascontiguousarray(values.astype(dtype, copy=False))


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    # ggml rotates neighbouring pairs of a Llama head, published checkpoints its two halves: the
    # rows of a head run (half, 2) there and (2, half) here. Qwen2's are stored as published.
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _end_tokens(metadata: dict[str, Any]):
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ids = list(dict.fromkeys(n for n in ids if n is not None))
    return ids if len(ids) > 1 else (ids[0] if ids else None)


def _rope_scaling(file: GGUF, factors: ReaderTensor | None, config: dict) -> dict | None:
    path, metadata = file.path, file.metadata
    if factors is not None:
        return _llama3_scaling(path, np.asarray(factors.data, np.float32), config)
    prefix = f"{config['model_type']}.rope.scaling"
    kind = metadata.get(f"{prefix}.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{path}: {prefix}.type {kind!r} is not one of none, linear, yarn")
    scaling = {"rope_type": kind, "factor": metadata.get(f"{prefix}.factor")}
    if not scaling["factor"]:
        raise ValueError(f"{path}: {prefix}.type is {kind}, but there is no {prefix}.factor")
    original = metadata.get(f"{prefix}.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(path: Path, factors: np.ndarray, config: dict) -> dict:
    # The file holds what Llama 3's scaling came to, one factor a frequency. Every published model
    # has the same parameters but for the factor; check that they give these very numbers.
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, _ = inverse_frequencies(ModelConfig.from_dict(config))
    scaled, _ = inverse_frequencies(ModelConfig.from_dict(config | {"rope_scaling": scaling}))
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise ValueError(f"{path}: {ROPE_FACTORS} is not the scaling of Llama 3")
    return scaling
