"""Tokens a second of the engine on onnxruntime: several requests at a time, and one by one.

    python benchmarks/slots_onnx.py [--slots 1,8] [--streams 1] [--kv-layout batch] [--json]

A random model in the shape of SmolLM2-135M, float32 unless --precision says otherwise, on the CPU.
--requests prompts of 32 to 96 tokens are answered with --tokens tokens each, prompts and all. Each
number of slots is an engine in a process of its own, and all take turns, so that what else the
machine does touches all of them; the first turn warms up, the medians of the others count. With one
slot, a request is submitted when the one before it is answered. All must give the same tokens.
Where other programs want the same cores, --threads 1 --cpu-time measures the processor's time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from generate_onnx import SMOLLM2, write_checkpoint
from parscale_core.engine import Request, Sampling
from parscale_export import OnnxEngine, OnnxModel, export_onnx
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from turns import Run, take_turns


def requests(count: int, tokens: int) -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 1000, random.integers(32, 97)).tolist() for _ in range(count)]
    return [Request(prompt, sampling=Sampling(max_tokens=tokens)) for prompt in prompts]


def answer(folder: Path, slots: int, threads: int | None, cpu_time: bool) -> Run:
    """A run that answers all requests, and returns the seconds and the tokens."""
    vocabulary = {f"t{n}": n for n in range(SMOLLM2["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    clock = time.process_time if cpu_time else time.perf_counter
    # Kept caches would spare the prompts of every turn but the first.
    model = OnnxModel(folder, "cpu", threads=threads)
    engine = OnnxEngine(model, tokenizer, [], slots=slots, kept_bytes=0)

    def run(asked: list[Request]) -> tuple[float, list[list[int]]]:
        begin = clock()
        if slots == 1:
            answers = [[piece.token for piece in engine.submit(request)] for request in asked]
        else:
            handles = [engine.submit(request) for request in asked]
            answers = [[piece.token for piece in handle] for handle in handles]
        return clock() - begin, answers

    return run


def check_answers(measured: dict[str, list]) -> None:
    """Say on stderr where the tokens are not those of the first side."""
    expected = next(iter(measured.values()))[0][1]
    for slots, turns in measured.items():
        for _, answers in turns:
            if answers != expected:
                wrong = sum(a != b for a, b in zip(answers, expected, strict=True))
                print(f"{wrong} answers with {slots} slots are not the same", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", default="1,8", help="numbers of slots (default 1,8)")
    parser.add_argument("--streams", type=int, default=1, help="P (default 1)")
    parser.add_argument("--kv-layout", default="batch", help="batch or heads (default batch)")
    parser.add_argument("--precision", default="fp32", help="fp32, int8 or int4 (default fp32)")
    parser.add_argument("--requests", type=int, default=16, help="how many (default 16)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer (default 48)")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns (default 3)")
    parser.add_argument("--threads", type=int, help="of an operator (default: one a core)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the processor's time, not the clock's"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    slots = [int(n) for n in args.slots.split(",")]
    with tempfile.TemporaryDirectory() as work:
        checkpoint = write_checkpoint(Path(work) / "model", SMOLLM2, args.streams)
        folder = export_onnx(
            checkpoint, Path(work) / "out", kv_layout=args.kv_layout, precision=args.precision
        )
        asked = requests(args.requests, args.tokens)
        sides = {
            str(count): partial(answer, folder, count, args.threads, args.cpu_time)
            for count in slots
        }
        measured = take_turns(sides, asked, repeats=args.repeats)
    check_answers(measured)
    tokens = args.requests * args.tokens
    results = {
        count: tokens / statistics.median(seconds for seconds, _ in turns)
        for count, turns in measured.items()
    }
    if args.json:
        print(json.dumps(results))
        return
    first = next(iter(results.values()))
    for count, speed in results.items():
        print(f"{count:>4} slots {speed:8.1f} tokens/s {speed / first:6.2f}x")


if __name__ == "__main__":
    main()
