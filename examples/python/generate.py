"""Generate greedily from an export with onnxruntime alone."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="what parscale export-onnx wrote")
parser.add_argument("prompt", nargs="?", default="Once upon a time")
parser.add_argument("--tokens", help="ids such as 1,2,3 in place of the prompt; prints ids, too")
parser.add_argument("--max-tokens", type=int, default=32)
arguments = parser.parse_args()

if arguments.tokens:
    prompt = [int(token) for token in arguments.tokens.split(",")]
else:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    prompt = tokenizer.encode(arguments.prompt).ids
config = json.loads((arguments.folder / "config.json").read_text())
ends = np.atleast_1d(config.get("eos_token_id") or [])

options = ort.SessionOptions()
# Exact sums of 8-bit products (w8a8) on x86 processors without VNNI, too.
options.add_session_config_entry("session.x64quantprecision", "1")
session = ort.InferenceSession(
    arguments.folder / "model.onnx", options, providers=["CPUExecutionProvider"]
)
about = session.get_modelmeta().custom_metadata_map
# The streams' caches are rows of the batch, unless the export has them as heads.
rows = int(about["parscale.streams"]) if about["parscale.kv_layout"] == "batch" else 1
caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
kind = np.float16 if caches[0].type == "tensor(float16)" else np.float32
empty = np.zeros((rows, caches[0].shape[1], 0, caches[0].shape[3]), kind)
pasts = {value.name: ort.OrtValue.ortvalue_from_numpy(empty) for value in caches}
outputs = ["logits", *(name.replace("past_key_values", "present") for name in pasts)]

ids, generated = np.array([prompt], np.int64), []
while len(generated) < arguments.max_tokens and not np.isin(generated[-1:], ends).any():
    # As long as the ids in the first call, where the graph puts the prefix into the cache itself.
    mask = np.ones((1, len(prompt) + len(generated)), np.int64)
    feed = {"input_ids": ids, "attention_mask": mask}
    feed = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
    logits, *presents = session.run_with_ort_values(outputs, feed | pasts)
    pasts = dict(zip(pasts, presents, strict=True))
    ids = logits.numpy()[:, -1:].argmax(axis=-1)
    generated.append(int(ids[0, 0]))
print(generated if arguments.tokens else tokenizer.decode(generated))
