"""What ``config.json`` would say of the model in a GGUF file.

llama.cpp gives the keys their meaning (``llama_model::load_hparams``, ``llama_context``'s rotary
settings). A key that changes numbers in a way that ``config.json`` has no words for is refused.
"""

from math import isclose, log, prod
from typing import Any

import numpy as np

from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.gguf.container import GGUF, Tensor
from parscale_core.checkpoint.gguf.tokenizer import end_tokens, token_id

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
ROPE_FACTORS = "rope_freqs.weight"
READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.scale",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
}  # fmt: skip
GRANITE = {"logit_scale", "residual_scale", "embedding_scale"}
# These say how a model was made or is packed, and change no numbers.
IDLE = {"rope.scaling.finetuned", "tensor_data_layout", "expert_used_count", "pooling_type"}
# These change none where they have this value.
NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "attention.causal": True, "attention.sliding_window": 0,
    "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0, "use_parallel_residual": False,
    "logit_scale": 1, "residual_scale": 1, "embedding_scale": 1, "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0, "nextn_predict_layers": 0, "leading_dense_block_count": 0,
    "rope.scaling.yarn_ext_factor": 1, "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0, "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
}  # fmt: skip


def read_config(file: GGUF) -> dict[str, Any]:
    """What a published ``config.json`` would say.

    Raises:
        ValueError: the metadata lacks a field, contradicts the tensors, or asks for what
            ``config.json`` has no words for.
    """
    architecture = check_architecture(file)
    names = {tensor.name: tensor for tensor in file.tensors}

    def get(key: str, default: int | None = None) -> int:
        value = file.whole(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{file.path}: the metadata has no {architecture}.{key}")
        return value

    heads, hidden, layers = get("attention.head_count"), get("embedding_length"), get("block_count")
    head_dim = get("attention.key_length", hidden // heads or None)
    _check_heads(file, architecture, head_dim)
    if "token_embd.weight" not in names:
        raise ValueError(f"{file.path}: holds no token_embd.weight")
    rows = names["token_embd.weight"].shape[0]
    for key, found in (("block_count", _layers(names)), ("vocab_size", rows)):
        if get(key, found) != found:
            raise file.wrong(f"{architecture}.{key}", get(key), f"the {found} of the tensors")
    epsilon = file.number(f"{architecture}.attention.layer_norm_rms_epsilon")
    if epsilon is None or epsilon < 0:
        key = f"{architecture}.attention.layer_norm_rms_epsilon"
        raise file.wrong(key, epsilon, "a number of at least 0")
    config: dict[str, Any] = {
        "model_type": architecture,
        "architectures": [ARCHITECTURES[architecture]],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": epsilon,
        "max_position_embeddings": get("context_length"),
        "rope_theta": file.number(f"{architecture}.rope.freq_base", 10000.0),
        "vocab_size": rows,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "bos_token_id": token_id(file, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_tokens(file) or None,
    }
    if config["rope_theta"] <= 1:
        raise file.wrong(f"{architecture}.rope.freq_base", config["rope_theta"], "more than 1")
    if architecture == "granite":
        config |= _multipliers(file, head_dim)
    config = {key: value for key, value in config.items() if value is not None}
    try:
        if scaling := _rope_scaling(file, names.get(ROPE_FACTORS), config):
            config["rope_scaling"] = scaling
        ModelConfig.from_dict(config)
    except ValueError as error:
        message = str(error)
        raise ValueError(
            message if message.startswith(str(file.path)) else f"{file.path}: {message}"
        ) from error
    return config


def check_architecture(file: GGUF) -> str:
    """The architecture, once every key about it is known to be understood.

    Raises:
        ValueError: it is not supported, the file is no whole model, or a key is not understood.
    """
    path, metadata = file.path, file.metadata
    architecture = file.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    if (kind := file.text("general.type") or "model") != "model":
        raise ValueError(f"{path}: general.type is {kind!r}, where a model is needed")
    if (parts := file.whole("split.count", 1, least=0) or 1) > 1:
        raise ValueError(
            f"{path}: one of {parts} parts; join them first (llama-gguf-split --merge)"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise ValueError(f"{path}: mixtures of experts are not supported")
    for key in metadata:
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in READ or name in IDLE:
            continue
        if architecture == "granite" and name in GRANITE:
            continue
        if name not in NEUTRAL:
            raise ValueError(f"{path}: the key {key} is not understood")
        value = file.value(key)
        if value != NEUTRAL[name]:
            raise file.wrong(key, value, f"{NEUTRAL[name]}, the only value that is supported")
    return architecture


def _layers(names: dict[str, Tensor]) -> int:
    numbers = [name.split(".")[1] for name in names if name.startswith("blk.")]
    return len(set(numbers))


def _check_heads(file: GGUF, architecture: str, head_dim: int) -> None:
    path = file.path
    if file.whole(f"{architecture}.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: a rotary embedding of a part of each head is not supported")
    key = f"{architecture}.attention.value_length"
    if (values := file.whole(key, head_dim)) != head_dim:
        raise file.wrong(key, values, f"the {head_dim} of the keys")
    if architecture == "granite":  # has a multiplier in its place
        return
    key = f"{architecture}.attention.scale"
    usual = head_dim**-0.5
    scale = file.number(key, usual)
    if scale and not isclose(scale, usual, rel_tol=1e-5):
        raise file.wrong(key, scale, f"{usual:g}, the only value that is supported")


def _multipliers(file: GGUF, head_dim: int) -> dict[str, float]:
    """Granite's; to llama.cpp 0 stands for none, but not of the logits."""
    if not file.flag("granite.rope.scaling.finetuned", True):
        raise file.wrong("granite.rope.scaling.finetuned", False, "true: rotary embedding is used")
    if (logits := file.number("granite.logit_scale")) is None:
        raise ValueError(f"{file.path}: the metadata has no granite.logit_scale")
    return {
        "logits_scaling": logits,
        "residual_multiplier": file.number("granite.residual_scale") or 1.0,
        "embedding_multiplier": file.number("granite.embedding_scale") or 1.0,
        "attention_multiplier": file.number("granite.attention.scale") or head_dim**-0.5,
    }


def _rope_scaling(
    file: GGUF, factors: Tensor | None, config: dict[str, Any]
) -> dict[str, Any] | None:
    prefix = f"{config['model_type']}.rope.scal"
    # llama.cpp: a factor without a type is a linear one, and scale_linear is its older name.
    kind = file.text(f"{prefix}ing.type") or "linear"
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.path}: {prefix}ing.type {kind!r} is not one of none, linear, yarn")
    factor = file.number(f"{prefix}ing.factor", file.number(f"{prefix}e_linear", 0.0)) or 1.0
    if factor < 0:
        raise file.wrong(f"{prefix}ing.factor", factor, "a positive number")
    magnitude = file.number(f"{prefix}ing.attn_factor", 1.0)
    if kind != "yarn" and magnitude != 1:
        raise file.wrong(f"{prefix}ing.attn_factor", magnitude, "1, and the type is not yarn")
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        scaling = _yarn(file, f"{prefix}ing", factor, magnitude, config)
    elif kind == "linear" and factor != 1:
        scaling = {"rope_type": "linear", "factor": factor}
    if factors is None:
        return scaling
    if scaling is not None:
        raise ValueError(f"{file.path}: both {ROPE_FACTORS} and {prefix}ing.type {kind}")
    return _llama3_scaling(file, factors, config)


def _yarn(
    file: GGUF, prefix: str, factor: float, magnitude: float | None, config: dict[str, Any]
) -> dict[str, Any]:
    key = f"{prefix}.original_context_length"
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.whole(key, config["max_position_embeddings"]),
    }
    if magnitude not in (None, 1):
        # llama.cpp multiplies with what transformers replaces.
        scaling["attention_factor"] = magnitude * (0.1 * log(factor) + 1.0)
    return scaling


def _llama3_scaling(file: GGUF, tensor: Tensor, config: dict[str, Any]) -> dict[str, Any] | None:
    # The file holds what Llama 3's scaling came to, one factor a frequency. Every published model
    # has the same parameters but for the factor; check that they give these very numbers.
    if prod(tensor.shape) != config["head_dim"] // 2:
        raise ValueError(f"{file.path}: {ROPE_FACTORS} is not the scaling of Llama 3")
    factors = file.read(tensor, np.dtype(np.float32)).reshape(-1)
    if (factors == 1).all():
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = ModelConfig.from_dict(config).rope.rotation().frequencies
    scaled = ModelConfig.from_dict(config | {"rope_scaling": scaling}).rope.rotation().frequencies
    if not np.isfinite(factors).all() or not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise ValueError(f"{file.path}: {ROPE_FACTORS} is not the scaling of Llama 3")
    return scaling
