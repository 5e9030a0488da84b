"""What a step of decoding does on CUDA: ``python steps.py [--record] EXPORT ...`` on the stand-in.

With the stand-in's libraries in LD_LIBRARY_PATH and a file for its notes in STANDIN_LOG, prints a
JSON object for each export. The tokens mean nothing: kernels are written down, not computed. Of a
graph that onnxruntime-genai's builder made, it counts the launches alone.
"""

import collections
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from parscale_export import OnnxModel
from parscale_export.runtime.provider import CPU, CUDA, cuda_options, missing_libraries
from parscale_export.runtime.session import find_graph, load_graph

NOTES = Path(os.environ["STANDIN_LOG"])
PROMPTS = [[3, 4, 5, 6, 7], [8, 9, 10]]
LAUNCHES = ("kernel", "library", "fill", "copy device-to-device")


class Watched:
    """A session that remembers how long the notes were before each of its runs."""

    def __init__(self, session):
        self.session, self.marks = session, []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run_with_iobinding(self, binding, options=None):
        self.marks.append(NOTES.stat().st_size)
        self.session.run_with_iobinding(binding, options)
        self.marks.append(NOTES.stat().st_size)


def look(folder: str, record: bool) -> dict:
    model = OnnxModel(folder, "cuda", cuda_graph=record)
    opened = NOTES.read_text().splitlines()
    model.steps = session = Watched(model.steps)
    model.generate(PROMPTS, 5)
    profile = json.loads(Path(session.end_profiling()).read_text())
    notes = NOTES.read_bytes()
    *_, start, end = session.marks
    last, after = notes[start:end].decode().splitlines(), notes[end:].decode().splitlines()
    lines = notes.decode().splitlines()
    recorded = [line for line in lines if line.startswith("recorded ")]
    step = [line.removeprefix("recorded ") for line in recorded] if record else last
    return {
        "export": folder,
        "launches": count(step),
        "kinds": collections.Counter(line.rsplit(" ", 1)[0] if "copy" in line else line.split()[0]
                                     for line in step),
        "kernels": [line.split()[1] for line in step if line.startswith(("kernel", "library"))],
        "to_host": sum(int(line.split()[-1]) for line in after if "device-to-host" in line),
        "replays": last.count("graph"),
        "recorded_from_host": sum("host-to-device" in line for line in recorded),
        "uploaded": sum(int(line.split()[-1]) for line in opened if "host-to-device" in line),
        "nodes": [] if record else _nodes(profile),
    }  # fmt: skip


def count(lines: list[str]) -> int:
    return sum(line.startswith(LAUNCHES) for line in lines)


def look_at_genai(folder: str) -> dict:
    """A step of two sequences with a graph of genai's builder, bound as genai binds it."""
    missing_libraries()  # loads them
    ort.set_default_logger_severity(3)  # else it warns of how it was asked for
    file = str(Path(folder) / "model.onnx")
    session = ort.InferenceSession(file, providers=[(CUDA, cuda_options(0, False)), CPU])
    binding, device = session.io_binding(), ("cuda", 0)
    inputs = {value.name for value in session.get_inputs()}
    about = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["decoder"]
    shape = [2, about["num_key_value_heads"], 256, about["head_size"]]
    for name in [name for name in inputs if "past" in name]:
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, *device)
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    numbers = {"input_ids": [[5]] * 2, "attention_mask": [[1] * 9] * 2, "position_ids": [[8]] * 2}
    for name in numbers.keys() & inputs:
        binding.bind_cpu_input(name, np.array(numbers[name]))
    binding.bind_output("logits", *device)
    for _ in range(2):  # the first one loads
        start = NOTES.stat().st_size
        session.run_with_iobinding(binding)
    return {"export": folder, "launches": count(NOTES.read_bytes()[start:].decode().splitlines())}


def _nodes(profile: list[dict]) -> list[list]:
    """Operator, provider and bytes given of each node of the last run."""
    run = max((e for e in profile if e["name"] == "model_run"), key=lambda e: e["ts"])
    nodes = [e for e in profile if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    return [
        [e["args"]["op_name"], e["args"]["provider"], int(e["args"]["output_size"])]
        for e in nodes
        if run["ts"] <= e["ts"] <= run["ts"] + run["dur"]
    ]


class Profiled(ort.SessionOptions):
    def __init__(self):
        super().__init__()
        self.enable_profiling = True
        self.profile_file_prefix = str(NOTES.with_name("profile"))


def main():
    record = "--record" in sys.argv
    NOTES.touch()
    ort.SessionOptions = Profiled
    OnnxModel.check_numbers = lambda *_: None  # whatever memory holds comes out as logits
    for folder in [name for name in sys.argv[1:] if name != "--record"]:
        os.truncate(NOTES, 0)
        try:
            about = load_graph(find_graph(Path(folder))).metadata_props
            ours = any(entry.key.startswith("parscale.") for entry in about)
            report = look(folder, record) if ours else look_at_genai(folder)
        except Exception as error:
            report = {"export": folder, "stopped": f"{type(error).__name__}: {error}"}
        print(json.dumps(report), flush=True)
    os._exit(0)  # the provider's own clean-up expects a real device


if __name__ == "__main__":
    main()
