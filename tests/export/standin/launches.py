"""Count what a step launches on CUDA, without a GPU: ``python launches.py [EXPORT...]``.

With no EXPORT, of the golden cases in fp16, int4 and int8, streams as rows, and of the graphs that
onnxruntime-genai's builder makes (where it, PyTorch and transformers are installed). ``--exporter
CHECKOUT`` exports with another state of this project, for a comparison with it.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import build
import onnxruntime as ort
from packaging.version import Version
from parscale_export.runtime.provider import CUDA, CUDA_SINCE

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
EXPORT = """
import sys
from parscale_export import export_onnx
for case in ("p1", "p4"):
    for precision in ("fp16", "int4", "int8"):
        export_onnx(f"{sys.argv[1]}/{case}", f"{sys.argv[2]}/{case}-{precision}", target="cuda",
                    precision=precision, activations="fp16")
"""


def missing() -> str | None:
    """What the stand-in needs and is not here."""
    if CUDA not in ort.get_available_providers() or Version(ort.__version__) < CUDA_SINCE:
        return f"onnxruntime-gpu {CUDA_SINCE}"
    if not (shutil.which("g++") and shutil.which("nm")):
        return "a C++ compiler and nm"
    return None if build.headers() else "CUDA's headers: nvidia-cuda-runtime and nvidia-cuda-crt"


def look(libraries: Path, work: Path, folders: list[Path], *, record: bool = False) -> list[dict]:
    """What each export's step does, by ``steps.py`` in a process of its own.

    Raises:
        RuntimeError: it wrote something on standard error.
    """
    command = [sys.executable, HERE / "steps.py", *(["--record"] if record else [])]
    result = subprocess.run(
        [*command, *folders], capture_output=True, text=True, timeout=300,
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries), "STANDIN_LOG": f"{work}/notes"},
    )  # fmt: skip
    # What onnxruntime finds and does not find is said in our own words alone.
    if result.returncode or result.stderr:
        raise RuntimeError(result.stderr)
    return [json.loads(line) for line in result.stdout.splitlines()]


def build_genai(work: Path) -> list[Path]:
    """The graphs of genai's builder for the golden case of one stream, as a plain Qwen2."""
    sys.path.append(str(ROOT / "benchmarks"))
    from generate_onnx import build_genai

    plain = work / "plain"
    shutil.copytree(ROOT / "tests" / "golden" / "p1", plain)
    config = json.loads((plain / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("parscale") and k != "auto_map"}
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (plain / "config.json").write_text(json.dumps(config))
    folders = []
    for precision in ("fp16", "int4"):
        folders.append(work / f"genai-{precision}")
        build_genai(plain, 1, folders[-1], "cuda", precision)
    return folders


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="*", type=Path, metavar="EXPORT")
    parser.add_argument("--exporter", type=Path, default=ROOT, metavar="CHECKOUT")
    args = parser.parse_args()
    if lacking := missing():
        parser.error(f"needs {lacking}")
    with tempfile.TemporaryDirectory() as folder:
        work, exports = Path(folder), args.exports
        (work / "libraries").mkdir()
        build.build(work / "libraries")
        if not exports:
            rooms = [args.exporter, args.exporter / "core", args.exporter / "export"]
            path = os.pathsep.join(str(room.resolve()) for room in rooms)
            subprocess.run(
                [sys.executable, "-c", EXPORT, ROOT / "tests" / "golden", work],
                check=True, cwd=work, env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
            exports = sorted(work.glob("p?-*"))
            if all(map(importlib.util.find_spec, ("onnxruntime_genai", "torch", "transformers"))):
                exports += build_genai(work)
        for report in look(work / "libraries", work, exports):
            print(f"{report.get('launches', '-'):>5}  {Path(report['export']).name}",
                  report.get("stopped", ""))  # fmt: skip


if __name__ == "__main__":
    main()
