"""Prefill and decode speed of one model over several ranks: shared streams, shared layers, neither.

    mlx.launch -n 2 -- python benchmarks/parallel.py [--streams 8] [--modes streams,tensor] [--json]

All sides have the same random weights in the shape of Qwen2.5-0.5B (or of --config), and take turns
in one run, so that what else the machines do touches all of them. Times are rank 0's medians. The
first side is every rank with the whole model to itself and nothing to exchange. With all ranks on
one machine, give each its share of the cores (mlx.launch --env OPENBLAS_NUM_THREADS=1 ...).

Bytes are what each rank sends for one token: by formula, and as Linux counted them.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import parscale_mlx
from parscale_mlx.parallel import Parallel, plan, share_out
from parscale_mlx.ranks import join
from parscale_mlx.traffic import sent_bytes, traffic_of_a_token
from parscale_mlx.watch import watched

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

PREFIX = 48
QWEN2_5_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
ALONE = "one process"


class Side:
    """One way of running the model, with what it took."""

    def __init__(self, model: parscale_mlx.Model):
        self.model = model
        self.parallel: Parallel | None = model.parallel
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.sent: int | None = None

    def run(self, ids: list[int], tokens: int) -> None:
        choose = self._sampler()
        start = time.perf_counter()
        cache = self.model.make_cache()
        # As mlx-lm does: a prefill's logits are not asked for, but those of its last token.
        self.model(mx.array([ids[:-1]]), cache=cache)
        mx.eval([c.state for c in cache])
        token = choose(self.model(mx.array([ids[-1:]]), cache=cache)[:, -1])
        mx.eval(token)
        middle, sent = time.perf_counter(), sent_bytes()
        for _ in range(tokens):
            token = choose(self.model(token[:, None], cache=cache)[:, -1])
            mx.eval(token)
        self.prefill.append(middle - start)
        self.decode.append((time.perf_counter() - middle) / tokens)
        if sent is not None:
            time.sleep(0.1)  # what was handed to the system is on its way a moment later
            self.sent = (sent_bytes() - sent) // tokens

    def _sampler(self):
        def likeliest(logits):
            return mx.argmax(logits, axis=-1)

        return likeliest if self.parallel is None else self.parallel.sampler(likeliest)

    def result(self) -> dict:
        result = {
            "prefill_s": statistics.median(self.prefill),
            "decode_s": statistics.median(self.decode),
            "sent_bytes": self.sent,
        }
        if self.parallel is None:
            return result | {"formula_bytes": 0, "steps": 0}
        traffic = traffic_of_a_token(
            self.model.args,
            self.parallel.streams,
            self.parallel.tensor,
            itemsize=self.model.model.norm.weight.dtype.size,
            share_tokens=not self.parallel.ranks_agree,
        )
        return result | {"formula_bytes": traffic.bytes, "steps": traffic.steps}


def build_sides(config: dict, modes: list[str], group, dtype: mx.Dtype) -> dict[str, Side]:
    """The whole model, and its shares; what is not sliced is held once for all of them."""
    mx.random.seed(0)
    args = parscale_mlx.ModelArgs.from_dict(config)
    whole = parscale_mlx.Model(args)
    whole.update(
        tree_map(lambda a: (mx.random.normal(a.shape) * 0.02).astype(dtype), whole.parameters())
    )
    mx.eval(whole.parameters())
    weights = tree_flatten(whole.parameters())
    sides = {ALONE: Side(whole)}
    for mode in modes:
        model = parscale_mlx.Model(args)
        model.load_weights(weights)
        share_out(model, plan(mode, group, args))
        mx.eval(model.parameters())
        sides[mode] = Side(model)
    return sides


def print_table(results: dict[str, dict], prompt: int) -> None:
    base = results[ALONE]
    print(f"{'':14}{'prefill':>14}{'':>8}{'decode':>14}{'':>8}", end="")
    print(f"{'sent a token':>15}{'by formula':>13}{'steps':>7}")
    for name, result in results.items():
        sent = "-" if result["sent_bytes"] is None else f"{result['sent_bytes']:,}"
        print(
            f"{name:14}{prompt / result['prefill_s']:>8.1f} tok/s"
            f"{base['prefill_s'] / result['prefill_s']:>7.2f}x"
            f"{result['decode_s'] * 1e3:>9.1f} ms/t"
            f"{base['decode_s'] / result['decode_s']:>7.2f}x"
            f"{sent:>13} B{result['formula_bytes']:>11,} B{result['steps']:>7}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a config.json to take the shape from")
    parser.add_argument("--streams", type=int, default=8, help="P (default 8)")
    parser.add_argument("--modes", default="streams,tensor", help="ways (default streams,tensor)")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens (default 64)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        group = join()
    except ValueError as error:
        parser.error(str(error).partition(":")[0] + ": mlx.launch -n 2 -- python " + __file__)
    config = json.loads(args.config.read_text()) if args.config else QWEN2_5_HALF_B
    config |= {"parscale_n": args.streams, "parscale_n_tokens": PREFIX}
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    with watched(group):
        sides = build_sides(config, args.modes.split(","), group, dtype)
        ids = [i % 1000 for i in range(args.prompt)]
        for side in sides.values():  # warms up
            side.run(ids, 2)
            side.prefill.clear()
            side.decode.clear()
        for _ in range(args.repeats):
            for side in sides.values():
                side.run(ids, args.tokens)
        results = {name: side.result() for name, side in sides.items()}
    if group.rank() > 0:
        return
    if args.json:
        print(json.dumps(results))
        return
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "all")
    print(
        f"{group.size()} ranks, {mx.default_device()}, BLAS threads a rank: {threads}; "
        f"P={args.streams}, {args.prompt} prompt tokens, {args.tokens} decoded\n"
    )
    print_table(results, args.prompt)


if __name__ == "__main__":
    main()
