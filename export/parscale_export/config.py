"""The fields of a model's ``config.json`` that the export reads, checked."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL_TYPES = ("qwen2", "qwen2_parscale", "llama", "llama_parscale")
MAX_STREAMS = 64


@dataclass(frozen=True)
class Config:
    """A decoder's dimensions, named as in ``config.json``; ``raw`` is that file as it stands."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_traditional: bool
    rope_scaling: dict[str, Any]
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    streams: int
    prefix_length: int
    smoothing: float
    raw: dict[str, Any] = field(repr=False)


def read_config(folder: Path) -> Config:
    """Read ``config.json`` of a published or converted model folder.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: it is not JSON, or describes a model that cannot be exported.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in this folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    try:
        return _from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _from_dict(raw: dict[str, Any]) -> Config:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("use_sliding_window"):
        raise ValueError("use_sliding_window true is not supported, only full attention")
    is_qwen2 = model_type.startswith("qwen2")
    qkv_bias = raw.get("attention_bias")
    qkv_bias = is_qwen2 if qkv_bias is None else bool(qkv_bias)
    heads, hidden = _positive(raw, "num_attention_heads"), _positive(raw, "hidden_size")
    # transformers 5 writes rope_theta and rope_scaling as one dictionary.
    rope = raw.get("rope_parameters") or {}
    config = Config(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_hidden_layers=_positive(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_positive(raw, "num_key_value_heads", heads),
        head_dim=_positive(raw, "head_dim", hidden // heads),
        vocab_size=_positive(raw, "vocab_size"),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        max_position_embeddings=_positive(raw, "max_position_embeddings", 32768),
        rope_theta=_number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0),
        rope_traditional=bool(raw.get("rope_traditional", False)),
        rope_scaling=raw.get("rope_scaling") or rope,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        # Qwen2 has biases on its queries, keys and values only; Llama on all four or none.
        output_bias=qkv_bias and not is_qwen2,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        streams=_positive(raw, "parscale_n", 1),
        prefix_length=_positive(raw, "parscale_n_tokens", 48),
        smoothing=_number(raw, "parscale_attn_smooth", 0.01),
        raw=raw,
    )
    if config.streams > MAX_STREAMS:
        raise ValueError(f"parscale_n {config.streams} is not a number from 1 to {MAX_STREAMS}")
    if not 0 <= config.smoothing <= 1:
        raise ValueError(f"parscale_attn_smooth {config.smoothing} is not from 0 to 1")
    if heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} is odd: rotary embedding needs pairs")
    return config


def _positive(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, where a positive whole number is needed")
    return value


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, where a number is needed")
    return float(value)
