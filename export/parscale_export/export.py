"""Write a model folder as an ONNX folder: graph, external data, configuration and tokenizer."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir

from parscale_export import targets
from parscale_export.checkpoint import Checkpoint
from parscale_export.config import Config
from parscale_export.fused import context_length
from parscale_export.graph import Options, build
from parscale_export.rope import inverse_frequencies
from parscale_export.weights import BITS, FLOATS

PRECISIONS = (*FLOATS, *BITS)
_CHOICES = {
    "target": tuple(targets.PRESETS),
    "kv_layout": ("batch", "heads"),
    "ops": ("fused", "standard"),
    "precision": PRECISIONS,
    "activations": tuple(FLOATS),
    "head_precision": PRECISIONS,
    "embedding_precision": PRECISIONS,
    "aggregator_precision": PRECISIONS,
    "accuracy_level": (0, 1, 2, 3, 4),
}


def export_onnx(
    source: str | Path,
    output: str | Path,
    *,
    kv_layout: str | None = None,
    ops: str | None = None,
    precision: str | None = None,
    target: str | None = None,
    all_logits: bool = False,
    aggregation_weights: bool = False,
    activations: str | None = None,
    head_precision: str | None = None,
    embedding_precision: str | None = None,
    aggregator_precision: str | None = None,
    block_size: int = 32,
    accuracy_level: int = 4,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Export a ParScale, Qwen2 or Llama model folder to ONNX.

    Args:
        source: a published or converted model folder, or a name on the hub.
        output: the folder to make; it appears whole or not at all.
        kv_layout: "batch" (default; streams are rows of the batch) or "heads" (streams are heads:
            an ordinary decoder's interface, for runtimes that know nothing of streams).
        ops: "fused" (default; onnxruntime's GroupQueryAttention and MatMulNBits) or "standard"
            (ai.onnx opset 23 alone).
        precision: "fp32" (default), "fp16", "bf16", or "int8" or "int4" for the weight matrices.
        target: "cuda", "cpu", "genai" or "web" sets these three unless they are given, and writes
            the files that onnxruntime-genai and transformers.js read.
        all_logits: logits of every token, [B, L, vocab]; otherwise of the last, [B, 1, vocab].
        aggregation_weights: a second output, float32 [B, L or 1, P]: how much each stream counts.
        activations: "fp32", "fp16" or "bf16", for all that is not quantised; by default that of
            ``precision``, and for int8 and int4 "fp32" (with target "cuda", "fp16").
        head_precision: of the logits' projection; by default ``precision``, "int8" for int4.
        embedding_precision, aggregator_precision: by default ``activations``.
        block_size: columns that share a scale, a power of two from 16.
        accuracy_level: MatMulNBits' own: 4 computes with 8-bit activations, 0 does not round them.
        force: replace an existing export.
        progress: called with the number of tensors written and their total.

    Returns:
        The output folder's path.

    Raises:
        FileNotFoundError, ImportError: see ``Checkpoint``.
        FileExistsError: the output exists.
        ValueError: the source is not a model that can be exported, or options that do not go
            together.
    """
    chosen = {"target": target, "kv_layout": kv_layout, "ops": ops, "precision": precision}
    options = choose_options(
        **chosen,
        activations=activations,
        head_precision=head_precision,
        embedding_precision=embedding_precision,
        aggregator_precision=aggregator_precision,
        block_size=block_size,
        accuracy_level=accuracy_level,
        all_logits=all_logits,
        aggregation_weights=aggregation_weights,
    )
    output = Path(output)
    check_output(output, force=force)
    checkpoint = Checkpoint(source)
    if output.resolve() in (checkpoint.folder.resolve(), *checkpoint.folder.resolve().parents):
        raise ValueError(f"{output}: the model to export is in there")
    _check_model(checkpoint.config, options, checkpoint.folder)
    with _appearing(output) as folder:
        graph, data = targets.file_names(target, options)
        _write_model(checkpoint, options, folder / graph, data, progress)
        targets.write_side_files(checkpoint.folder, folder, checkpoint.config, options, target)
    return output


def choose_options(*, target, kv_layout, ops, precision, activations, head_precision,
                   embedding_precision, aggregator_precision, block_size, accuracy_level,
                   all_logits, aggregation_weights) -> Options:  # fmt: skip
    """Fill in what was not given, and check that it goes together.

    Raises:
        ValueError: an unknown choice, or a combination that no graph can be built for.
    """
    for name, given in list(locals().items()):
        if given is not None and name in _CHOICES and given not in _CHOICES[name]:
            choices = ", ".join(str(c) for c in _CHOICES[name] if c is not None)
            raise ValueError(f"{name} {given!r} is not one of {choices}")
    preset = targets.PRESETS[target]
    kv_layout, ops = kv_layout or preset["kv_layout"], ops or preset["ops"]
    precision = precision or preset["precision"]
    if activations is None:
        activations = precision if precision in FLOATS else "fp16" if target == "cuda" else "fp32"
    head_precision = head_precision or ("int8" if precision == "int4" else precision)
    options = Options(
        kv_layout=kv_layout,
        ops=ops,
        precision=precision,
        activations=activations,
        head_precision=head_precision,
        embedding_precision=embedding_precision or activations,
        aggregator_precision=aggregator_precision or activations,
        block_size=block_size,
        accuracy_level=accuracy_level,
        all_logits=all_logits,
        aggregation_weights=aggregation_weights,
    )
    for name in ("precision", "head_precision", "embedding_precision", "aggregator_precision"):
        value = getattr(options, name)
        if value in FLOATS and value != activations:
            raise ValueError(f"{name} {value} does not go with activations {activations}")
    if target in ("genai", "web") and kv_layout != "heads":
        raise ValueError(f"target {target} needs kv_layout heads: it has no notion of streams")
    if target == "genai" and ops != "fused":
        raise ValueError("target genai needs ops fused: past and present share a buffer there")
    if ops == "standard" and options.embedding_precision in BITS:
        raise ValueError(
            "a quantised embedding needs ops fused: opset 23 has no gather of quantised blocks"
        )
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size} is not a power of two from 16")
    return options


def check_output(output: Path, *, force: bool) -> None:
    """Refuse to write over anything but an export that may be replaced.

    Raises:
        FileExistsError: something is there, and not ``force`` or not an export.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise FileExistsError(f"{output}: already exists; --force replaces it")
    is_export = output.is_dir() and not output.is_symlink() and (
        any(output.glob("*.onnx")) or any(output.glob("onnx/*.onnx")) or not any(output.iterdir())
    )  # fmt: skip
    if not is_export:
        raise FileExistsError(f"{output}: exists and is not an ONNX export, so it is not replaced")


def _check_model(config: Config, options: Options, folder: Path) -> None:
    try:
        inverse_frequencies(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if options.ops == "fused" and config.head_dim % 16:
        raise ValueError(
            f"{folder / 'config.json'}: head_dim {config.head_dim} is not a multiple of 16, which "
            "GroupQueryAttention needs; use --ops standard"
        )


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A new folder beside ``output`` that takes its place at the end, or vanishes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    folder, replaced = work / "new", work / "old"
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            output.rename(replaced)
        folder.rename(output)
    except BaseException:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_model(
    checkpoint: Checkpoint,
    options: Options,
    path: Path,
    data: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    path.parent.mkdir(exist_ok=True)
    model = build(checkpoint, options)

    def written(_: object, info: ir.external_data.CallbackInfo) -> None:
        if progress is not None:
            progress(info.index + 1, info.total)

    model = ir.external_data.unload_from_model(
        model, path.parent, data, size_threshold_bytes=1024, callback=written
    )
    model.metadata_props.update(_metadata(checkpoint, options, path.parent / data))
    ir.save(model, path)
    # By path: the checker then leaves the weights where they are.
    onnx.checker.check_model(str(path), full_check=True)


def _metadata(checkpoint: Checkpoint, options: Options, data: Path) -> dict[str, str]:
    config = checkpoint.config
    values = {
        "streams": config.streams,
        "prefix_length": config.prefix_length if config.streams > 1 else 0,
        "kv_layout": options.kv_layout,
        "ops": options.ops,
        "precision": options.precision,
        "activations": options.activations,
        "head_precision": options.head_precision,
        "block_size": options.block_size,
        "accuracy_level": options.accuracy_level,
        "all_logits": str(options.all_logits).lower(),
        # The standard operators compute angles as they go and know no end.
        "context_length": context_length(config) if options.ops == "fused" else 0,
        "model_type": config.model_type,
        "source": config.raw.get("_name_or_path") or checkpoint.folder.resolve().name,
        "version": version("parscale"),
        "onnx_version": version("onnx"),
        "onnx_ir_version": version("onnx-ir"),
    }
    if data.exists():
        values[f"sha256.{data.name}"] = _sha256(data)
    return {f"parscale.{name}": str(value) for name, value in values.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
