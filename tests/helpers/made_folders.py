"""Model folders of many kinds, made by transformers, and the logits that it computes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

FAMILIES = {
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral",
    "smollm3": "SmolLM3", "granite": "Granite",
}  # fmt: skip
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
ORIGINAL = 16  # the original context of those that are stretched
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": ORIGINAL}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}  # fmt: skip
# By name: the fields of config.json that differ, each with one model family.
ROPES = {
    "default": {},
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear by its old name": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn attention_factor 1": {"rope_scaling": YARN | {"attention_factor": 1.0}},
    "yarn attention_factor": {"rope_scaling": YARN | {"attention_factor": 1.7}},
    "yarn mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "yarn mscale alone": {"rope_scaling": YARN | {"mscale": 0.7}},
    "yarn not truncated": {"rope_scaling": YARN | {"truncate": False}},
    "yarn betas": {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 0.5}},
    "yarn of no original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn beside other lengths": {"rope_scaling": YARN | {"factor": 2.5}},
    "longrope": {"rope_scaling": LONGROPE},
    "longrope attention_factor": {"rope_scaling": LONGROPE | {"attention_factor": 1.3}},
    "longrope factor": {"rope_scaling": LONGROPE | {"factor": 8.0}},
    "longrope original outside": {
        "rope_scaling": {k: v for k, v in LONGROPE.items() if "original" not in k},
        "original_max_position_embeddings": ORIGINAL,
    },
    "rope_parameters": {"rope_parameters": YARN | {"rope_theta": 20000.0}},
}


def _libraries():
    torch = pytest.importorskip("torch", reason="transformers computes with PyTorch")
    import transformers

    return torch, transformers


def make(folder: Path, family: str = "llama", *, seed: int = 0, dtype=None, **fields) -> Path:
    """Write a random model; ``fields`` are put into its ``config.json`` as they are."""
    torch, transformers = _libraries()
    config_class = getattr(transformers, f"{FAMILIES[family]}Config")
    model_class = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")
    torch.manual_seed(seed)
    plain = config_class(**SIZES)
    loud = {"initializer_range": 0.2}  # so that positions matter to the logits
    derived = ("layer_types", "no_rope_layers")  # from the number of layers
    sizes = {key: value for key, value in plain.to_dict().items() if key not in derived}
    made = config_class.from_dict(sizes | loud | _understood(fields))
    model = model_class(made)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype or torch.float32).save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if "rope_scaling" in fields or "rope_theta" in fields:
        config["rope_theta"] = config.pop("rope_parameters", {}).get("rope_theta", 10000.0)
    file.write_text(json.dumps(config | fields))
    return folder


def _understood(fields: dict) -> dict:
    # What only changes the numbers of rotary embeddings has no part in making weights.
    return {k: v for k, v in fields.items() if "rope" not in k or k.startswith("no_rope")}


def expected(folder: Path, ids: list[int]) -> np.ndarray:
    """transformers' logits [L, vocab] in float32."""
    torch, transformers = _libraries()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def add_streams(folder: Path, streams: int, length: int, *, seed: int = 0) -> Path:
    """Give a made model random streams, in the published layout, beside itself."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    random = np.random.default_rng(seed)
    d = config["hidden_size"]
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or d // config["num_attention_heads"]
    for n in range(layers):
        for part in "kv":
            shape = (streams, heads, length, head_dim)
            name = f"model.layers.{n}.self_attn.prefix_{part}"
            tensors[name] = random.normal(size=shape).astype(np.float32)
    for name, shape in {
        "0.weight": (d, streams * d), "0.bias": (d,), "2.weight": (streams, d), "2.bias": (streams,)
    }.items():  # fmt: skip
        tensors[f"model.aggregate_layer.{name}"] = 0.3 * random.normal(size=shape).astype("float32")
    whole = folder.with_name(f"{folder.name}-p{streams}")
    whole.mkdir()
    config |= {
        "model_type": f"{config['model_type']}_parscale", "parscale_n": streams,
        "parscale_n_tokens": length, "parscale_attn_smooth": 0.05,
    }  # fmt: skip
    (whole / "config.json").write_text(json.dumps(config))
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    return whole


def expected_of_streams(backbone: Path, whole: Path, ids: list[int]) -> np.ndarray:
    """The published formula over transformers' own model: logits [L, vocab] in float32.

    Each stream is a run over a cache that holds its prefix, whose keys are not rotated and take no
    position.
    """
    torch, transformers = _libraries()
    model = transformers.AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    config = json.loads((whole / "config.json").read_text())
    tensors = {k: torch.tensor(v) for k, v in load_file(whole / "model.safetensors").items()}
    n, streams = config["parscale_n_tokens"], config["parscale_n"]
    hidden = []
    with torch.no_grad():
        for p in range(streams):
            cache = transformers.DynamicCache()
            for layer in range(config["num_hidden_layers"]):
                name = f"model.layers.{layer}.self_attn.prefix"
                cache.update(
                    tensors[f"{name}_k"][p : p + 1], tensors[f"{name}_v"][p : p + 1], layer
                )
            hidden.append(
                model.model(
                    torch.tensor([ids]), past_key_values=cache,
                    position_ids=torch.arange(len(ids))[None],
                    attention_mask=torch.ones(1, n + len(ids), dtype=torch.long),
                ).last_hidden_state[0]
            )  # fmt: skip
        together = torch.stack(hidden, dim=-1)  # [L, d, P]: columns run (hidden, stream)
        layer = "model.aggregate_layer"
        x = together.flatten(1) @ tensors[f"{layer}.0.weight"].T + tensors[f"{layer}.0.bias"]
        x = torch.nn.functional.silu(x) @ tensors[f"{layer}.2.weight"].T
        weights = torch.softmax(x + tensors[f"{layer}.2.bias"], dim=-1)
        smoothing = config["parscale_attn_smooth"]
        weights = weights * (1 - smoothing) + smoothing / streams
        logits = model.lm_head((together * weights[:, None]).sum(-1))
    return (logits / config.get("logits_scaling", 1.0)).numpy()


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, SIZES["vocab_size"], count).tolist()
