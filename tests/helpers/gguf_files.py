"""Tiny GGUF files, written with the ``gguf`` package as llama.cpp's converter would."""

import json

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES = dict(hidden=64, layers=2, inner=96, heads=4, kv_heads=2, vocabulary=320, head_dim=16)


def golden_weights(folder) -> tuple[dict[str, np.ndarray], dict]:
    """A golden case's weights, and its sizes."""
    weights = mx.load(str(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    sizes = dict(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        inner=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        vocabulary=config["vocab_size"],
        eps=config["rms_norm_eps"],
    )
    return {name: np.array(a.astype(mx.float32)) for name, a in weights.items()}, sizes


def random_weights(
    seed: int = 0, *, biases: bool = False, qk_norm: bool = False, **changes
) -> tuple[dict[str, np.ndarray], dict]:
    """Weights of a small model with tied embeddings, and its sizes."""
    s = SIZES | changes
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (s["vocabulary"], s["hidden"])}
    for n in range(s["layers"]):
        layer = f"model.layers.{n}."
        q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
        shapes[layer + "self_attn.q_proj.weight"] = (q, s["hidden"])
        shapes[layer + "self_attn.k_proj.weight"] = (kv, s["hidden"])
        shapes[layer + "self_attn.v_proj.weight"] = (kv, s["hidden"])
        if qk_norm:  # as Qwen3 has them
            shapes[layer + "self_attn.q_norm.weight"] = (s["head_dim"],)
            shapes[layer + "self_attn.k_norm.weight"] = (s["head_dim"],)
        if biases:  # as Qwen2 has them
            for name in ("q_proj", "k_proj", "v_proj"):
                rows = shapes[f"{layer}self_attn.{name}.weight"][0]
                shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (s["hidden"], q)
        shapes[layer + "mlp.gate_proj.weight"] = (s["inner"], s["hidden"])
        shapes[layer + "mlp.up_proj.weight"] = (s["inner"], s["hidden"])
        shapes[layer + "mlp.down_proj.weight"] = (s["hidden"], s["inner"])
        shapes[layer + "input_layernorm.weight"] = (s["hidden"],)
        shapes[layer + "post_attention_layernorm.weight"] = (s["hidden"],)
    shapes["model.norm.weight"] = (s["hidden"],)
    return {
        name: (random.normal(size=shape) / (4 if len(shape) > 1 else 1)).astype(np.float32)
        for name, shape in shapes.items()
    }, s | {"eps": 1e-6}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, n, rest = stem.split(".", 3)
        return f"blk.{n}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """A head's rows (half, pair) to (pair, half), as ggml wants those of Llama models."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(path, weights, sizes, *, architecture="llama", kind=Kind.F32, metadata=(), extra=()):
    """Write ``weights``; matrices in the block type ``kind``, vectors in float32.

    Args:
        metadata: called with the writer, to add what it likes.
        extra: more tensors, (GGUF name, array).
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_vocab_size(sizes["vocabulary"])
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["inner"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_layer_norm_rms_eps(sizes["eps"])
    for add in metadata:
        add(writer)
    for name, array in weights.items():
        if architecture in ("llama", "smollm3", "granite") and (
            "q_proj" in name or "k_proj" in name
        ):
            array = permute(array, sizes["heads" if "q_proj" in name else "kv_heads"])
        if array.ndim > 1 and kind != Kind.F32:
            array = gguf.quantize(array, kind)
            writer.add_tensor(gguf_name(name), array, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
