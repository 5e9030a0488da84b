"""Load models for an engine."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

from parscale_mlx.engine.engine import MlxEngine
from parscale_mlx.load import identity, load_draft, open_models
from parscale_mlx.parallel.ranks import broadcast, check_same, join

import mlx.core as mx
import psutil
from parscale_core.checkpoint.adapter import find_adapters
from parscale_core.checkpoint.config import read_config, tensor_shapes
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.packaged import DEFAULT

# Of the free memory, what plain weights may take.
MEMORY_SHARE = 0.5


def open_engine(
    model: str | Path | None,
    *,
    adapters: Sequence[Path] = (),
    streams: Sequence[int] | Literal["all"] = (),
    default: int | None = None,
    more_streams: Sequence[int] = (),
    draft_model: str | None = None,
    parallel: str | None = None,
    dequantize: bool | None = None,
    **options: Any,
) -> MlxEngine:
    """Load a model, and the stream adapters over it, and start an engine.

    Args:
        model: a folder or a name on the hub; None for SmolLM2 with streams.
        adapters: folders; with none, those that came with the model.
        streams: the numbers that requests may choose, the default first; with none, the most that
            there are; "all" for each that there is.
        default: of all, or the only one; by default the most.
        more_streams: that requests may choose besides, as for a draft.
        draft_model: a folder or a name on the hub.
        parallel: as for ``parscale_mlx.load``.
        dequantize: compute with plain weights; by default on the CPU, which is many times faster
            with them, where they fit in half of the free memory.
        options: for ``MlxEngine``.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``parscale_mlx.load``; there is no model of
            so many streams; the draft model has another vocabulary.
    """
    folder = find_folder(model or DEFAULT)
    there = find_adapters(folder, adapters)
    if streams == "all":
        first = default or max(there)
        wanted: Sequence[int] = (first, *sorted(set(there) - {first}))
    else:
        wanted = tuple(streams) or (default or max(there),)
        wanted += tuple(n for n in more_streams if n not in wanted)
    if dequantize is None:
        dequantize = plain_weights_are_better(folder)
        if parallel is not None:
            # The ranks have to compute alike, and have not the same memory free.
            dequantize = broadcast(join(), b"yes" if dequantize else b"no") == b"yes"
    models, tokenizer = open_models(
        folder, adapters, wanted, parallel=parallel, dequantize=dequantize
    )
    draft = None
    if draft_model is not None:
        draft_folder = find_folder(draft_model)
        first_model = next(iter(models.values()))
        if first_model.parallel is not None:
            check_same(first_model.parallel.group, identity(draft_folder))
        draft = load_draft(draft_folder, tokenizer)
    engine = MlxEngine({n: models[n] for n in wanted}, tokenizer, draft_model=draft, **options)
    if dequantize:
        engine.notes.append("the quantised weights are held as plain ones: faster on this CPU")
    return engine


def plain_weights_are_better(folder: Path) -> bool:
    """Whether a model's weights are quantised, MLX computes on the CPU, and plain ones fit."""
    config = read_config(folder)
    is_quantized = config.raw.get("quantization") or config.raw.get("quantization_config")
    if not is_quantized or mx.default_device() != mx.cpu:
        return False
    plain = 4 * sum(map(prod, tensor_shapes(config).values()))
    return plain < MEMORY_SHARE * psutil.virtual_memory().available
