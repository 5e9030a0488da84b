"""Which engine runs a model, and the options that only one of them has."""

from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from parscale_cli.answer import Runtime

ONNX_ONLY, SHARED = ("provider", "device_id", "threads", "cuda_graph"), ("streams",)
OPTIONS = (
    click.option("--runtime", type=click.Choice(["mlx", "onnx"]),
                 help="What computes; by default onnx for a folder that export-onnx wrote."),
    click.option("--provider", metavar="NAME",
                 help="onnx: cpu, cuda or an execution provider's full name; "
                      "by default CUDA where it works."),
    click.option("--device-id", type=click.IntRange(0), default=0, show_default=True,
                 help="onnx: which CUDA device."),
    click.option("--threads", type=click.IntRange(1),
                 help="onnx: threads on the CPU; by default one a core."),
    click.option("--cuda-graph/--no-cuda-graph", default=None,
                 help="onnx: record the step of one token as a CUDA graph and replay it; "
                      "by default with fused operators on CUDA."),
)  # fmt: skip


def runtime_options(command: Callable) -> Callable:
    """Add the options that choose and set up an engine to a Click command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def open_runtime(
    ctx: click.Context, model: str | None, runtime: str | None, options: dict
) -> Runtime:
    """Load a model in the engine that was asked for, or that its folder is made for.

    Args:
        options: those of the engines; what is in neither ``ONNX_ONLY`` nor ``SHARED`` is MLX's.

    Raises:
        click.UsageError: an option of the other engine was given, or an export is needed.
    """
    if runtime == "onnx" and model is None:
        raise click.UsageError("--runtime onnx needs --model DIR, a folder that export-onnx wrote")
    engine = runtime or ("onnx" if model is not None and is_export(Path(model)) else "mlx")
    own = {}
    for name, value in options.items():
        if name in SHARED or (name in ONNX_ONLY) == (engine == "onnx"):
            own[name] = value
        elif ctx.get_parameter_source(name) != ParameterSource.DEFAULT:
            option = {"adapters": "adapter"}.get(name, name.replace("_", "-"))
            other = {"mlx": "onnx", "onnx": "mlx"}[engine]
            raise click.UsageError(
                f"--{option} is an option of --runtime {other}, and this runs with {engine}"
            )
    return _open(engine, model, own)


def _open(engine: str, model: str | None, options: dict) -> Runtime:
    if engine == "mlx":
        from parscale_cli.run_mlx import MlxRuntime

        return MlxRuntime(model, **options)
    from parscale_cli.run_onnx import OnnxRuntime

    assert model is not None
    return OnnxRuntime(model, **options)


def is_export(folder: Path) -> bool:
    """Whether this is a graph, or a folder of graphs without weights that MLX could load."""
    if folder.suffix == ".onnx" and folder.is_file():
        return True
    graphs = any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx"))
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return folder.is_dir() and graphs and not weights
