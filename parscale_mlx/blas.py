"""A fast BLAS for MLX's CPU build on Linux.

The Linux ``mlx-cpu`` wheel links the reference BLAS, whose float32 matrix product runs at a few
GFLOP/s. The dynamic linker binds a symbol to the first library in the global scope that has it, so
a system BLAS loaded before MLX answers in its place.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "PARSCALE_BLAS"
LIBRARIES = ("openblas", "mkl_rt", "blis")
BUNDLED = "mlx_cpu.libs"  # the folder of the wheel's own
LATE = (
    "parscale_mlx was imported after mlx.core, whose own BLAS is many times slower on this CPU: "
    "import parscale_mlx first"
)


def preload() -> str | None:
    """Load a system BLAS into the global scope, once, before MLX is imported.

    Does nothing on macOS (MLX uses Accelerate), with a CUDA build of MLX, or when the environment
    says ``PARSCALE_BLAS=off``. ``PARSCALE_BLAS=/path/lib.so`` names a library of the user's own.
    Where MLX is imported already, one line on standard error says what that costs.

    Returns:
        The name of the library that was loaded, or None.

    Raises:
        ImportError: the library that ``PARSCALE_BLAS`` names cannot be loaded.
    """
    wanted = os.environ.get(VARIABLE, "")
    if sys.platform != "linux" or wanted == "off" or _has_cuda_build():
        return None
    if "mlx.core" in sys.modules:
        if BUNDLED in (answering_library() or "") and any(map(ctypes.util.find_library, LIBRARIES)):
            print(LATE, file=sys.stderr)
        return None
    if wanted:
        try:
            ctypes.CDLL(wanted, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ImportError(f"{VARIABLE}={wanted} cannot be loaded: {error}") from error
        return wanted
    for name in LIBRARIES:
        library = ctypes.util.find_library(name)
        if library is None:
            continue
        try:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    return None


def answering_library() -> str | None:
    """The file that answers ``cblas_sgemm`` in this process: what MLX's CPU build calls.

    None where MLX does not go through a BLAS symbol that can be looked up (macOS).
    """
    if sys.platform != "linux":
        return None
    process = ctypes.CDLL(None)
    library = process if hasattr(process, "cblas_sgemm") else _bundled_blas()
    if library is None:
        return None
    symbol = ctypes.cast(library.cblas_sgemm, ctypes.c_void_p)
    info = _SymbolInfo()
    if not ctypes.CDLL(None).dladdr(symbol, ctypes.byref(info)):
        return None
    return os.fsdecode(info.file)


class _SymbolInfo(ctypes.Structure):
    # Dl_info of dladdr(3).
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _has_cuda_build() -> bool:
    return any(map(_is_installed, ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")))


def _is_installed(name: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _bundled_blas() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("mlx")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(root).parent.glob("mlx_cpu.libs/libblas*.so*"):
            return ctypes.CDLL(str(file))
    return None
