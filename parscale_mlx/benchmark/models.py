"""The models that are compared: mlx-lm's own class and ours, over the same weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parscale_mlx.adapter import Adapter, load_adapter, take_streams, with_streams
from parscale_mlx.load import load_model
from parscale_mlx.model import Aggregator, Model

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import granite, llama, qwen2, qwen3, smollm3
from parscale_core.analysis.shape import read_config
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.names import is_stream_tensor
from parscale_core.error_text import one_line

PREFIX, SMOOTH = 48, 0.01
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN2_5_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
TWINS = {
    "qwen2": qwen2, "qwen3": qwen3, "llama": llama, "mistral": llama, "smollm3": smollm3,
    "granite": granite,
}  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """Which model is measured.

    Attributes:
        model: a folder or a name; None for random weights.
        shape: a ``config.json`` whose shape random weights have; None for the default.
        adapters: folders of streams over ``model``.
    """

    model: str | None = None
    shape: Path | None = None
    adapters: Sequence[Path] = ()

    def load(self, default: dict[str, Any]) -> tuple[Model, dict[str, Any], dict[int, Adapter]]:
        """The model without streams, its configuration, and its streams by their number.

        Args:
            default: the configuration of random weights where neither a model nor a shape is given.

        Raises:
            FileNotFoundError, ValueError: as ``load_model`` and ``load_adapter``.
        """
        if self.model is None:
            config = default if self.shape is None else read_config(self.shape)
            return random_backbone(config), config, {}
        folder = find_folder(self.model)
        loaded, config = load_model(folder)
        backbone, own = split(loaded, config)
        found = [load_adapter(path, backbone=folder) for path in self.adapters]
        return backbone, config, {a.streams: a for a in (*found, own) if a is not None}

    def name(self, default: str) -> str:
        """What a report calls it; ``default`` where neither a model nor a shape is given."""
        return self.model or str(self.shape or default)


def random_backbone(config: dict[str, Any]) -> Model:
    """A model without streams in the shape of a ``config.json``, with random weights.

    They are in float32 on the CPU and in float16 on a GPU, and made when they are first used.

    Raises:
        ValueError: the config describes no model that this package runs.
    """
    model = Model(ModelConfig.from_dict(config | {"parscale_n": 1, "parscale_prefix": False}))
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.float16
    weights = tree_map(
        lambda a: (mx.random.normal(a.shape) * 0.02).astype(dtype), model.parameters()
    )
    model.update(weights)
    return model


def split(model: Model, config: dict[str, Any]) -> tuple[Model, Adapter | None]:
    """A model's backbone, which shares its weights, and its streams if it has any."""
    if not model.args.prefix_length:
        return model, None
    backbone = Model(replace(model.args, streams=1, prefix_length=0))
    _fill(backbone, model, config)
    return backbone, take_streams(model, backbone="", backbone_sha256="")


def mlx_lm_twin(backbone: Model, config: dict[str, Any]) -> nn.Module:
    """mlx-lm's own class over the same weights.

    Raises:
        ValueError: that class has no place for some of the weights.
    """
    args = backbone.args
    theirs: Any = TWINS[args.family]
    twin = theirs.Model(theirs.ModelArgs.from_dict(config | _mlx_lm_fields(args, config)))
    try:
        _fill(twin, backbone, config)
    except ValueError as error:
        raise ValueError(
            f"mlx-lm's own class of {args.family} has other tensors than this model, so there is "
            f"nothing to measure beside it: {one_line(error)}"
        ) from error
    return twin


def _mlx_lm_fields(args: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    # Where config.json leaves them out, or has them in another place, its classes mean others.
    return {
        "model_type": args.family,
        "head_dim": args.head_dim,
        "num_key_value_heads": args.num_key_value_heads,
        "rms_norm_eps": args.rms_norm_eps,
        "max_position_embeddings": args.max_position_embeddings,
        "rope_theta": args.rope.theta,
        "rope_scaling": config.get("rope_scaling") or config.get("rope_parameters"),
        "tie_word_embeddings": args.tie_word_embeddings,
        "attention_bias": args.output_bias,
        "mlp_bias": args.mlp_bias,
        "no_rope_layers": [int(rotated) for rotated in args.rotated_layers],
        "attention_multiplier": args.attention_scale,
        "embedding_multiplier": args.embedding_scale,
        "residual_multiplier": args.residual_scale,
        "logits_scaling": 1 / args.logits_scale,
    }


def random_streams(args: ModelConfig, streams: int) -> Adapter:
    """Streams that have learned nothing, for a backbone: they take as long as others do."""
    shape = (streams, args.num_key_value_heads, PREFIX, args.head_dim)
    weights = {
        f"model.layers.{n}.self_attn.prefix_{part}": mx.random.normal(shape) * 0.02
        for n in range(args.num_hidden_layers)
        for part in "kv"
    }
    aggregator = Aggregator(replace(args, streams=streams))
    for name, value in dict(tree_flatten(aggregator.parameters())).items():
        weights[f"model.aggregator.{name}"] = value
    mx.eval(weights)
    return Adapter(streams, PREFIX, SMOOTH, weights, "", "")


def with_many_streams(backbone: Model, streams: int, adapters: dict[int, Adapter]) -> Model:
    """A model of P streams over a backbone: an adapter's, or where none has so many, random ones.

    Args:
        adapters: by their number of streams.
    """
    if streams == 1:
        return backbone
    adapter = adapters.get(streams) or random_streams(backbone.args, streams)
    return with_streams(backbone, adapter)


def compared_models(
    backbone: Model, config: dict[str, Any], streams: Iterable[int], adapters: dict[int, Adapter]
) -> dict[str, nn.Module]:
    """mlx-lm's own model and ours with each number of streams, all over the same weights.

    Args:
        adapters: streams to use, by their number; where there are none, random ones.
    """
    models = {"mlx-lm": mlx_lm_twin(backbone, config)}
    for p in streams:
        models[f"P={p}"] = with_many_streams(backbone, p, adapters)
    for model in models.values():
        mx.eval(model.parameters())
    return models


def _fill(model: nn.Module, source: Model, config: dict[str, Any]) -> None:
    """Give a model the weights of ``source`` but its streams, quantised where those are."""
    weights = {
        name: value
        for name, value in dict(tree_flatten(source.parameters())).items()
        if not is_stream_tensor(name)
    }
    if quantization := config.get("quantization"):
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=lambda path, _: (
                quantization.get(path, True) if f"{path}.scales" in weights else False
            ),
        )
    model.load_weights(list(weights.items()), strict=True)
