"""Take the streams of a whole checkpoint out of it, as an adapter over its backbone."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from parscale_core.checkpoint.adapter import WEIGHTS, fingerprint, write_adapter_config
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.names import is_stream_tensor
from parscale_core.checkpoint.output import ADAPTER, check_output, place, working_folder
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_core.checkpoint.weight_files import find_safetensors
from parscale_core.progress import progress_bar

# Fields that are about the streams, or change no numbers, or are compared in another way.
MAY_DIFFER = {
    "model_type", "streams", "prefix_length", "smoothing", "raw", "max_position_embeddings",
    "tie_word_embeddings", "rope",
}  # fmt: skip
BLOCK = 1 << 22  # numbers of a tensor to compare at a time


@dataclass(frozen=True)
class Extraction:
    """What was taken out.

    Attributes:
        parameters, bytes: of the adapter.
        compared: tensors of the backbone that were compared.
        different: how many of them differ from the checkpoint's.
        largest_difference: between two numbers in the same place; 0 where all bits agree.
        largest_name: the tensor in which that is.
    """

    output: str
    streams: int
    prefix_length: int
    parameters: int
    bytes: int
    compared: int
    different: int
    largest_difference: float
    largest_name: str | None


def extract(
    source: str | Path,
    backbone: str | Path,
    output: str | Path,
    *,
    tolerance: float = 0.0,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> Extraction:
    """Write the streams of a checkpoint as an adapter over a backbone, whole or not at all.

    Tensors are read one at a time, and compared in pieces.

    Args:
        source: a folder or a hub name of a model with streams, published or converted.
        backbone: a folder or a hub name of the same model without streams, in safetensors.
        tolerance: how far a number of the backbone may be from the checkpoint's. An adapter over
            other weights than those that it was trained with gives other answers.
        revision: a branch, tag or commit of the source, where it is on the hub.
        force: replace ``output`` if it is an adapter.
        progress: show a progress bar on standard error where that is a terminal.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError: a folder, or a file in it, is not there.
        ValueError: the source has one stream, the backbone several, the two have other sizes or
            settings, or their weights differ by more than ``tolerance``.
    """
    output = Path(output).expanduser()
    check_output(output, force=force, marker=ADAPTER)
    whole = Checkpoint(find_folder(source, revision=revision))
    plain = Checkpoint(backbone)
    find_safetensors(plain.folder)
    _check_sizes(whole, plain)
    names = [name for name in whole.names() if not is_stream_tensor(name)]
    different, largest, largest_name = 0, 0.0, None
    with progress_bar("Comparing", len(names), "tensor", progress) as bar:
        for name in names:
            difference = _difference(whole, plain, name)
            different += difference > 0
            if difference > largest:
                largest, largest_name = difference, name
            bar.update()
    if not largest <= tolerance:
        raise ValueError(
            f"{plain.folder} is not the backbone of {whole.folder}: {different} of {len(names)} "
            f"tensors differ, {largest_name} by as much as {largest:.3g} (tolerance {tolerance:g})"
        )
    streams = {n: _contiguous(whole.read(n)) for n in whole.names() if is_stream_tensor(n)}
    _write(output, whole.config, streams, plain.folder, str(backbone), force)
    return Extraction(
        output=str(output),
        streams=whole.config.streams,
        prefix_length=whole.config.prefix_length,
        parameters=sum(value.size for value in streams.values()),
        bytes=sum(value.nbytes for value in streams.values()),
        compared=len(names),
        different=different,
        largest_difference=largest,
        largest_name=largest_name,
    )


def _check_sizes(whole: Checkpoint, plain: Checkpoint) -> None:
    if not whole.config.prefix_length:
        raise ValueError(f"{whole.folder}: has one stream, so there is nothing to take out")
    if plain.config.prefix_length:
        count = plain.config.streams
        raise ValueError(f"{plain.folder}: has {count} streams of its own; a backbone has none")
    if whole.config.family != plain.config.family:
        raise ValueError(
            f"{plain.folder}: a model of the family {plain.config.family}, and {whole.folder} is "
            f"of {whole.config.family}"
        )
    _check_settings(whole, plain)
    for name in whole.names():
        if is_stream_tensor(name):
            continue
        if name not in plain or plain.shape(name) != whole.shape(name):
            found = list(plain.shape(name)) if name in plain else "not there"
            raise ValueError(
                f"{plain.folder}: {name} is {found}, where {whole.folder} has "
                f"{list(whole.shape(name))}"
            )


def _check_settings(whole: Checkpoint, plain: Checkpoint) -> None:
    # The same tensors compute other numbers where a head has another size or another rotation.
    ours, theirs = whole.config, plain.config
    for name in (field.name for field in fields(ModelConfig)):
        if name not in MAY_DIFFER and getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"{plain.folder}: {name} is {getattr(theirs, name)}, where {whole.folder} has "
                f"{getattr(ours, name)}"
            )
    if not ours.rope.rotation().is_same(theirs.rope.rotation()):
        raise ValueError(
            f"{plain.folder}: its rotary embedding ({theirs.rope.kind}, rope_theta "
            f"{theirs.rope.theta:g}) is not that of {whole.folder} ({ours.rope.kind}, "
            f"{ours.rope.theta:g})"
        )


def _difference(whole: Checkpoint, plain: Checkpoint, name: str) -> float:
    """The largest difference of two tensors' numbers; infinite where one is not a number."""
    largest = 0.0
    for ours, theirs in zip(_blocks(whole, name), _blocks(plain, name), strict=True):
        if ours.dtype == theirs.dtype and np.array_equal(_bits(ours), _bits(theirs)):
            continue
        gap = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()
        largest = max(largest, float("inf") if np.isnan(gap) else float(gap))
    return largest


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    rows = checkpoint.shape(name)[0]
    step = max(1, BLOCK * rows // int(np.prod(checkpoint.shape(name))))
    if checkpoint.is_quantized(name) or checkpoint.decoded_type(name):
        whole = checkpoint.tensor(name)
        yield from (whole[start : start + step] for start in range(0, rows, step))
        return
    for start in range(0, rows, step):
        yield checkpoint.rows(name, start, min(start + step, rows))


def _bits(value: np.ndarray) -> np.ndarray:
    return _contiguous(value).view(np.uint8)


def _contiguous(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value)


def _write(
    output: Path,
    config: ModelConfig,
    streams: dict[str, np.ndarray],
    backbone: Path,
    name: str,
    force: bool,
) -> None:
    with working_folder(output) as work:
        new = work / "adapter"
        new.mkdir()
        save_file(streams, new / WEIGHTS, metadata={"format": "mlx"})
        write_adapter_config(
            new,
            streams=config.streams,
            prefix_length=config.prefix_length,
            smoothing=config.smoothing,
            backbone=backbone.name if Path(name).expanduser().is_dir() else name,
            backbone_sha256=fingerprint(backbone),
        )
        place(new, output, work / "replaced", force=force)
