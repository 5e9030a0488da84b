"""Prefill and decode speed in MLX: one stream beside mlx-lm's own class, and P streams beside both.

    python benchmarks/generate_mlx.py [--streams 2,4,8] [--prompt 256] [--tokens 48] [--json]

All sides have random weights in the shape of SmolLM2-135M (or of --config), in float32 on a CPU.
Each is a process of its own, since the threads of one library disturb another's, and they take
turns, so that what else the machine does touches all of them. Printed are medians over the turns,
and how far the turns lie apart. With PyTorch installed, the structure of the published code is
measured too: the P streams as a batch of P, each with its prefix in the cache, all P caches grown
by concatenation.
``parscale bench`` measures more, and real models, in one process and without PyTorch.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from turns import Run, take_turns

PREFIX = 48

# Nothing here imports MLX or PyTorch at the top: a side's process imports this file, too.
Turn = tuple[Callable[[], Any], Callable[[Any, int], Any]]  # reads the prompt; decodes tokens


def mlx_side(config: dict, streams: int, ids: list[int]) -> Turn:
    """Our model, or mlx-lm's own class where ``streams`` is 0."""
    # before mlx: it loads a fast BLAS
    from parscale_mlx.benchmark import models
    from parscale_mlx.benchmark.timing import mlx_side

    import mlx.core as mx

    backbone = models.random_backbone(config)
    model: Any
    if streams == 0:
        model = models.mlx_lm_twin(backbone, config)
    else:
        model = models.with_many_streams(backbone, streams, {})
    mx.eval(model.parameters())
    side = mlx_side(model, mx.array([ids]))
    return side.prefill, side.decode


def torch_side(config: dict, streams: int, ids: list[int]) -> Turn:
    """The published structure: streams as rows of a batch, then an aggregator over the rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    fields = {k: v for k, v in config.items() if k != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    d = config["hidden_size"]
    aggregate = torch.nn.Sequential(
        torch.nn.Linear(streams * d, d), torch.nn.SiLU(), torch.nn.Linear(d, streams)
    )

    @torch.inference_mode()
    def forward(tokens, cache):
        h = model.model(
            tokens.expand(streams, -1), past_key_values=cache, use_cache=True
        ).last_hidden_state
        if streams > 1:
            rows = h.permute(1, 2, 0)
            weights = torch.softmax(aggregate(rows.reshape(rows.shape[0], -1)), dim=-1)
            h = torch.einsum("lds,ls->ld", rows, weights)[None]
        return model.lm_head(h[:, -1])

    def prefill():
        cache = DynamicCache()
        if streams > 1:
            head_dim = d // config["num_attention_heads"]
            shape = (streams, config["num_key_value_heads"], PREFIX, head_dim)
            for layer in range(config["num_hidden_layers"]):
                cache.update(torch.zeros(shape), torch.zeros(shape), layer)
        forward(torch.tensor([ids]), cache)
        return cache

    def decode(cache, tokens):
        token = torch.tensor([[1]])
        for _ in range(tokens):
            token = forward(token, cache).argmax(dim=-1)[None]

    return prefill, decode


def timed(make: Callable, config: dict, streams: int, ids: list[int]) -> Run:
    """A run that takes a number of tokens; returns the prompt's seconds, and those of a token."""
    prefill, decode = make(config, streams, ids)

    def run(tokens: int) -> dict[str, float]:
        start = time.perf_counter()
        state = prefill()
        middle = time.perf_counter()
        decode(state, tokens)
        return {"prefill": middle - start, "decode": (time.perf_counter() - middle) / tokens}

    return run


def table(times: dict[str, dict], prompt: int) -> list[str]:
    """A line a side: medians, ratios to the first side, and the slowest over the fastest turn."""
    medians = {
        name: {kind: statistics.median(values) for kind, values in own.items()}
        for name, own in times.items()
    }
    base = next(iter(medians.values()))
    lines = [f"{'':26}{'prefill':>16}{'':>8}{'spread':>8}{'decode':>16}{'':>8}{'spread':>8}"]
    for name, own in medians.items():
        cells = ""
        for kind, value in own.items():
            spread = max(times[name][kind]) / min(times[name][kind])
            rate = (
                f"{prompt / value:.1f} tok/s" if kind == "prefill" else f"{value * 1e3:.1f} ms/tok"
            )
            cells += f"{rate:>16}{value / base[kind]:>7.2f}x{spread:>7.2f}x"
        lines.append(f"{name:26}{cells}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a config.json to take the shape from")
    parser.add_argument("--streams", default="2,4,8", help="numbers of streams (default 2,4,8)")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens (default 256)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to decode (default 48)")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.config:
        config = json.loads(args.config.read_text())
    else:
        from parscale_mlx.benchmark.models import SMOLLM2 as config
    counts = [1, *map(int, args.streams.split(","))]
    wanted = {f"mlx-lm {config['model_type']}": (mlx_side, 0)}
    wanted |= {f"parscale P={n}": (mlx_side, n) for n in counts}
    if find_spec("torch"):
        wanted |= {f"PyTorch structure P={n}": (torch_side, n) for n in (1, counts[-1])}
    else:
        print("PyTorch is not installed: the published structure is left out\n")
    ids = [n % 1000 for n in range(args.prompt)]
    sides = {name: partial(timed, make, config, n, ids) for name, (make, n) in wanted.items()}
    measured = take_turns(sides, args.tokens, repeats=args.repeats)
    times = {
        name: {kind: [turn[kind] for turn in turns] for kind in ("prefill", "decode")}
        for name, turns in measured.items()
    }
    if args.json:
        print(json.dumps(times))
        return
    print(f"{os.cpu_count()} cores, {args.prompt} prompt tokens, {args.tokens} decoded, medians of "
          f"{args.repeats} turns\n")  # fmt: skip
    print("\n".join(table(times, args.prompt)))


if __name__ == "__main__":
    main()
