"""Stream adapters in MLX: load and save them, and put them over a backbone.

A backbone with one stream and an adapter make a model with P streams. Both share the backbone's
arrays, so that models of several P live over one backbone in memory.
"""

from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parscale_mlx.model import Aggregator, Model

import mlx.core as mx
from mlx.utils import tree_flatten
from parscale_core.checkpoint.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterFolder,
    read_adapter,
    write_adapter_config,
)
from parscale_core.checkpoint.config import ModelConfig, tensor_shapes
from parscale_core.checkpoint.names import STREAM_TENSOR, is_prefix, is_stream_tensor
from parscale_core.checkpoint.output import check_output, place, working_folder


@dataclass
class Adapter:
    """P streams without their backbone.

    Attributes:
        weights: ``model.layers.N.self_attn.prefix_k`` and ``prefix_v``, [P, kv_heads,
            prefix_length, head_dim], and ``model.aggregator.fc1`` and ``fc2``, whose ``weight``
            columns run (stream, hidden).
        backbone: the name of the backbone's folder.
        backbone_sha256: the backbone's ``fingerprint``.
    """

    streams: int
    prefix_length: int
    smoothing: float
    weights: dict[str, mx.array]
    backbone: str
    backbone_sha256: str


def load_adapter(folder: str | Path, *, backbone: str | Path | None = None) -> Adapter:
    """Read an adapter folder.

    Args:
        backbone: the folder of the backbone that it is for, to check that it is this one.

    Raises:
        FileNotFoundError: there is no such folder, or no adapter in it.
        ValueError: what is there is not a stream adapter, is damaged, or is for another backbone.
    """
    found = read_adapter(folder)
    if backbone is not None:
        found.check_backbone(Path(backbone))
    try:
        weights: Any = mx.load(str(found.weights))
    except RuntimeError as error:
        raise ValueError(f"{found.weights}: not a whole safetensors file") from error
    _check_weights(found, weights)
    return Adapter(
        streams=found.streams,
        prefix_length=found.prefix_length,
        smoothing=found.smoothing,
        weights=weights,
        backbone=found.backbone,
        backbone_sha256=found.backbone_sha256,
    )


def save_adapter(folder: str | Path, adapter: Adapter, *, force: bool = False) -> None:
    """Write an adapter folder, whole or not at all.

    Args:
        force: replace ``folder`` if it is an adapter folder.

    Raises:
        FileExistsError: ``folder`` exists.
        OSError: it cannot be written.
    """
    output = Path(folder).expanduser()
    check_output(output, force=force, marker=CONFIG)
    with working_folder(output) as work:
        new = work / "adapter"
        new.mkdir()
        write_adapter_config(
            new,
            streams=adapter.streams,
            prefix_length=adapter.prefix_length,
            smoothing=adapter.smoothing,
            backbone=adapter.backbone,
            backbone_sha256=adapter.backbone_sha256,
        )
        try:
            mx.save_safetensors(str(new / WEIGHTS), adapter.weights, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise OSError(f"{output}: cannot be written: {error}") from error
        place(new, output, work / "replaced", force=force)


def with_streams(backbone: Model, adapter: Adapter) -> Model:
    """A model of ``adapter``'s P streams that shares every weight with ``backbone``.

    The backbone stays as it is, so several adapters can be in use over one of them. The streams
    take the backbone's type.

    Raises:
        ValueError: the backbone has streams of its own, or other sizes than the adapter's.
    """
    if backbone.args.prefix_length:
        own = f"{backbone.args.streams} stream{'s' * (backbone.args.streams > 1)}"
        raise ValueError(f"the backbone has {own} of its own")
    args = _args(backbone.args, adapter)
    shapes = tensor_shapes(args)
    _check_shapes(adapter.weights, {k: v for k, v in shapes.items() if is_stream_tensor(k)})

    model = _shallow(backbone)
    model.args, model.model_type = args, args.model_type
    model.model = _shallow(backbone.model)
    model.model.n_streams = args.streams
    if args.streams > 1:
        model.model.aggregator = Aggregator(args)
    model.model.layers = [_shallow(layer) for layer in backbone.layers]
    for layer in model.layers:
        layer.self_attn = _shallow(layer.self_attn)
        layer.self_attn.prefix_k = layer.self_attn.prefix_v = mx.array(0.0)
    dtype = backbone.model.norm.weight.dtype
    weights = [(name, value.astype(dtype)) for name, value in adapter.weights.items()]
    model.load_weights(weights, strict=False)
    return model


def take_streams(model: Model, *, backbone: str, backbone_sha256: str) -> Adapter:
    """The adapter in a model with streams, to be saved: its prefixes and its aggregator."""
    return Adapter(
        streams=model.args.streams,
        prefix_length=model.args.prefix_length,
        smoothing=model.args.smoothing,
        weights={
            name: value
            for name, value in dict(tree_flatten(model.parameters())).items()
            if is_stream_tensor(name)
        },
        backbone=backbone,
        backbone_sha256=backbone_sha256,
    )


def _shallow(module: Any) -> Any:
    # A module is a dictionary of its arrays and children: a copy shares all of them.
    twin = copy(module)
    twin._no_grad = set(module._no_grad)
    return twin


def _args(args: ModelConfig, adapter: Adapter) -> ModelConfig:
    return replace(
        args,
        model_type=f"{args.family}_parscale",
        streams=adapter.streams,
        prefix_length=adapter.prefix_length,
        smoothing=adapter.smoothing,
    )


def _check_weights(adapter: AdapterFolder, weights: dict[str, mx.array]) -> None:
    file = adapter.weights
    for name, value in weights.items():
        if not STREAM_TENSOR.fullmatch(name):
            raise ValueError(f"{file}: {name} is no part of a stream adapter")
        shape = value.shape
        sizes = (adapter.streams, adapter.prefix_length)
        if is_prefix(name) and (len(shape) != 4 or (shape[0], shape[2]) != sizes):
            raise ValueError(
                f"{file}: {CONFIG} says {adapter.streams} streams of {adapter.prefix_length} "
                f"tokens, but {name} has shape {list(shape)}"
            )
    for n in (1, 2) if adapter.streams > 1 else ():
        for part in ("weight", "bias"):
            if f"model.aggregator.fc{n}.{part}" not in weights:
                raise ValueError(f"{file}: no model.aggregator.fc{n}.{part} in it")


def _check_shapes(weights: dict[str, mx.array], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"the adapter does not suit the backbone: it holds no {name}")
        if weights[name].shape != shape:
            raise ValueError(
                f"the adapter does not suit the backbone: {name} has shape "
                f"{list(weights[name].shape)}, not {list(shape)}"
            )
    for name in weights:
        if name not in expected:
            raise ValueError(
                f"the adapter does not suit the backbone, which has no place for {name}"
            )
