"""Write a model's folder: as MLX holds it, or as the published PyTorch classes load it."""

import json
from pathlib import Path
from typing import Any

from parscale_mlx.graft import ARCHITECTURES
from parscale_mlx.model import Model

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import dequantize_model, get_total_parameters, make_shards, save_config
from parscale_core.checkpoint.names import INTERNAL_COLUMNS, published_columns, published_name
from parscale_core.convert_settings import LAYOUTS
from parscale_core.progress import progress_bar

SHARD_GB = 2
# The published classes, by the repository that holds their code.
AUTO_MAP = {
    "AutoConfig": "configuration_qwen2_parscale.Qwen2ParScaleConfig",
    "AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM",
}
AUTO_MAP = {kind: f"ParScale/ParScale-1.8B-P8--{name}" for kind, name in AUTO_MAP.items()}


def write_model(
    folder: Path,
    model: Model,
    config: dict[str, Any],
    *,
    to: str = "mlx",
    donate: bool = True,
    progress: bool = False,
) -> None:
    """Write configuration and weights as mlx-lm's ``save`` does, a tensor at a time.

    Args:
        donate: drop the model's own references to its weights, so that a weight can leave the
            memory as soon as its shard is written; the model is of no use afterwards.
        to: "mlx", or "hf" for the published names and the published order of the columns.
    """
    if to == "hf" and model.args.streams == 1 and model.args.prefix_length:
        raise ValueError("the published classes have no prefix for one stream; keep the MLX layout")
    folder.mkdir()
    save_config(_config_to_write(model, config, to), folder / "config.json")
    weights = dict(tree_flatten(model.parameters()))
    if to == "hf":
        weights = published_weights(model)
    size = sum(a.nbytes for a in weights.values())
    # Some versions start with an empty shard where the first tensor fills one.
    shards = [shard for shard in make_shards(weights, SHARD_GB) if shard]
    metadata = {"total_size": size, "total_parameters": get_total_parameters(model)}
    if donate:
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    weights.clear()
    weight_map: dict[str, str] = {}
    count = len(shards)
    with progress_bar("Writing", size, "B", progress) as bar:
        for n in range(1, count + 1):
            name = (
                "model.safetensors" if count == 1 else f"model-{n:05d}-of-{count:05d}.safetensors"
            )
            shard = shards.pop(0)
            for tensor in shard.values():
                mx.eval(tensor)
                bar.update(tensor.nbytes)
            mx.save_safetensors(str(folder / name), shard, metadata={"format": LAYOUTS[to]})
            weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def published_weights(model: Model) -> dict[str, mx.array]:
    """A model's weights as they are published: what ``Model.sanitize`` takes back."""
    published = {}
    for name, value in dict(tree_flatten(model.parameters())).items():
        if name == INTERNAL_COLUMNS:
            value = published_columns(value, model.args.streams)
        published[published_name(name)] = value
    return published


def dequantized(model: Model, config: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """A model without quantised weights, and its configuration.

    Raises:
        ValueError: no published class computes what this model does.
    """
    if model.args.rope_traditional:
        raise ValueError("rope_traditional true has no counterpart in the published classes")
    dequantize_model(model)
    model.set_dtype(model.model.norm.weight.dtype)
    return model, {k: v for k, v in config.items() if not k.startswith("quantization")}


def dtype_name(model: Model) -> str:
    """The type of a model's weights as ``config.json`` has it, those quantised left out."""
    return str(model.model.norm.weight.dtype).removeprefix("mlx.core.")


def _config_to_write(model: Model, config: dict[str, Any], to: str) -> dict[str, Any]:
    # The code that auto_map names is never copied along, and an MLX folder has no use for it.
    config = {key: value for key, value in config.items() if key not in ("model_file", "auto_map")}
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(model)
    if to == "mlx":
        # Where mlx-lm's classes look; what is left out means something else to them.
        config.setdefault("tie_word_embeddings", model.args.tie_word_embeddings)
        config.setdefault("rope_theta", model.args.rope.theta)
        if rope := config.get("rope_parameters"):
            config.setdefault("rope_scaling", rope)
        if model.args.family == "qwen3":
            config.setdefault("head_dim", model.args.head_dim)
    if to == "hf" and model.args.streams > 1:
        config.setdefault("architectures", [ARCHITECTURES[model.args.family]])
        if model.args.family == "qwen2":
            config["auto_map"] = dict(AUTO_MAP)
    return config
