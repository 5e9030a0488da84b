"""The model that a run starts from, with what it trains unfrozen and the rest frozen."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from parscale_mlx.adapter import load_adapter, with_streams
from parscale_mlx.graft import graft, grafted_config, make_prefixes
from parscale_mlx.load import load_model
from parscale_mlx.model import Model
from parscale_mlx.training.documents import Document
from parscale_mlx.training.prefix_encoder import (
    NAME,
    PrefixEncoder,
    instead_of_prefixes,
    take_prefixes,
)

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from parscale_core.checkpoint.adapter import fingerprint
from parscale_core.checkpoint.config import read_config
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.names import is_stream_tensor
from parscale_core.train_settings import TrainSettings


@dataclass
class Start:
    """A model ready to be trained.

    Attributes:
        config: its ``config.json``.
        folder: where its tokenizer is.
        backbone_sha256: the backbone's fingerprint, where only streams are trained.
        encoder: makes the prefixes, where it is trained in their place; the model always holds
            what it makes.
    """

    model: Model
    config: dict[str, Any]
    folder: Path
    backbone_sha256: str | None = None
    encoder: PrefixEncoder | None = None

    def weights(self) -> Any:
        """What is trained, a tree."""
        weights = self.model.trainable_parameters()
        if self.encoder is None:
            return weights
        return instead_of_prefixes(weights, self.encoder.trainable_parameters())

    def update(self, weights: Any) -> None:
        """Put other values of ``weights`` in place."""
        others = {name: value for name, value in weights.items() if name != NAME}
        self.model.update(others)
        if self.encoder is not None:
            self.encoder.update(weights[NAME])
            self.encoder.fold(self.model)

    def gradients(self, gradients: Any) -> Any:
        """Those of ``weights``, from those of the model's trainable parameters."""
        if self.encoder is None:
            return gradients
        return instead_of_prefixes(gradients, self.encoder.gradients(take_prefixes(gradients)))


def start_folder(settings: TrainSettings) -> Path:
    """The folder of the model, or of the configuration, that a run starts from.

    Raises:
        FileNotFoundError, ValueError: there is none, or the sequences are longer than the model's.
    """
    folder = find_folder(settings.model or settings.config or "")
    longest = read_config(folder).max_position_embeddings
    if settings.seq_length > longest:
        raise ValueError(
            f"seq_length={settings.seq_length} is more than the model's "
            f"max_position_embeddings {longest} ({folder / 'config.json'})"
        )
    return folder


def make_start(settings: TrainSettings, folder: Path, documents: list[Document]) -> Start:
    """Build or load the model; the global random state is set from the run's seed.

    Args:
        folder: from ``start_folder``.
        documents: what grafted prefixes are made from.

    Raises:
        FileNotFoundError, ValueError: the model or adapter is none, or does not suit the stage.
    """
    mx.random.seed(settings.seed)
    if settings.config is not None:
        return _from_nothing(folder, settings)
    dtype = getattr(mx, settings.dtype) if settings.trains_backbone else None
    sha256 = None if settings.trains_backbone else fingerprint(folder)
    model, config = load_model(folder, dtype=dtype)
    if settings.trains_backbone and "quantization" in config:
        raise ValueError(f"{folder}: quantised weights cannot be trained, only streams over them")
    if settings.adapter is not None:
        adapter = load_adapter(settings.adapter, backbone=folder)
        sizes = dict(streams=adapter.streams, prefix_length=adapter.prefix_length)
        config = grafted_config(config, **sizes) | {"parscale_attn_smooth": adapter.smoothing}
        model = with_streams(model, adapter)
    elif settings.streams is not None:
        config = _graft(settings, model, config, documents)
    elif settings.stage == "streams" and not model.args.prefix_length:
        raise ValueError(f"{folder}: this model has no streams; say how many (`streams`)")
    if not settings.trains_backbone:
        train_streams_only(model, getattr(mx, settings.dtype))
    encoder = None
    if settings.prefix_projection:
        encoder = PrefixEncoder(model, settings.encoder_hidden_size or model.args.hidden_size)
        mx.eval(encoder.parameters())
    mx.eval(model.parameters())
    return Start(model, config, folder, sha256, encoder)


def _from_nothing(folder: Path, settings: TrainSettings) -> Start:
    model = Model(read_config(folder))
    config = model.args.raw
    scale = config.get("initializer_range", 0.02)
    # The residual stream is a sum over all layers: what adds to it starts smaller (GPT-2).
    residual = scale / sqrt(2 * model.args.num_hidden_layers)

    def initial(name: str, weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return mx.zeros_like(weight) if name.endswith("bias") else mx.ones_like(weight)
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        return mx.random.normal(weight.shape, scale=residual if adds else scale)

    model.update(tree_map_with_path(initial, model.parameters()))
    model.set_dtype(getattr(mx, settings.dtype))
    mx.eval(model.parameters())
    return Start(model, config, folder)


def _graft(
    settings: TrainSettings, model: Model, config: dict[str, Any], documents: list[Document]
) -> dict[str, Any]:
    """Give a plain model streams, in place; its new configuration."""
    streams, tokens = settings.streams or 1, settings.prefix_length
    config = grafted_config(config | {"parscale_attn_smooth": settings.smoothing}, streams=streams,
                            prefix_length=tokens)  # fmt: skip
    if settings.init == "text":
        prefixes = make_prefixes(model, _pieces(settings, documents))
    else:
        args, scale = model.args, config.get("initializer_range", 0.02)
        shape = (streams, args.num_key_value_heads, tokens, args.head_dim)
        prefixes = [
            (mx.random.normal(shape, scale=scale), mx.random.normal(shape, scale=scale))
            for _ in model.layers
        ]
    graft(model, config, prefixes)
    return config


def _pieces(settings: TrainSettings, documents: list[Document]) -> mx.array:
    """A piece of the training text for each stream, [P, prefix_length]."""
    text = np.concatenate([d.tokens for d in documents])
    room = len(text) - settings.prefix_length
    if room < 0:
        raise ValueError(
            f"the training data has {len(text)} tokens, fewer than "
            f"prefix_length={settings.prefix_length}"
        )
    starts = np.random.default_rng(settings.seed).integers(0, room + 1, settings.streams)
    return mx.array(np.stack([text[n : n + settings.prefix_length] for n in starts]))


def train_streams_only(model: Model, dtype: mx.Dtype) -> None:
    model.freeze()
    for layer in model.layers:
        layer.self_attn.unfreeze(recurse=False, keys=["prefix_k", "prefix_v"])
    if model.args.streams > 1:
        model.model.aggregator.unfreeze()
    streams = dict(tree_flatten(model.trainable_parameters())).items()
    assert all(is_stream_tensor(name) for name, _ in streams)
    model.load_weights([(name, value.astype(dtype)) for name, value in streams], strict=False)
