"""Checkpoints of a run: a model or an adapter that is usable by itself, and the state to go on."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parscale_mlx.adapter import load_adapter, save_adapter, take_streams
from parscale_mlx.model_folder import write_model
from parscale_mlx.training.start import Start

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten
from parscale_core.checkpoint.output import place, working_folder
from parscale_core.checkpoint.tokenizer import copy_files
from parscale_core.checkpoint.weight_files import find_safetensors

FOLDER, STATE, OPTIMIZER = "checkpoints", "state.json", "optimizer.safetensors"
ENCODER = "prefix_encoder.safetensors"


@dataclass
class Position:
    """How far a run has come, besides its weights and its optimizer's state.

    Attributes:
        step: steps done. Which data comes next follows from it, and so do random numbers.
        data: the fingerprint of the training data.
        trained_tokens: predictions that counted, so far.
        losses: since the last report, the sums of losses and of predictions, and the steps.
        valid_before, valid: held-out loss in the beginning and last.
    """

    step: int = 0
    data: str = ""
    trained_tokens: int = 0
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    valid_before: float | None = None
    valid: float | None = None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def sweep(run: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for half in (*run.glob(".*/"), *(run / FOLDER).glob(".*/")):
        shutil.rmtree(half)


def save_checkpoint(
    run: Path, start: Start, optimizer: Optimizer, position: Position, keep: int
) -> None:
    """Write a checkpoint, whole or not at all, and then remove all but the last ``keep``.

    Raises:
        OSError: it cannot be written; the ones before are still there.
    """
    output = run / FOLDER / f"step-{position.step:07d}"
    (run / FOLDER).mkdir(exist_ok=True)
    with working_folder(output) as work:
        new = work / "checkpoint"
        write_result(new, start)
        _save(new / OPTIMIZER, dict(tree_flatten(optimizer.state)))
        if start.encoder is not None:
            _save(new / ENCODER, dict(tree_flatten(start.encoder.parameters())))
        (new / STATE).write_text(json.dumps(vars(position), indent=4), encoding="utf-8")
        _sync(new)
        # A run that went back to an earlier checkpoint comes by the later ones again.
        place(new, output, work / "replaced", force=True)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, start: Start, optimizer: Optimizer) -> Position:
    """Put a checkpoint's weights and optimizer state in place.

    Raises:
        FileNotFoundError, ValueError: it is not whole, or of another model.
    """
    try:
        if start.backbone_sha256 is None:
            weights = [pair for f in find_safetensors(folder).files for pair in _load(f).items()]
            start.model.load_weights(weights, strict=True)
        else:
            adapter = load_adapter(folder)
            start.model.load_weights(list(adapter.weights.items()), strict=False)
        if start.encoder is not None:
            start.encoder.load_weights(list(_load(folder / ENCODER).items()))
        state = _load(folder / OPTIMIZER)
        optimizer.state = tree_unflatten(list(state.items()))
        optimizer.init(start.weights())
        mx.eval(start.model.parameters(), start.weights(), optimizer.state)
        return Position(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: not a checkpoint of this run: {error}") from error


def write_result(folder: Path, start: Start) -> None:
    """Write what is trained into a new folder: a model, or an adapter over its frozen backbone.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        if start.backbone_sha256 is None:
            write_model(folder, start.model, dict(start.config), donate=False)
            copy_files(start.folder, folder)
        else:
            sha256, name = start.backbone_sha256, start.folder.resolve().name
            save_adapter(folder, take_streams(start.model, backbone=name, backbone_sha256=sha256))
    except RuntimeError as error:
        raise OSError(f"{folder}: cannot be written: {error}") from error


def _save(file: Path, arrays: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(file), arrays)
    except RuntimeError as error:
        raise OSError(f"{file}: cannot be written: {error}") from error


def _load(file: Path) -> dict[str, mx.array]:
    loaded: Any = mx.load(str(file))
    return loaded


def _sync(folder: Path) -> None:
    # A renamed folder may reach the disk before what is in it does.
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
