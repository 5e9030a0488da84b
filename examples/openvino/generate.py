"""Generate greedily with OpenVINO from an export made with --kv-layout heads --ops standard."""

import argparse
import json
from pathlib import Path

import numpy as np
import openvino

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="what parscale export-onnx wrote")
parser.add_argument("prompt", nargs="?", default="Once upon a time")
parser.add_argument("--tokens", help="ids such as 1,2,3 in place of the prompt; prints ids, too")
parser.add_argument("--max-tokens", type=int, default=32)
parser.add_argument("--device", default="CPU")
arguments = parser.parse_args()

if arguments.tokens:
    prompt = [int(token) for token in arguments.tokens.split(",")]
else:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    prompt = tokenizer.encode(arguments.prompt).ids
config = json.loads((arguments.folder / "config.json").read_text())
ends = np.atleast_1d(config.get("eos_token_id") or [])

model = openvino.Core().compile_model(
    arguments.folder / "model.onnx",
    arguments.device,
    {"EXECUTION_MODE_HINT": "ACCURACY"},  # computes in the export's precision, not in bfloat16
)
caches = [value for value in model.inputs if value.any_name.startswith("past_key_values.")]
pasts = {}
for value in caches:
    _, heads, _, size = value.partial_shape
    pasts[value.any_name] = openvino.Tensor(
        value.element_type, [1, heads.get_length(), 0, size.get_length()]
    )

ids, generated = np.array([prompt], np.int64), []
while len(generated) < arguments.max_tokens and not np.isin(generated[-1:], ends).any():
    # As long as the ids in the first call, where the graph puts the prefix into the cache itself.
    mask = np.ones((1, len(prompt) + len(generated)), np.int64)
    outputs = model({"input_ids": ids, "attention_mask": mask, **pasts})
    pasts = {name: outputs[name.replace("past_key_values", "present")] for name in pasts}
    ids = outputs["logits"][:, -1:].argmax(axis=-1)
    generated.append(int(ids[0, 0]))
print(generated if arguments.tokens else tokenizer.decode(generated))
