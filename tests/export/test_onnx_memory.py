"""The memory that an export takes: the largest tensor and a constant, however deep the model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parscale_core.checkpoint.config import read_config, tensor_shapes
from safetensors.numpy import save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]
CONFIG = {
    "model_type": "qwen2_parscale",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "parscale_n": 2,
    "tie_word_embeddings": True,
}
LARGEST = 32000 * 1024 * 4
# Peaks of all memory, and of what is not a mapped file, seen every few milliseconds.
EXPORT = """
import sys, threading, time
import onnx, onnx_ir, safetensors.numpy
from parscale_export import export_onnx

def read(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

before = read("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # begin the peak anew
own, done = [read("RssAnon")], threading.Event()

def watch():
    while not done.wait(0.005):
        own.append(read("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
export_onnx(sys.argv[1], sys.argv[2], precision=sys.argv[3])
done.set()
watcher.join()
print(read("VmHWM") - before, max(own) - own[0])
"""


def write_model(folder: Path, layers: int) -> int:
    """A float16 checkpoint of so many layers; its size in float32."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    shapes, random = tensor_shapes(read_config(folder)), np.random.default_rng(0)
    tensors = {n: random.random(s, np.float32).astype(np.float16) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return sum(4 * tensor.size for tensor in tensors.values())


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "w8a8"])
def test_peak_memory_hardly_grows_with_depth(tmp_path, precision):
    peaks, sizes = {}, {}
    model, output = tmp_path / "model", tmp_path / "out"
    for layers in (2, 14):
        sizes[layers] = write_model(model, layers)
        command = [sys.executable, "-c", EXPORT, model, output, precision]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # w8a8 runs the float model once, whose weights stay in their file, mapped.
        peaks[layers] = int(printed.split()[precision == "w8a8"])
        shutil.rmtree(output)
        shutil.rmtree(model)
        print(f"\n{precision}: {peaks[layers] / 1e6:.0f} MB for {sizes[layers] / 1e6:.0f} MB")
    # Of each layer w8a8 keeps samples of activations, and onnxruntime copies a part of the weights.
    most, grows = (800e6, 0.5) if precision == "w8a8" else (2 * LARGEST + 200e6, 0.05)
    assert peaks[14] < most
    assert peaks[14] - peaks[2] < grows * (sizes[14] - sizes[2])
