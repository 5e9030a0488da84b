"""Make one checkpoint of a backbone and a stream adapter."""

from pathlib import Path

from parscale_mlx.adapter import load_adapter, with_streams
from parscale_mlx.finite import check_weights
from parscale_mlx.graft import grafted_config
from parscale_mlx.load import load_model
from parscale_mlx.model_folder import LAYOUTS, dequantized, write_model

from parscale_core.checkpoint.adapter import WEIGHTS
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.model_card import write_card
from parscale_core.checkpoint.output import check_output, place, working_folder
from parscale_core.checkpoint.tokenizer import copy_files
from parscale_core.checkpoint.weight_files import find_safetensors


def fuse(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    to: str = "mlx",
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> None:
    """Write a model folder of a backbone and an adapter, whole or not at all.

    The backbone's weights are written as they are, quantised ones too; the streams in its type.

    Args:
        model: the backbone's folder, or its name on the hub.
        adapter: the adapter's folder.
        output: the folder to write.
        to: "mlx", or "hf" for what the published PyTorch classes load; never quantised.
        force: replace ``output`` if it is a model folder.
        progress: show a progress bar on standard error where that is a terminal.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError, ValueError: the backbone or the adapter is not there, is none, or they
            do not belong together.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to {to!r} is not one of {', '.join(LAYOUTS)}")
    output = Path(output).expanduser()
    folder = find_folder(model, revision=revision)
    check_output(output, force=force)
    if output.exists() and folder.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{output} holds the backbone; it cannot be replaced by what comes of it")
    streams = load_adapter(adapter, backbone=folder)
    check_weights([*find_safetensors(folder).files, Path(adapter) / WEIGHTS])
    backbone, config = load_model(folder, lazy=True)
    sizes = dict(streams=streams.streams, prefix_length=streams.prefix_length)
    config = grafted_config(config, **sizes) | {"parscale_attn_smooth": streams.smoothing}
    fused = with_streams(backbone, streams)
    if to == "hf":
        fused, config = dequantized(fused, config)
    with working_folder(output) as work:
        write_model(work / "model", fused, config, to=to, progress=progress)
        copy_files(folder, work / "model")
        hub_name = None if Path(model).expanduser().is_dir() else str(model)
        if to == "mlx":
            write_card(work / "model", name=output.name, origin=folder, hub_name=hub_name)
        place(work / "model", output, work / "replaced", force=force)
