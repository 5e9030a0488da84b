"""Prefill and decode speed in MLX: one stream beside mlx-lm's own class, and P streams beside both.

    python benchmarks/generate_mlx.py [--streams 2,4,8] [--prompt 256] [--tokens 64] [--json]

All sides have the same random weights in the shape of SmolLM2-135M (or of --config), and take turns
in one run, so that what else the machine does touches all of them. Times are medians. With PyTorch
installed, the structure of the published code is measured too: the P streams as a batch of P, each
with its prefix in the cache, all P caches grown by concatenation.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import parscale_mlx  # before mlx: it loads a fast BLAS

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import make_prompt_cache

PREFIX = 48
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def mlx_side(model, ids: list[int]):
    """Prefill and decode as functions of a number of tokens, over one model's own cache."""

    def prefill():
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([ids]), cache=cache)[:, -1])
        return cache

    def decode(cache, tokens):
        token = mx.array([[1]])
        for _ in range(tokens):
            token = mx.argmax(model(token, cache=cache)[:, -1], axis=-1)[None]
            mx.eval(token)

    return prefill, decode


def torch_side(config: dict, streams: int, ids: list[int]):
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


def build_sides(config: dict, counts: list[int], ids: list[int]) -> dict:
    theirs = {"llama": llama, "qwen2": qwen2}[config["model_type"]]
    plain = theirs.Model(theirs.ModelArgs.from_dict(config))
    plain.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.02, plain.parameters()))
    mx.eval(plain.parameters())
    weights = tree_flatten(plain.parameters())
    sides = {f"mlx-lm {config['model_type']}": mlx_side(plain, ids)}
    for streams in [1, *counts]:
        args = parscale_mlx.ModelArgs.from_dict(
            config | {"parscale_n": streams, "parscale_n_tokens": PREFIX}
        )
        model = parscale_mlx.Model(args)
        model.load_weights(weights, strict=False)
        mx.eval(model.parameters())
        sides[f"parscale P={streams}"] = mlx_side(model, ids)
    try:
        for streams in [1, *counts]:
            sides[f"PyTorch structure P={streams}"] = torch_side(config, streams, ids)
    except ImportError:
        print("PyTorch is not installed: the published structure is left out\n")
    return sides


def measure(sides: dict, repeats: int, tokens: int) -> dict[str, dict[str, float]]:
    """Median seconds of a prefill and of one decoded token, the sides taking turns."""
    times: dict = {name: {"prefill": [], "decode": []} for name in sides}
    for turn in range(repeats + 1):
        for name, (prefill, decode) in sides.items():
            start = time.perf_counter()
            cache = prefill()
            middle = time.perf_counter()
            decode(cache, tokens)
            end = time.perf_counter()
            if turn > 0:  # the first turn warms up
                times[name]["prefill"].append(middle - start)
                times[name]["decode"].append((end - middle) / tokens)
    return {
        name: {phase: statistics.median(values) for phase, values in phases.items()}
        for name, phases in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a config.json to take the shape from")
    parser.add_argument("--streams", default="2,4,8", help="numbers of streams (default 2,4,8)")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens (default 256)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to decode (default 48)")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else SMOLLM2
    counts = [int(n) for n in args.streams.split(",")]
    sides = build_sides(config, counts, [i % 1000 for i in range(args.prompt)])
    results = measure(sides, args.repeats, args.tokens)
    if args.json:
        print(json.dumps(results))
        return
    base = next(iter(results.values()))
    print(f"{mx.default_device()}, {args.prompt} prompt tokens, {args.tokens} decoded\n")
    print(f"{'':24}{'prefill':>14}{'':>8}{'decode':>14}{'':>8}")
    for name, result in results.items():
        print(
            f"{name:24}{args.prompt / result['prefill']:>8.1f} tok/s"
            f"{result['prefill'] / base['prefill']:>7.2f}x"
            f"{result['decode'] * 1e3:>8.2f} ms/t {result['decode'] / base['decode']:>7.2f}x"
        )


if __name__ == "__main__":
    main()
