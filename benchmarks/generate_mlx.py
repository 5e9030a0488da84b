"""Prefill and decode speed in MLX: one stream beside mlx-lm's own class, and P streams beside both.

    python benchmarks/generate_mlx.py [--streams 2,4,8] [--prompt 256] [--tokens 64] [--json]

All sides have the same random weights in the shape of SmolLM2-135M (or of --config), and take turns
in one run, so that what else the machine does touches all of them. Times are medians. With PyTorch
installed, the structure of the published code is measured too: the P streams as a batch of P, each
with its prefix in the cache, all P caches grown by concatenation. ``parscale bench`` measures more,
and real models, without PyTorch.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from parscale_mlx import benchmark  # before mlx: it loads a fast BLAS

import mlx.core as mx

PREFIX = benchmark.PREFIX


def torch_side(config: dict, streams: int, ids: list[int]) -> benchmark.Side:
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

    return benchmark.Side(prefill, decode)


def build_sides(config: dict, counts: list[int], ids: list[int]) -> dict[str, benchmark.Side]:
    backbone = benchmark.random_backbone(config)
    models = benchmark.compared_models(backbone, config, [1, *counts], {})
    sides = {}
    for name, model in models.items():
        label = f"mlx-lm {config['model_type']}" if name == "mlx-lm" else f"parscale {name}"
        sides[label] = benchmark.mlx_side(model, mx.array([ids]))
    try:
        for streams in [1, *counts]:
            sides[f"PyTorch structure P={streams}"] = torch_side(config, streams, ids)
    except ImportError:
        print("PyTorch is not installed: the published structure is left out\n")
    return sides


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a config.json to take the shape from")
    parser.add_argument("--streams", default="2,4,8", help="numbers of streams (default 2,4,8)")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens (default 256)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to decode (default 48)")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else benchmark.SMOLLM2
    counts = [int(n) for n in args.streams.split(",")]
    sides = build_sides(config, counts, [i % 1000 for i in range(args.prompt)])
    results = benchmark.measure(sides, repeats=args.repeats, tokens=args.tokens)
    if args.json:
        print(json.dumps({name: asdict(result) for name, result in results.items()}))
        return
    base = next(iter(results.values()))
    print(f"{mx.default_device()}, {args.prompt} prompt tokens, {args.tokens} decoded\n")
    print(f"{'':24}{'prefill':>14}{'':>8}{'decode':>14}{'':>8}")
    for name, result in results.items():
        print(
            f"{name:24}{args.prompt / result.first_token:>8.1f} tok/s"
            f"{result.first_token / base.first_token:>7.2f}x"
            f"{result.step * 1e3:>8.2f} ms/t {result.step / base.step:>7.2f}x"
        )


if __name__ == "__main__":
    main()
