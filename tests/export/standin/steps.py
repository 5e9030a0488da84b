"""What a step of decoding does on CUDA: ``python steps.py [--record] EXPORT ...`` on the stand-in.

With the stand-in's libraries in LD_LIBRARY_PATH and a file for its notes in STANDIN_LOG, prints a
JSON object for each export. The tokens mean nothing: kernels are written down, not computed.
"""

import collections
import json
import os
import sys
from pathlib import Path

import onnxruntime as ort
from parscale_export import OnnxModel

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
        "launches": sum(line.startswith(LAUNCHES) for line in step),
        "kinds": collections.Counter(line.rsplit(" ", 1)[0] if "copy" in line else line.split()[0]
                                     for line in step),
        "kernels": [line.split()[1] for line in step if line.startswith(("kernel", "library"))],
        "to_host": sum(int(line.split()[-1]) for line in after if "device-to-host" in line),
        "replays": last.count("graph"),
        "recorded_from_host": sum("host-to-device" in line for line in recorded),
        "uploaded": sum(int(line.split()[-1]) for line in opened if "host-to-device" in line),
        "nodes": [] if record else _nodes(profile),
    }  # fmt: skip


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
            report = look(folder, record)
        except Exception as error:
            report = {"export": folder, "stopped": f"{type(error).__name__}: {error}"}
        print(json.dumps(report), flush=True)
    os._exit(0)  # the provider's own clean-up expects a real device


if __name__ == "__main__":
    main()
