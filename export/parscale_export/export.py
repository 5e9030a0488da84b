"""Write a model folder as an ONNX folder: graph, external data, configuration and tokenizer."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from parscale_core.checkpoint.adapter import (
    AdapterFolder,
    adapter_folders,
    fingerprint,
    read_adapter,
)
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.output import EXPORT, check_output, place, working_folder
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_core.export_settings import BLOCK_SIZE, CHOICES, PRESETS, ExportSettings
from parscale_core.file_hash import sha256

from parscale_export import targets
from parscale_export.builder import Options, folded_heads
from parscale_export.calibrate import calibration_tokens, observe
from parscale_export.fused import MAX_CUDA_HEADS
from parscale_export.graph import build
from parscale_export.runtime.hashes import PREFIX
from parscale_export.runtime.session import step_file
from parscale_export.smooth import Progress, Smoothing, plan
from parscale_export.weights import BITS, FLOATS

LARGE = 1024  # bytes; a larger tensor is kept beside its graph


def export_onnx(
    source: str | Path,
    output: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Path:
    """Export a ParScale, Qwen2 or Llama model folder to ONNX.

    Args:
        source: a published or converted model folder, or a name on the hub.
        output: the folder to make; it appears whole or not at all.
        adapters: folders of stream adapters over the model: besides model.onnx, each gets a graph
            model_pP.onnx over the same weights, its own prefixes and aggregator in a small file.
            With none, those that came with the model, in its folder ``adapters``, are taken where
            the target reads several graphs.
        force: replace an existing export.
        progress: called with what is done ("calibrating", "smoothing", "writing"), how many runs,
            products or tensors of it are done, and their total.
        settings: the fields of ``ExportSettings``, such as ``target``, ``precision`` and
            ``all_logits``.

    Returns:
        The output folder's path.

    Raises:
        FileNotFoundError, ImportError: see ``Checkpoint``.
        FileExistsError: the output exists.
        ValueError: the source is not a model that can be exported, an adapter is not for it, or
            settings that do not go together.
    """
    asked = ExportSettings(**settings)
    options, target = choose_options(asked), asked.target
    output = Path(output)
    check_output(output, force=force, marker=EXPORT)
    checkpoint = Checkpoint(source)
    if output.resolve() in (checkpoint.folder.resolve(), *checkpoint.folder.resolve().parents):
        raise ValueError(f"{output}: the model to export is in there")
    checkpoints = [checkpoint, *_with_adapters(checkpoint.folder, adapters, target)]
    if asked.calibrate is not None and options.precision != "w8a8":
        raise ValueError(f"calibrate is for precision w8a8, and this is {options.precision}")
    _check_model(checkpoint.config, options, checkpoint.folder, target)
    longest = max(c.config.prefix_length for c in checkpoints)
    options = replace(options, longest_prefix=longest)
    chunks = []
    if options.precision == "w8a8":
        chunks = calibration_tokens(checkpoint, Path(asked.calibrate) if asked.calibrate else None)
    with working_folder(output) as work:
        smoothing = None
        if chunks:
            how = plan(checkpoint, observe(checkpoint, chunks, work, progress), progress)
            smoothing = how.smoothing
            options = replace(options, kept=how.kept, rotated=how.rotated)
        graph, data = targets.file_names(target, options)
        folder = work / "export"
        (folder / graph).parent.mkdir(parents=True)
        steps = target == "cuda" and options.ops == "fused"
        _write_models(checkpoints, options, smoothing, folder / graph, data, progress, steps=steps)
        targets.write_side_files(checkpoint.folder, folder, checkpoint.config, options, target)
        place(folder, output, work / "replaced", force=force)
    return output


def _with_adapters(
    folder: Path, adapters: Sequence[str | Path], target: str | None
) -> list[Checkpoint]:
    """The checkpoint in a folder once more for each adapter over it."""
    one_graph = target in targets.ONE_GRAPH
    folders = adapter_folders(folder, adapters) if adapters or not one_graph else []
    if not folders:
        return []
    if one_graph:
        raise ValueError(
            f"target {target} reads one graph a folder, so it takes no adapters; fuse each with "
            "the model, and export the results"
        )
    own, found = fingerprint(folder), dict[int, AdapterFolder]()
    for path in folders:
        adapter = read_adapter(path)
        adapter.check_backbone(folder, own)
        if adapter.streams == 1:
            raise ValueError(
                f"{path}: a prefix for one stream, and P=1 is the model without it here; fuse the "
                "two, and export the result"
            )
        if adapter.streams in found:
            raise ValueError(
                f"{path} and {found[adapter.streams].folder} both have P={adapter.streams}"
            )
        found[adapter.streams] = adapter
    return [Checkpoint(folder, found[streams]) for streams in sorted(found)]


def choose_options(asked: ExportSettings) -> Options:
    """Fill in what was not given, and check that it goes together.

    Raises:
        ValueError: an unknown choice, or a combination that no graph can be built for.
    """
    for name, choices in CHOICES.items():
        given = getattr(asked, name)
        if given is not None and given not in choices:
            raise ValueError(f"{name} {given!r} is not one of {', '.join(map(str, choices))}")
    target, preset = asked.target, PRESETS[asked.target]
    kv_layout, ops = asked.kv_layout or preset["kv_layout"], asked.ops or preset["ops"]
    precision = asked.precision or preset["precision"]
    activations = asked.activations or (
        precision if precision in FLOATS else preset.get("activations", "fp32")
    )
    # A head has one row for all streams, which MatMulNBits does best; and it is sensitive.
    head_precision = asked.head_precision or (
        "int8" if precision in ("int4", "w8a8") else precision
    )
    embedding_precision = asked.embedding_precision or _embedding(
        head_precision, activations, target
    )
    aggregator_precision = asked.aggregator_precision or (
        "w8a8" if precision == "w8a8" else activations
    )
    block_size = preset.get("block_size", BLOCK_SIZE)
    if asked.block_size is not None:
        block_size = asked.block_size
    options = Options(
        kv_layout=kv_layout,
        ops=ops,
        precision=precision,
        activations=activations,
        head_precision=head_precision,
        embedding_precision=embedding_precision,
        aggregator_precision=aggregator_precision,
        block_size=block_size,
        symmetric=target in targets.CUDA,
        accuracy_level=asked.accuracy_level,
        all_logits=asked.all_logits,
        aggregation_weights=asked.aggregation_weights,
    )
    for name in ("precision", "head_precision", "embedding_precision", "aggregator_precision"):
        value = getattr(options, name)
        if value in FLOATS and value != activations:
            raise ValueError(f"{name} {value} does not go with activations {activations}")
    if target in targets.CUDA and "w8a8" in (precision, head_precision, aggregator_precision):
        raise ValueError(
            f"w8a8 is for CPUs: target {target} takes the precisions fp16, bf16, int8 and int4"
        )
    if activations == "bf16" and "w8a8" in (precision, head_precision, aggregator_precision):
        raise ValueError("w8a8 is for CPUs, which have no bfloat16: use activations fp32 or fp16")
    if target in targets.ONE_GRAPH and kv_layout != "heads":
        raise ValueError(f"target {target} needs kv_layout heads: it has no notion of streams")
    if target in targets.GENAI and ops != "fused":
        raise ValueError(f"target {target} needs ops fused: past and present share a buffer there")
    if target in targets.CUDA and (ops, activations) == ("fused", "fp32"):
        raise ValueError(
            f"target {target} with ops fused needs activations fp16 or bf16: GroupQueryAttention "
            "on CUDA has no float32"
        )
    quantised = any(p in BITS for p in (precision, head_precision, aggregator_precision))
    if ops == "standard" and activations == "bf16" and quantised:
        raise ValueError(
            "int8 and int4 with activations bf16 need ops fused: no runtime has DequantizeLinear "
            "in blocks for bfloat16"
        )
    if ops == "standard" and embedding_precision == "int4":
        raise ValueError("embedding_precision int4 needs ops fused; int8 does not")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size} is not a power of two from 16")
    return options


def _embedding(head_precision: str, activations: str, target: str | None) -> str:
    """The embedding's precision by default: a tied head reads the same bytes."""
    # CUDA's GatherBlockQuantized takes rows for whole blocks, and nobody has run it yet.
    return activations if head_precision in FLOATS or target in targets.CUDA else "int8"


def _check_model(config: ModelConfig, options: Options, folder: Path, target: str | None) -> None:
    if options.ops == "fused" and config.head_dim % 16:
        raise ValueError(
            f"{folder / 'config.json'}: head_dim {config.head_dim} is not a multiple of 16, which "
            "GroupQueryAttention needs; use `ops=standard`"
        )
    heads, _, _ = folded_heads(config, options.kv_layout)
    if target in targets.CUDA and options.ops == "fused" and heads > MAX_CUDA_HEADS:
        raise ValueError(
            f"{folder / 'config.json'}: {heads} heads in a row are more than the {MAX_CUDA_HEADS} "
            "that GroupQueryAttention on CUDA takes; use `target=cuda` with `kv_layout=batch`"
        )


def _write_models(
    checkpoints: list[Checkpoint],
    options: Options,
    smoothing: Smoothing | None,
    path: Path,
    data: str,
    progress: Progress | None,
    *,
    steps: bool,
) -> None:
    """Write a graph for each checkpoint; the first one's data serve the others too.

    Args:
        steps: write, for each, a graph of single steps over the same data besides.
    """
    models = [build(checkpoint, options, smoothing) for checkpoint in checkpoints]
    for model in models:
        _compute_small_weights(model)
    base, done, hashes = models[0], 0, dict[str, str]()
    total = sum(len(_own_weights(model, base)) for model in models)

    def written(*_: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("writing", done, total)

    for checkpoint, model in zip(checkpoints, models, strict=True):
        file, files = path, [data]
        if model is not base:
            file = path.with_stem(f"{path.stem}_p{checkpoint.config.streams}")
            files.append(f"{file.name}.data")
        values = _own_weights(model, base)
        tensors = ir.external_data.convert_tensors_to_external(
            [_tensor(value) for value in values], path.parent, files[-1], callback=written
        )
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
        if model is not base:
            _share_weights(model, base)
        model.metadata_props.update(_metadata(checkpoint, options))
        for name in files:
            hashes[name] = hashes.get(name) or sha256(path.parent / name)
            model.metadata_props[f"parscale.{PREFIX}{name}"] = hashes[name]
        ir.save(model, file)
        # By path: the checker then leaves the weights where they are.
        onnx.checker.check_model(str(file), full_check=True)
        if steps:
            step = build(checkpoint, replace(options, step=True))
            _share_weights(step, model)
            step.metadata_props.update(model.metadata_props)
            file = step_file(file)
            ir.save(step, file)
            onnx.checker.check_model(str(file), full_check=True)


def _compute_small_weights(model: ir.Model) -> None:
    # What is wrong with one of them is said as it is, not as an error of the file's writer.
    for value in model.graph.initializers.values():
        if (tensor := _tensor(value)).nbytes <= LARGE:
            tensor.numpy()


def _own_weights(model: ir.Model, base: ir.Model) -> list[ir.Value]:
    """The initializers for external data, but for those that ``base`` stores already."""
    large = [value for value in model.graph.initializers.values() if _tensor(value).nbytes > LARGE]
    return large if model is base else [value for value in large if not _stored(value, base)]


def _share_weights(model: ir.Model, base: ir.Model) -> None:
    for value in model.graph.initializers.values():
        if (stored := _stored(value, base)) is not None:
            value.const_value = stored


def _stored(value: ir.Value, base: ir.Model) -> ir.TensorProtocol | None:
    """The tensor of ``base`` with the same name and shape: of one backbone, so the same one."""
    other = base.graph.initializers.get(value.name or "")
    if other is None or _tensor(value).nbytes <= LARGE:
        return None
    return other.const_value if other.shape == value.shape else None


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _metadata(checkpoint: Checkpoint, options: Options) -> dict[str, str]:
    config = checkpoint.config
    values = {
        "streams": config.streams,
        "prefix_length": config.prefix_length,
        "kv_layout": options.kv_layout,
        "ops": options.ops,
        "precision": options.precision,
        "activations": options.activations,
        "head_precision": options.head_precision,
        "block_size": options.block_size,
        "symmetric": str(options.symmetric).lower(),
        "accuracy_level": options.accuracy_level,
        "all_logits": str(options.all_logits).lower(),
        "context_length": config.max_position_embeddings,
        "model_type": config.model_type,
        "source": config.raw.get("_name_or_path") or checkpoint.folder.resolve().name,
        "version": version("parscale"),
        "onnx_version": version("onnx"),
        "onnx_ir_version": version("onnx-ir"),
    }
    if checkpoint.adapter is not None:
        values["adapter"] = checkpoint.adapter.folder.resolve().name
    return {f"parscale.{name}": str(value) for name, value in values.items()}
