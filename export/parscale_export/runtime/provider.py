"""Which of onnxruntime's execution providers a graph runs on, and whether CUDA starts here."""

import contextlib
import ctypes
import io
import sys
from collections.abc import Mapping

import onnxruntime as ort
from packaging.version import Version

from parscale_export.fused import MAX_CUDA_HEADS

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CPU, CUDA = PROVIDERS["cpu"], PROVIDERS["cuda"]
# Before it, recorded graphs read the host's memory again at each replay, norms sum in float16,
# and some sizes are computed on the CPU in the middle of a step.
CUDA_SINCE = Version("1.31")
# What onnxruntime's CUDA part is linked with; cuDNN it opens when a graph needs it, ours do not.
_LIBRARIES = {"cublasLt": None, "cublas": None, "cudart": None, "curand": 10}
INSTALL = "pip install 'parscale[onnx-cuda13]'"


def choose_provider(asked: str | None) -> tuple[str, str | None]:
    """The full name of the asked-for provider; by default CUDA where it starts, else the CPU.

    Returns:
        The name; and where it is the CPU for want of a library in spite of a CUDA device, why.

    Raises:
        ValueError: this onnxruntime lacks the provider that was asked for, or it does not start.
    """
    available = ort.get_available_providers()
    if asked is None:
        if CUDA not in available or not count_devices():
            return CPU, None
        reason = why_cuda_does_not_start()
        return (CPU, reason) if reason else (CUDA, None)
    name = PROVIDERS.get(asked.lower(), asked)
    if name not in available:
        known = ", ".join(available)
        raise ValueError(f"provider {asked!r} is not in this onnxruntime, which has {known}")
    if name == CUDA:
        reason = why_cuda_does_not_start() if count_devices() else "there is no CUDA device here"
        if reason:
            raise ValueError(f"provider 'cuda' was asked for, but {reason}")
    return name, None


def count_devices() -> int:
    """How many CUDA devices the driver knows; onnxruntime-gpu installs without a driver, too."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def why_cuda_does_not_start() -> str | None:  # pragma: no cover - on CUDA alone
    """What onnxruntime lacks for CUDA besides the device, and what brings it; None if nothing."""
    if Version(ort.__version__) < CUDA_SINCE:
        return (
            f"CUDA needs onnxruntime-gpu {CUDA_SINCE} or later (Python 3.11 or later), and this is "
            f"{ort.__version__}"
        )
    missing = missing_libraries()
    return f"{', '.join(missing)} cannot be loaded: {INSTALL}" if missing else None


def missing_libraries() -> list[str]:  # pragma: no cover - on CUDA alone
    """The libraries of CUDA that onnxruntime is linked with and that cannot be loaded here.

    Those of the system and of LD_LIBRARY_PATH come first, then those that pip installed.
    """
    major = ort.cuda_version.partition(".")[0]
    pattern = "{}64_{}.dll" if sys.platform == "win32" else "lib{}.so.{}"
    names = [pattern.format(name, number or major) for name, number in _LIBRARIES.items()]
    if not all(map(_loads, names)):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
    return [name for name in names if not _loads(name)]


def _loads(library: str) -> bool:  # pragma: no cover - on CUDA alone
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def cuda_refusal(about: Mapping[str, str], heads: int) -> str | None:
    """Why CUDA cannot run a graph with these metadata and query heads in a row; None if it can."""
    fused, activations = about["ops"] == "fused", about["activations"]
    if about.get("precision") == "w8a8":
        return "w8a8 is for CPUs; use `provider=cpu`, or export with another `precision`"
    if fused and activations == "fp32":
        return (
            "GroupQueryAttention on CUDA has no float32; use `provider=cpu`, or export with "
            "`precision=fp16` or `ops=standard`"
        )
    if fused and heads > MAX_CUDA_HEADS:
        return (
            f"{heads} heads in a row are more than the {MAX_CUDA_HEADS} that GroupQueryAttention "
            "on CUDA takes; export with `kv_layout=batch`"
        )
    return None


def records_steps(about: Mapping[str, str], provider: str, asked: bool | None) -> bool:
    """Whether a graph's steps are recorded as CUDA graphs: on CUDA, where it can be, unless not."""
    return provider == CUDA and about["ops"] == "fused" and asked is not False


def cuda_options(device_id: int, cuda_graph: bool) -> dict[str, str]:
    """The CUDA provider's options."""
    return {
        "device_id": str(device_id),
        "enable_cuda_graph": str(int(cuda_graph)),
        "use_tf32": "0",  # float32 is to be float32
        # Flash and memory-efficient attention alone: cuDNN's builds a plan for every new length
        # of a prompt or a buffer, which takes tenths of a second.
        "sdpa_kernel": "3",
        "enable_cudnn": "0",
        # The default doubles what it takes with every growth, and gives nothing back.
        "arena_extend_strategy": "kSameAsRequested",
    }
