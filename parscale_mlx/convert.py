"""Convert a checkpoint to an MLX folder: types, quantisation, streams for a model without them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

from parscale_mlx import graft
from parscale_mlx.drop_in import add_model_file, check_model_file
from parscale_mlx.finite import check_weights
from parscale_mlx.load import load_model
from parscale_mlx.model import Model
from parscale_mlx.model_folder import dequantized, dtype_name, write_model
from parscale_mlx.quantize import check_quantization, cut_windows, quantize
from parscale_mlx.tokenizer import load_tokenizer

import ml_dtypes  # noqa: F401  numpy knows bfloat16 once this is imported
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters
from parscale_core.checkpoint import hub
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.gguf import reader as gguf
from parscale_core.checkpoint.model_card import write_card
from parscale_core.checkpoint.names import is_prefix
from parscale_core.checkpoint.output import check_output, place, working_folder
from parscale_core.checkpoint.packaged import SMOLLM2
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_core.checkpoint.tokenizer import check_tokens, copy_files
from parscale_core.checkpoint.weight_files import find_safetensors
from parscale_core.convert_settings import DTYPES, LAYOUTS, ConvertSettings, Quantization
from parscale_core.error_text import not_finite, one_line
from parscale_core.progress import progress_bar
from safetensors.numpy import save_file


@dataclass
class Conversion:
    """What came of a conversion, or what would (``dry_run``)."""

    output: str
    parameters: int
    bytes: int
    bits_per_weight: float
    dtype: str
    quantization: dict[str, Any] | None
    streams: int
    prefix_length: int
    base_perplexity: float | None = None
    perplexity: float | None = None
    uploaded_to: str | None = None


@dataclass
class Source:
    """A checkpoint on this machine: a folder, or one GGUF file."""

    path: Path
    is_gguf: bool
    hub_name: str | None


def convert(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    upload_repo: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Conversion:
    """Convert a checkpoint to an MLX folder, or back to a published one.

    mlx-lm itself reads the folder if it has one stream, or with ``with_model_file``.

    Args:
        source: a folder of safetensors or of PyTorch pickles, a GGUF file, or a name on the hub.
        output: the folder to write. It appears whole or not at all.
        revision: a branch, tag or commit of a hub repository.
        upload_repo: a hub repository to upload the result to.
        dry_run: check all that can be checked without computing; write nothing.
        force: replace ``output`` if it is a model folder.
        progress: show progress bars on standard error where that is a terminal.
        settings: the fields of ``ConvertSettings``, such as ``to``, ``quantization`` and
            ``streams``.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError: there is no such source, or it lacks a file that is needed.
        ImportError: the source is a PyTorch pickle and PyTorch is not installed.
        OSError: the disk is full, or the hub does not take the upload.
        ValueError: the source is wrong or a setting does not suit it; the message says which.
    """
    output, asked = Path(output).expanduser(), _checked(ConvertSettings(**settings), dry_run)
    if upload_repo and not dry_run:
        hub.check_login(upload_repo)
    found = find_source(source, revision)
    _check_output(output, found, force)
    if dry_run:
        return _describe(output, *_finished(*_outlined(found, asked), asked))
    with working_folder(output) as work, _naming(found, work / "source"):
        folder = _stage(found, work / "source", asked.dtype, progress)
        model, config, perplexities = _computed(found, folder, asked, progress)
        model, config = _finished(model, config, asked)
        result = _describe(output, model, config, perplexities)
        write_model(work / "model", model, config, to=asked.to, progress=progress)
        copy_files(folder, work / "model")
        if asked.with_model_file:
            add_model_file(work / "model")
        if asked.to == "mlx":
            name = upload_repo or output.name
            write_card(work / "model", name=name, origin=found.path, hub_name=found.hub_name)
        place(work / "model", output, work / "replaced", force=force)
    if upload_repo:
        result.uploaded_to = hub.upload(output, upload_repo)
    return result


def _checked(asked: ConvertSettings, dry_run: bool) -> ConvertSettings:
    if asked.dtype is not None and asked.dtype not in DTYPES:
        raise ValueError(f"dtype {asked.dtype!r} is not one of {', '.join(DTYPES)}")
    if asked.to not in LAYOUTS:
        raise ValueError(f"to {asked.to!r} is not one of {', '.join(LAYOUTS)}")
    if asked.to == "hf" and asked.quantization:
        raise ValueError("MLX's quantisation has no place in a Hugging Face checkpoint")
    if asked.to == "hf" and asked.with_model_file:
        raise ValueError("with_model_file is for mlx-lm, and to 'hf' is not")
    if asked.quantization is None:
        return asked
    if dry_run and asked.quantization.recipe == "dynamic":
        raise ValueError("dry_run: the recipe 'dynamic' only knows sizes once it has computed")
    return replace(asked, quantization=check_quantization(asked.quantization))


def _outlined(source: Source, asked: ConvertSettings) -> tuple[Model, dict[str, Any]]:
    """What would come of it, computing nothing: weights of the right shapes."""
    model, config = _outline(source, _dtype(asked))
    if asked.streams is not None:
        model, config = _graft_blank(model, config, asked.streams, asked.prefix_length)
    if (how := asked.quantization) is not None:
        config = _quantize(source, model, config, replace(how, recipe=None) if how.learns else how)
    return model, config


def _computed(
    source: Source, folder: Path, asked: ConvertSettings, progress: bool
) -> tuple[Model, dict[str, Any], tuple[float, float] | None]:
    """The model with its streams, quantised; and the perplexity before and after grafting."""
    check_weights(find_safetensors(folder).files, _dtype(asked))
    model, config = load_model(folder, lazy=True, dtype=_dtype(asked))
    perplexities = None
    if asked.streams is not None:
        sizes = dict(streams=asked.streams, prefix_length=asked.prefix_length)
        config, perplexities = _graft(folder, model, config, asked.text, progress, **sizes)
    if asked.quantization is not None and asked.quantization.learns:
        model, config = _learn(source, folder, model, config, asked.quantization)
    elif asked.quantization is not None:
        config = _quantize(source, model, config, asked.quantization)
    return model, config, perplexities


def _finished(
    model: Model, config: dict[str, Any], asked: ConvertSettings
) -> tuple[Model, dict[str, Any]]:
    if asked.to == "hf":
        model, config = dequantized(model, config)
    if asked.with_model_file:
        check_model_file(config)
    return model, config


def _dtype(asked: ConvertSettings) -> mx.Dtype | None:
    return getattr(mx, asked.dtype) if asked.dtype else None


def find_source(source: str | Path, revision: str | None = None) -> Source:
    """The checkpoint that a path or a hub name means, downloaded if need be.

    Raises:
        FileNotFoundError: it is neither a path nor a name on the hub.
        ValueError: it is a file of another kind, or a folder of several GGUF files.
    """
    path = Path(source).expanduser()
    if file := gguf.find_gguf(path):
        return Source(file, is_gguf=True, hub_name=None)
    hub_name = None if path.exists() or str(source) == SMOLLM2 else str(source)
    return Source(find_folder(source, revision=revision), is_gguf=False, hub_name=hub_name)


def _check_output(output: Path, source: Source, force: bool) -> None:
    check_output(output, force=force)
    if output.exists() and source.path.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{output} holds the source; it cannot be replaced by what comes of it")


@contextmanager
def _naming(source: Source, staged: Path) -> Iterator[None]:
    # The user knows nothing of the folder that a pickle or a GGUF file was unpacked into.
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if str(staged) not in str(error):
            raise
        raise type(error)(str(error).replace(str(staged), str(source.path))) from error


def _stage(source: Source, staged: Path, dtype: str | None, progress: bool) -> Path:
    """A folder whose weights are safetensors, which MLX can leave on disk until they are used."""
    if source.is_gguf:
        file = gguf.open_gguf(source.path)
        stored = np.dtype(dtype) if dtype else gguf.stored_type(file)
        size = sum(prod(shape) for shape in gguf.tensor_shapes(file).values()) * stored.itemsize
        with progress_bar("Reading", size, "B", progress) as bar:
            gguf.unpack_gguf(file, staged, dtype=stored, on_bytes=bar.update)
        return staged
    checkpoint = Checkpoint(source.path)
    if not checkpoint.is_pickled:
        return source.path
    _stage_pickles(checkpoint, staged, progress)
    return staged


def _stage_pickles(checkpoint: Checkpoint, staged: Path, progress: bool) -> None:
    staged.mkdir()
    (staged / "config.json").write_text(json.dumps(checkpoint.config.raw), encoding="utf-8")
    copy_files(checkpoint.folder, staged)
    files = sorted({stored.file for stored in checkpoint.stored.values()})
    places: dict[str, str] = {}
    with progress_bar("Reading", len(files), "file", progress) as bar:
        for n, file in enumerate(files):
            names = [name for name, stored in checkpoint.stored.items() if stored.file == file]
            places |= dict.fromkeys(names, f"model-{n:05d}.safetensors")
            tensors = {name: checkpoint.read(name) for name in names}
            save_file(tensors, staged / f"model-{n:05d}.safetensors")
            bar.update()
    index = json.dumps({"metadata": {}, "weight_map": places})
    (staged / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _outline(source: Source, dtype: mx.Dtype | None) -> tuple[Model, dict[str, Any]]:
    """The model with weights that are not read, or are only zeros of their shapes."""
    if source.is_gguf:
        file = gguf.open_gguf(source.path)
        config = ModelConfig.from_dict(gguf.read_config(file))
        stored = getattr(mx, gguf.stored_type(file).name)
        shapes = gguf.tensor_shapes(file)
        weights = {name: mx.zeros(shape, dtype or stored) for name, shape in shapes.items()}
    else:
        checkpoint = Checkpoint(source.path)
        if not checkpoint.is_pickled:
            return load_model(source.path, lazy=True, dtype=dtype)
        config = checkpoint.config
        weights = {
            name: mx.zeros(
                checkpoint.shape(name), dtype or getattr(mx, checkpoint.stored[name].dtype)
            )
            for name in checkpoint.names()
        }
    model = Model(config)
    try:
        model.load_weights(list(weights.items()))
    except ValueError as error:
        raise ValueError(f"{source.path}: {one_line(error)}") from error
    return model, config.raw


def _graft(
    folder: Path,
    model: Model,
    config: dict[str, Any],
    text: str | None,
    progress: bool,
    **sizes: int,
) -> tuple[dict[str, Any], tuple[float, float]]:
    """Graft streams onto ``model``; its new configuration, and the perplexity before and after."""
    config = graft.grafted_config(config, **sizes)
    tokenizer = load_tokenizer(folder, config)
    text = graft.default_text() if text is None else text
    pieces = graft.cut_pieces(tokenizer, text, **sizes)
    for part in (pieces.prefixes, pieces.held_out):
        check_tokens(map(int, np.array(part).flat), model.args.vocab_size)
    # The model to be written stays on disk, in its own type; this one is there to compute.
    runner, _ = load_model(folder)
    with progress_bar("Grafting", 2 * len(pieces.held_out), "window", progress) as bar:
        before = graft.perplexity(runner, pieces.held_out, bar.update)
        prefixes = graft.make_prefixes(runner, pieces.prefixes)
        graft.graft(runner, config, prefixes)
        after = graft.perplexity(runner, pieces.held_out, bar.update)
        if not isfinite(before + after):
            raise ArithmeticError(not_finite(f"{folder}: the logits have"))
    graft.graft(model, config, prefixes)
    return config, (before, after)


def _graft_blank(
    model: Model, config: dict[str, Any], streams: int, prefix_length: int
) -> tuple[Model, dict[str, Any]]:
    config = graft.grafted_config(config, streams=streams, prefix_length=prefix_length)
    args = ModelConfig.from_dict(config)
    zeros = mx.zeros((streams, args.num_key_value_heads, prefix_length, args.head_dim))
    graft.graft(model, config, [(zeros, zeros)] * args.num_hidden_layers)
    return model, config


def _quantize(
    source: Source, model: Model, config: dict[str, Any], how: Quantization, **learning: Any
) -> dict[str, Any]:
    if "quantization" in config or "quantization_config" in config:
        raise ValueError(f"{source.path}: quantised already")
    try:
        return quantize(model, config, how, **learning)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _learn(
    source: Source, folder: Path, model: Model, config: dict[str, Any], how: Quantization
) -> tuple[Model, dict[str, Any]]:
    """Quantise a copy of ``model`` that is in memory, beside the full one that it learns from."""
    tokenizer = load_tokenizer(folder, config)
    text = graft.default_text() if how.text is None else how.text
    windows = cut_windows(tokenizer, text, how.windows)
    teacher, _ = load_model(folder)
    if model.args.streams > teacher.args.streams:
        layers = [layer.self_attn for layer in model.layers]
        graft.graft(teacher, config, [(layer.prefix_k, layer.prefix_v) for layer in layers])
    student = deepcopy(teacher)
    config = _quantize(source, student, config, how, teacher=teacher, windows=windows)
    student.set_dtype(model.model.norm.weight.dtype)
    return student, config


def _describe(
    output: Path,
    model: Model,
    config: dict[str, Any],
    perplexities: tuple[float, float] | None = None,
) -> Conversion:
    weights = dict(tree_flatten(model.parameters()))
    prefixes = [a for name, a in weights.items() if is_prefix(name)]
    # mlx-lm counts the parameters of layers; the prefixes belong to none.
    parameters = get_total_parameters(model) + sum(a.size for a in prefixes)
    size = sum(a.nbytes for a in weights.values())
    before, after = perplexities or (None, None)
    return Conversion(
        output=str(output),
        parameters=parameters,
        bytes=size,
        bits_per_weight=size * 8 / parameters,
        dtype=dtype_name(model),
        quantization=config.get("quantization"),
        streams=model.args.streams,
        prefix_length=model.args.prefix_length if prefixes else 0,
        base_perplexity=before,
        perplexity=after,
    )
