"""Which engine runs a model, and how it is opened."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from parscale_core.engine import CacheOptions

from parscale_cli.options.command import given, refuse, take

HINTS = "PARSCALE_HINTS"
CACHE_OPTIONS = {  # by the field of CacheOptions
    "bits": "kv_bits",
    "group_size": "kv_group_size",
    "quantized_start": "quantized_kv_start",
    "max_size": "max_kv_size",
}
NO_STREAMS = "this model was exported without --aggregation-weights: it does not tell them"
ONNX_ONLY = ("provider", "device_id", "threads", "cuda_graph", "check")
SHARED = ("streams", "adapters")


def choose_runtime(model: str | None, runtime: str | None) -> str:
    """ "mlx" or "onnx": what was asked for, or what the model's folder is made for."""
    return runtime or ("onnx" if model is not None and is_export(Path(model)) else "mlx")


def open_engine(
    ctx: click.Context, model: str | None, runtime: str | None, options: dict, *, hints: bool
) -> Any:
    """Start the engine that was asked for, or that a model's folder is made for.

    Args:
        options: a command's; what is in neither ``ONNX_ONLY`` nor ``SHARED`` is MLX's.
        hints: say which engine would be faster.

    Returns:
        An engine that a ``with`` block closes.

    Raises:
        click.UsageError: an option of the other engine was given.
    """
    engine = choose_runtime(model, runtime)
    own = _own_options(ctx, engine, options)
    if engine == "onnx":
        return open_onnx(model, **own)
    opened = _open_mlx(model, **own)
    if hints and runtime is None and own.get("parallel") is None:
        _hint_at_onnxruntime()
    return opened


def open_served(
    ctx: click.Context,
    model: str | None,
    runtime: str | None,
    options: dict,
    *,
    size: int,
    kept_bytes: int,
) -> Any:
    """As ``open_engine``, for a server: all numbers of streams that there are.

    Args:
        size: answers to compute at a time.
        kept_bytes: for KV caches of earlier prompts.
    """
    engine = choose_runtime(model, runtime)
    own = _own_options(ctx, engine, options)
    if engine == "onnx":
        return open_onnx(model, slots=size, kept_bytes=kept_bytes, **own)
    # Ranks share one model.
    own["all_streams"] = own["parallel"] is None
    return _open_mlx(model, batch_size=size, prompt_cache_bytes=kept_bytes, **own)


def _own_options(ctx: click.Context, engine: str, options: dict) -> dict:
    own, found = {}, given(ctx)
    for name, value in options.items():
        if name in SHARED or (name in ONNX_ONLY) == (engine == "onnx"):
            own[name] = value
        elif name in found:
            other = {"mlx": "onnx", "onnx": "mlx"}[engine]
            raise click.UsageError(
                f"{found[name]} is an option of --runtime {other}, and this runs with {engine}"
            )
    if "kv_bits" in own and own["kv_bits"] is None:
        refuse(ctx, "needs --kv-bits", "kv_group_size", "quantized_kv_start")
    return own


def _hint_at_onnxruntime() -> None:
    import mlx.core as mx

    if mx.default_device() == mx.cpu and os.environ.get(HINTS) != "off":
        click.echo(
            "MLX has no GPU here, and onnxruntime is faster on a CPU: --runtime onnx "
            f"(--runtime mlx, or {HINTS}=off, to keep MLX and not be told)",
            err=True,
        )


def _open_mlx(
    model: str | None,
    *,
    streams: int | None = None,
    draft: int | str | None = None,
    prompt_cache: Path | None = None,
    num_draft_tokens: int | None = None,
    all_streams: bool = False,
    **options: Any,
) -> Any:
    # Prompt caches and numbers of drafted tokens belong to requests, and to the command.
    from parscale_mlx.engine import open_engine

    cache = take(CacheOptions, options, **CACHE_OPTIONS)
    return open_engine(
        model,
        streams="all" if all_streams else (),
        default=streams,
        more_streams=(draft,) if isinstance(draft, int) else (),
        cache=CacheOptions(**cache),
        **options,
    )


def open_onnx(
    model: str | None,
    *,
    adapters: Sequence[Path] = (),
    streams: int | None = None,
    all_logits: bool = False,
    **options: Any,
) -> Any:
    """An engine on onnxruntime, for an export or for any other model, which is exported first.

    Raises:
        click.UsageError: adapters over an export, which has its own.
    """
    from parscale_export.runtime.opening import open_engine
    from parscale_export.runtime.session import find_graphs

    path = find_export(model, adapters, all_logits=all_logits)
    if streams is None and (model is None or not is_export(Path(model).expanduser())):
        # As in MLX: the most that there are.
        streams = max(find_graphs(path))
    return open_engine(path, streams=streams, **options)


def find_export(model: str | None, adapters: Sequence[Path], *, all_logits: bool) -> Path:
    """An export's path as it is; of another model, that of its export in the cache folder.

    Raises:
        click.UsageError: adapters over an export, which has its own.
    """
    if model is not None and is_export(Path(model).expanduser()):
        if adapters:
            raise click.UsageError(
                "--adapter is an option of --runtime mlx, and of models that are exported first; "
                "this is an export"
            )
        return Path(model).expanduser()
    from parscale_core.checkpoint.folder import find_folder
    from parscale_core.checkpoint.packaged import DEFAULT
    from parscale_export.export_cache import cached_export

    return cached_export(find_folder(model or DEFAULT), adapters, all_logits=all_logits)


def open_all(
    ctx: click.Context,
    model: str | None,
    runtime: str | None,
    options: dict,
    *,
    size: int,
    all_logits: bool,
) -> Any:
    """An engine for each number of streams in ``options`` (by default all that there are).

    Args:
        options: of the command; of them the engine takes those that are options of runtimes.
        size: answers to compute at a time.
        all_logits: export a model with them, where it is exported first.
    """
    engine = choose_runtime(model, runtime)
    names = (*ONNX_ONLY, *SHARED, "parallel")
    own = _own_options(ctx, engine, {n: v for n, v in options.items() if n in names})
    wanted = own.pop("streams")
    if engine == "onnx":
        own |= {"streams": wanted[0] if wanted else None, "all_logits": all_logits}
        return open_onnx(model, slots=size, **own)
    from parscale_mlx.engine import open_engine

    return open_engine(model, streams=wanted or "all", batch_size=size, prompt_cache_size=0, **own)


def follows(engine: Any, what: str, values: Any) -> bool:
    """On another rank than 0, compute what rank 0 is asked, to its end; False otherwise.

    Args:
        what: a name for the values.
        values: what all ranks must have been given alike, as JSON takes it.

    Raises:
        ValueError: another rank was given others.
    """
    if getattr(engine, "parallel", None) is None:
        return False
    from parscale_mlx.parallel.ranks import check_same_input

    check_same_input(engine.parallel.group, what, values)
    if not engine.follows:
        return False
    engine.follow()
    return True


def is_export(folder: Path) -> bool:
    """Whether this is a graph, or a folder of graphs without weights that MLX could load."""
    if folder.suffix == ".onnx" and folder.is_file():
        return True
    graphs = any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx"))
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return folder.is_dir() and graphs and not weights
