"""Training speed in MLX: one stream beside P, the whole model beside the streams alone.

    python benchmarks/training.py [--streams 1,4] [--shapes 8x256,16x128] [--json]

Every row is the training step of ``parscale train`` over random tokens, the rows taking turns so
that what else the machine does touches all of them. Tokens count once, however many streams read
them. Next to the median of the wall time stands the processor time, which other programs on the
machine do not stretch; OPENBLAS_NUM_THREADS=1 makes it comparable to what one of several runs side
by side would take.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import parscale_mlx  # before mlx: it loads a fast BLAS
from parscale_mlx.graft import graft, grafted_config, make_prefixes
from parscale_mlx.training.optimizer import make_optimizer
from parscale_mlx.training.start import Start, train_streams_only
from parscale_mlx.training.step import make_step

import mlx.core as mx
from mlx.utils import tree_flatten
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.train_settings import TrainSettings

PREFIX = 48


@dataclass
class Side:
    """One row: a model, its training step and a batch for it."""

    name: str
    shape: tuple[int, int]
    model: object
    step: object
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def make_side(config: dict, streams: int, frozen: bool, shape: tuple[int, int]) -> Side:
    mx.random.seed(0)
    model = parscale_mlx.Model(ModelConfig.from_dict(config))
    if streams > 1:
        pieces = mx.random.randint(0, config["vocab_size"], (streams, PREFIX))
        grafted = grafted_config(config, streams=streams, prefix_length=PREFIX)
        graft(model, grafted, make_prefixes(model, pieces))
    if frozen:
        train_streams_only(model, mx.float32)
    mx.eval(model.parameters())
    settings = TrainSettings(stage="streams", data=[], output="")
    start = Start(model, config, Path())
    name = f"P={streams}, {'streams only' if frozen else 'whole model'}"
    return Side(name, shape, model, make_step(start, make_optimizer(settings, start), 1.0))


def run_once(side: Side, vocabulary: int) -> None:
    batch, length = side.shape
    tokens = mx.random.randint(0, vocabulary, (batch, length + 1))
    counts = mx.ones((batch, length), mx.bool_)
    mx.eval(tokens, counts)
    wall, cpu = time.perf_counter(), time.process_time()
    side.step([(tokens, counts)])
    side.wall.append(time.perf_counter() - wall)
    side.cpu.append(time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--shapes", default="8x256,16x128", help="sequences x tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = {
        "model_type": "qwen2",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "intermediate_size": args.hidden * 11 // 4,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads // 2,
        "vocab_size": args.vocabulary,
        "tie_word_embeddings": True,
    }
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
    sides = [
        make_side(config, streams, frozen, shape)
        for shape in shapes
        for streams in map(int, args.streams.split(","))
        for frozen in ([False, True] if streams > 1 else [False])
    ]
    for n in range(args.repeats + 1):
        for side in sides:
            run_once(side, args.vocabulary)
            if n == 0:  # warm-up
                side.wall.clear(), side.cpu.clear()
    for side in sides:
        tokens = side.shape[0] * side.shape[1]
        parameters = sum(a.size for _, a in tree_flatten(side.model.parameters()))
        row = {
            "side": side.name,
            "shape": "x".join(map(str, side.shape)),
            "parameters": parameters,
            "tokens_per_second": round(tokens / statistics.median(side.wall), 1),
            "tokens_per_cpu_second": round(tokens / statistics.median(side.cpu), 1),
        }
        if args.json:
            print(json.dumps(row))
        else:
            print(
                f"{row['side']:22} {row['shape']:>8} {parameters / 1e6:6.2f} M parameters "
                f"{row['tokens_per_second']:9,.0f} tokens/s "
                f"{row['tokens_per_cpu_second']:9,.0f} tokens/CPU s"
            )


if __name__ == "__main__":
    main()
