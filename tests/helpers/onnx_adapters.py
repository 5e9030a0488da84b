"""Golden cases taken apart: a plain backbone, and its streams as an adapter."""

import json
from pathlib import Path

import numpy as np
from parscale_core.checkpoint.adapter import fingerprint
from safetensors.numpy import load_file, save_file

from helpers.onnx_cases import GOLDEN


def split(case: str, folder: Path) -> tuple[Path, Path]:
    """Write a golden case as a Qwen2 checkpoint of one stream, and an adapter over it."""
    backbone, streams, places = folder / "backbone", {}, {}
    backbone.mkdir(parents=True)
    for file in sorted((GOLDEN / case).glob("model*.safetensors")):
        tensors = load_file(file)
        own = [name for name in tensors if "prefix" in name or "aggregate" in name]
        streams |= {name: tensors.pop(name) for name in own}
        save_file(tensors, backbone / file.name)
        places |= dict.fromkeys(tensors, file.name)
    index = backbone / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    config = json.loads((GOLDEN / case / "config.json").read_text())
    plain = {name: value for name, value in config.items() if "parscale" not in name}
    plain |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (backbone / "config.json").write_text(json.dumps(plain))
    tensors = {}
    for name, tensor in streams.items():
        if name == "model.aggregate_layer.0.weight":  # its columns run (hidden, stream)
            d = len(tensor)
            tensor = tensor.reshape(d, d, -1).swapaxes(1, 2).reshape(d, -1)
        name = name.replace("aggregate_layer.0", "aggregator.fc1")
        tensors[name.replace("aggregate_layer.2", "aggregator.fc2")] = np.ascontiguousarray(tensor)
    numbers = {name: value for name, value in config.items() if name.startswith("parscale")}
    return backbone, write_adapter(folder / f"p{config['parscale_n']}", backbone, tensors, numbers)


def write_adapter(folder: Path, backbone: Path, tensors: dict, numbers: dict) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapters.safetensors")
    about = {"name": backbone.name, "sha256": fingerprint(backbone)}
    config = {"adapter_type": "parscale_streams", "backbone": about} | numbers
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def random_adapter(folder: Path, backbone: Path, streams: int, tokens: int = 48) -> Path:
    """An adapter of random streams over golden case p4's backbone."""
    random = np.random.default_rng(streams)
    d, shapes = 64, {}
    for n in range(3):
        for part in "kv":
            shapes[f"model.layers.{n}.self_attn.prefix_{part}"] = (streams, 2, tokens, 16)
    for name, rows, columns in (("fc1", d, streams * d), ("fc2", streams, d)):
        shapes[f"model.aggregator.{name}.weight"] = (rows, columns)
        shapes[f"model.aggregator.{name}.bias"] = (rows,)
    tensors = {n: random.normal(size=s, scale=0.3).astype(np.float32) for n, s in shapes.items()}
    numbers = {"parscale_n": streams, "parscale_n_tokens": tokens, "parscale_attn_smooth": 0.01}
    return write_adapter(folder, backbone, tensors, numbers)


def joined(folder: Path, backbone: Path, adapter: Path) -> Path:
    """Backbone and adapter as one checkpoint."""
    folder.mkdir()
    tensors = load_file(adapter / "adapters.safetensors")
    for file in backbone.glob("model*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((backbone / "config.json").read_text())
    config |= json.loads((adapter / "adapter_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_parscale"}))
    return folder
