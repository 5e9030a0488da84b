"""Generate greedily, for several prompts at once, from an export made with --target genai."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="what parscale export-onnx --target genai wrote")
parser.add_argument("prompts", nargs="*", default=["Once upon a time"])
parser.add_argument("--tokens", help="ids such as 1,2,3;4,5 in place of prompts; prints ids, too")
parser.add_argument("--max-tokens", type=int, default=32)
arguments = parser.parse_args()

model = genai.Model(str(arguments.folder))
config = json.loads((arguments.folder / "config.json").read_text())
settings = json.loads((arguments.folder / "genai_config.json").read_text())["model"]
ends = np.atleast_1d(settings["eos_token_id"])

if arguments.tokens:
    prompts = [[int(token) for token in ids.split(",")] for ids in arguments.tokens.split(";")]
else:
    tokenizer = genai.Tokenizer(model)
    prompts = [tokenizer.encode(prompt).tolist() for prompt in arguments.prompts]
length = max(map(len, prompts))
padded = [ids + [settings["pad_token_id"]] * (length - len(ids)) for ids in prompts]

parameters = genai.GeneratorParams(model)
# max_length sizes the buffer, where the prefix takes room as well.
prefix = config.get("parscale_n_tokens", 48) if config.get("parscale_n", 1) > 1 else 0
parameters.set_search_options(
    batch_size=len(prompts), max_length=prefix + length + arguments.max_tokens, do_sample=False
)
generator = genai.Generator(model, parameters)
generator.append_tokens(np.array(padded, np.int32))
answers = [[] for _ in prompts]
for _ in range(arguments.max_tokens):
    generator.generate_next_token()
    for answer, token in zip(answers, generator.get_next_tokens().tolist(), strict=True):
        if not np.isin(answer[-1:], ends).any():
            answer.append(token)
    if generator.is_done():
        break
for answer in answers:
    print(answer if arguments.tokens else tokenizer.decode(answer))
