"""Stream adapters: the prefixes and the aggregator of P streams, apart from their backbone.

A backbone with one stream and an adapter make a model with P streams. Both share the backbone's
arrays, so that models of several P live over one backbone in memory.
"""

import hashlib
import json
import re
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parscale_mlx import checkpoint
from parscale_mlx.graft import MODEL_TYPES
from parscale_mlx.model import MAX_STREAMS, Aggregator, Model, ModelArgs
from parscale_mlx.output import check_output, place, working_folder

import mlx.core as mx
from mlx.utils import tree_flatten

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
TYPE = "parscale_streams"
SAMPLE = 4096  # bytes of a tensor's beginning, and of its end, that a fingerprint takes in
PREFIX = re.compile(r"model\.layers\.(\d+)\.self_attn\.prefix_([kv])")
NOT_BACKBONE = ("prefix_k", "prefix_v", "aggregator", "aggregate_layer")


@dataclass
class Adapter:
    """P streams without their backbone.

    Attributes:
        weights: ``model.layers.N.self_attn.prefix_k`` and ``prefix_v``, [P, kv_heads,
            prefix_tokens, head_dim], and ``model.aggregator.fc1`` and ``fc2``, whose ``weight``
            columns run (stream, hidden).
        backbone: the name of the backbone's folder.
        backbone_sha256: the backbone's ``fingerprint``.
    """

    streams: int
    prefix_tokens: int
    smooth: float
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
    folder = Path(folder).expanduser()
    adapter = read_adapter_config(folder)
    if backbone is not None and fingerprint(Path(backbone)) != adapter.backbone_sha256:
        raise ValueError(
            f"{folder}: this adapter belongs to another backbone ({adapter.backbone}), or to "
            f"other weights of it than those in {backbone}"
        )
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} in this folder")
    try:
        loaded: Any = mx.load(str(file))
    except RuntimeError as error:
        raise ValueError(f"{file}: not a whole safetensors file") from error
    adapter.weights = loaded
    _check_weights(file, adapter)
    return adapter


def read_adapter_config(folder: Path) -> Adapter:
    """What an adapter folder says of itself, without its weights.

    Raises:
        FileNotFoundError, ValueError: as ``load_adapter``.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG} in this folder; not a stream adapter")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON") from error
    if not isinstance(config, dict) or config.get("adapter_type") != TYPE:
        raise ValueError(f"{file}: not a stream adapter (adapter_type is not {TYPE!r})")
    try:
        streams, tokens = config["parscale_n"], config["parscale_n_tokens"]
        smooth, backbone = config["parscale_attn_smooth"], config["backbone"]
        adapter = Adapter(streams, tokens, smooth, {}, backbone["name"], backbone["sha256"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: no {error} in it, or something else in its place") from error
    if not isinstance(streams, int) or not 2 <= streams <= MAX_STREAMS:
        raise ValueError(f"{file}: parscale_n {streams!r} is not a number from 2 to {MAX_STREAMS}")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"{file}: parscale_n_tokens {tokens!r} is not at least 1")
    if not isinstance(smooth, int | float) or not 0 <= smooth <= 1:
        raise ValueError(f"{file}: parscale_attn_smooth {smooth!r} is not from 0 to 1")
    return adapter


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
    config = {
        "adapter_type": TYPE,
        "parscale_n": adapter.streams,
        "parscale_n_tokens": adapter.prefix_tokens,
        "parscale_attn_smooth": adapter.smooth,
        "backbone": {"name": adapter.backbone, "sha256": adapter.backbone_sha256},
    }
    with working_folder(output) as work:
        new = work / "adapter"
        new.mkdir()
        (new / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
        try:
            mx.save_safetensors(str(new / WEIGHTS), adapter.weights, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise OSError(f"{output}: cannot be written: {error}") from error
        place(new, output, work / "replaced", force=force)


def fingerprint(folder: Path) -> str:
    """A hash that tells a backbone's weights from any other's without reading all of them.

    It is the SHA-256 of each tensor's name, type and shape, and of its first and last bytes, with
    the tensors sorted by name. Streams do not count: a model is told by its backbone.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: they are pickles, or a file is damaged.
    """
    checkpoint.check_files(folder)
    if checkpoint.pickle_files(folder):
        raise ValueError(f"{folder}: an adapter's backbone must be safetensors; convert it first")
    return digest(checkpoint.safetensors_files(folder), leave_out=NOT_BACKBONE)


def digest(files: list[Path], *, leave_out: tuple[str, ...] = ()) -> str:
    """The ``fingerprint`` of safetensors files, but for the tensors with one of these names."""
    tensors = {}
    for file in files:
        for name, entry in checkpoint.read_header(file).items():
            if not any(part in name for part in leave_out):
                tensors[name] = (file, *entry)
    sha = hashlib.sha256()
    for name, (file, dtype, shape, start, size) in sorted(tensors.items()):
        sha.update(f"{name} {dtype} {json.dumps(shape)}\n".encode())
        with file.open("rb") as stream:
            stream.seek(start)
            sha.update(stream.read(min(SAMPLE, size)))
            rest = max(SAMPLE, size - SAMPLE)
            stream.seek(start + rest)
            sha.update(stream.read(max(0, size - rest)))
    return sha.hexdigest()


def with_streams(backbone: Model, adapter: Adapter) -> Model:
    """A model of ``adapter``'s P streams that shares every weight with ``backbone``.

    The backbone stays as it is, so several adapters can be in use over one of them. The streams
    take the backbone's type.

    Raises:
        ValueError: the backbone has streams of its own, or other sizes than the adapter's.
    """
    if backbone.args.parscale_n > 1:
        raise ValueError(f"the backbone has {backbone.args.parscale_n} streams of its own")
    args = _args(backbone.args, adapter)
    aggregator = Aggregator(args)
    expected = {
        f"model.aggregator.{name}": value.shape
        for name, value in dict(tree_flatten(aggregator.parameters())).items()
    }
    prefix = (args.parscale_n, args.num_key_value_heads, args.parscale_n_tokens, args.head_dim)
    for n in range(args.num_hidden_layers):
        for part in "kv":
            expected[f"model.layers.{n}.self_attn.prefix_{part}"] = prefix
    _check_shapes(adapter.weights, expected)

    model = _shallow(backbone)
    model.args, model.model_type = args, args.model_type
    model.model = _shallow(backbone.model)
    model.model.n_streams = args.parscale_n
    model.model.aggregator = aggregator
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
        streams=model.args.parscale_n,
        prefix_tokens=model.args.parscale_n_tokens,
        smooth=model.args.parscale_attn_smooth,
        weights={
            name: value
            for name, value in dict(tree_flatten(model.parameters())).items()
            if is_stream_parameter(name)
        },
        backbone=backbone,
        backbone_sha256=backbone_sha256,
    )


def is_stream_parameter(name: str) -> bool:
    """Whether a parameter of a ``Model`` belongs to its streams, not to its backbone."""
    return is_prefix(name) or ".aggregator." in name


def is_prefix(name: str) -> bool:
    """Whether a tensor, of a ``Model`` or a file, is a layer's prefix of keys or values."""
    return name.endswith((".prefix_k", ".prefix_v"))


def _shallow(module: Any) -> Any:
    # A module is a dictionary of its arrays and children: a copy shares all of them.
    twin = copy(module)
    twin._no_grad = set(module._no_grad)
    return twin


def _args(args: ModelArgs, adapter: Adapter) -> ModelArgs:
    return replace(
        args,
        model_type=MODEL_TYPES[args.model_type.removesuffix("_parscale")],
        parscale_n=adapter.streams,
        parscale_n_tokens=adapter.prefix_tokens,
        parscale_attn_smooth=adapter.smooth,
    )


def _check_weights(file: Path, adapter: Adapter) -> None:
    aggregator = {f"model.aggregator.fc{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    for name, value in adapter.weights.items():
        if name in aggregator:
            continue
        if not PREFIX.fullmatch(name):
            raise ValueError(f"{file}: {name} is no part of a stream adapter")
        shape = value.shape
        if len(shape) != 4 or (shape[0], shape[2]) != (adapter.streams, adapter.prefix_tokens):
            raise ValueError(
                f"{file}: {CONFIG} says {adapter.streams} streams of {adapter.prefix_tokens} "
                f"tokens, but {name} has shape {list(shape)}"
            )
    for name in sorted(aggregator):
        if name not in adapter.weights:
            raise ValueError(f"{file}: no {name} in it")


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
