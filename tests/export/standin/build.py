"""Build stand-ins for NVIDIA's libraries: ``python build.py FOLDER``.

``device.cpp`` is the runtime library; of the other functions that onnxruntime's CUDA part is linked
with, each succeeds, gives a handle where its name says that it creates one, and is written down
where it is a computation of cuBLAS. cuDNN is left out: ours do not need it.
"""

import importlib.metadata
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import onnxruntime

HERE = Path(__file__).parent
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stand-in"; return 0; }
"""
SETTERS = ("Set", "Destroy", "Desc", "Layout", "Preference", "Config", "Init")


def headers() -> Path | None:
    """CUDA's own headers, from the package nvidia-cuda-runtime; None where it is not installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name == "cuda_runtime_api.h"]
    return Path(str(found[0].locate())).parent if found else None


def build(folder: Path) -> None:
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], check=True, capture_output=True, text=True
    ).stdout
    needed = defaultdict(list)
    for name, library in re.findall(r" U (\w+)@(lib(?:cudart|cublas|cublasLt)\.so\.\d+)", listing):
        needed[library].append(name)
    runtime = next(library for library in needed if library.startswith("libcudart"))
    ours = (HERE / "device.cpp").read_text()
    rest = [name for name in needed[runtime] if not re.search(rf"\b{name}\(", ours)]
    (folder / "rest.c").write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in rest))
    _compile(folder, runtime, [HERE / "device.cpp", folder / "rest.c"], f"-I{headers()}")
    for library, names in needed.items():
        if library != runtime:
            source = folder / f"{library}.c"
            source.write_text(LIBRARY + "\n".join(map(_library_function, names)))
            _compile(folder, library, [source], f"-L{folder}", f"-l:{runtime}")
    for library, code in (("libcuda.so.1", DRIVER), ("libcurand.so.10", "")):
        (folder / f"{library}.c").write_text(code)
        _compile(folder, library, [folder / f"{library}.c"])


LIBRARY = """
#include <stdlib.h>
#include <string.h>
void standin_library_call(const char *name);
"""


def _library_function(name: str) -> str:
    if name == "cublasLtMatmulAlgoGetHeuristic":  # one algorithm is found, all zeros
        return (
            f"int {name}(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, "
            "void *results, int *count) { memset(results, 0, 96 * n); *count = 1; return 0; }"
        )
    if name == "cublasGetMathMode":
        return f"int {name}(void *handle, int *mode) {{ *mode = 0; return 0; }}"
    if name.startswith("cublasGetStatus"):
        return f'const char *{name}(int status) {{ return "stand-in"; }}'
    if "Create" in name:
        return f"int {name}(void **handle) {{ *handle = calloc(1, 256); return 0; }}"
    if any(word in name for word in SETTERS):
        return f"int {name}(void) {{ return 0; }}"
    return f'int {name}(void) {{ standin_library_call("{name}"); return 0; }}'


def _compile(folder: Path, library: str, sources: list[Path], *options: str) -> None:
    versions = folder / f"{library}.map"
    versions.write_text(f"{library} {{ global: *; }};\n")
    objects = []
    for source in sources:
        compiler = "g++" if source.suffix == ".cpp" else "gcc"
        objects.append(folder / f"{library}.{source.stem}.o")
        command = [compiler, "-O1", "-fPIC", "-w", "-c", source, "-o", objects[-1]]
        subprocess.run([*command, *(o for o in options if o.startswith("-I"))], check=True)
    link = ["g++", "-shared", "-o", folder / library, *objects, f"-Wl,-soname,{library}"]
    link.append(f"-Wl,--version-script={versions}")
    subprocess.run([*link, *(o for o in options if not o.startswith("-I"))], check=True)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    build(Path(sys.argv[1]))
