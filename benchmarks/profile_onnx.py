"""Where a step of decoding goes on a CPU: milliseconds of each operator, by onnxruntime's profile.

    python benchmarks/profile_onnx.py EXPORT... [--prompt 64] [--tokens 12] [--threads 1]

The last eight steps count, each operator by the shape of what it gives.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime as ort
from parscale_export import OnnxModel

STEPS = 8


class Profiled(ort.SessionOptions):
    folder = ""

    def __init__(self):
        super().__init__()
        self.enable_profiling = True
        self.profile_file_prefix = f"{self.folder}/profile"


def profile(export: Path, prompt: int, tokens: int, threads: int) -> Counter[str]:
    """Microseconds of ``STEPS`` steps by operator and shape."""
    model = OnnxModel(export, "cpu", threads=threads)
    for _ in model.stream([[n % 1000 for n in range(prompt)]], tokens):
        pass
    events = json.loads(Path(model.steps.end_profiling()).read_text())
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])
    start, spent = runs[-STEPS]["ts"], Counter[str]()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= start:
            shape = [*event["args"]["output_type_shape"][:1], {"": []}][0]
            name = f"{event['args']['op_name']} {next(iter(shape.values()))}"
            spent[name] += event["dur"]
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="+", type=Path, metavar="EXPORT")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.tokens <= STEPS:
        parser.error(f"--tokens must be more than {STEPS}")
    with TemporaryDirectory() as folder:
        Profiled.folder, ort.SessionOptions = folder, Profiled
        for export in args.exports:
            spent = profile(export, args.prompt, args.tokens, args.threads)
            print(f"\n{export}: {spent.total() / STEPS / 1e3:.2f} ms a step")
            for name, time in spent.most_common(16):
                print(f"{time / STEPS / 1e3:9.2f}  {name}")


if __name__ == "__main__":
    main()
