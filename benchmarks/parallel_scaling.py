"""Carry stream and tensor parallelism to N machines by a model of latency and bandwidth.

    python benchmarks/parallel_scaling.py [--streams 8] [--latency 50] [--json]

Every number that the model takes is named below with its source; nothing here is measured by this
script. parscale bench --parallel measures, and its bytes and messages are the ones used here. docs/
scaling.md says what follows.
"""

import argparse
import json
from dataclasses import dataclass, replace
from math import ceil

from parscale_mlx.parallel.traffic import traffic_of_a_token, traffic_of_the_sums

from parscale_core.checkpoint.config import ModelConfig

US = 1e-6
MACHINES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Network:
    """A link between neighbours: seconds a message takes at least, and bytes a second."""

    name: str
    latency: float
    bandwidth: float


# Latency of a message. RDMA: 5 to 9 us between two Macs (techboards.net/threads/5374). TCP over
# Thunderbolt: 300 us (jeffgeerling.com/blog/2025/15-tb-vram-on-mac-studio-rdma-over-thunderbolt-5);
# round trips of 380 to 950 us (github.com/exo-explore/exo/issues/2295). Ethernet: taken for the
# same, as TCP's own stack is what takes the time. Wi-Fi: the best average round trip of that exo
# issue, 7.5 ms, halved; its worst is 30 ms.
# Bandwidth. RDMA: 7.6 GB/s a rank (github.com/pytorch/pytorch/pull/189856). TCP over Thunderbolt 5:
# 3.5 GB/s, what a file took even by RDMA (github.com/ml-explore/mlx/issues/3207). 10 GbE: its line
# rate. Wi-Fi: half of the 1200 Mbit/s link of a two-antenna client at 80 MHz (evanmccann.net/blog/
# 2021/6/understanding-6-ghz-wifi-speed), since an access point sends everything once more.
NETWORKS = (
    Network("Thunderbolt 5, RDMA", 9 * US, 7.6e9),
    Network("Thunderbolt 5, TCP", 300 * US, 3.5e9),
    Network("10 GbE", 300 * US, 1.25e9),
    Network("Wi-Fi", 3750 * US, 75e6),
)


@dataclass(frozen=True)
class Machine:
    """What a machine reaches in practice.

    Attributes:
        bandwidth: bytes of weights and caches it reads a second.
        compute: floating point operations a second in matrix products.
    """

    bandwidth: float
    compute: float


# A Mac Studio with M3 Ultra runs Llama 3.2 3B (3.21 billion parameters, 1.87 GiB in Q4_K) at 3500
# tokens a second of prompt and 171 of answer (github.com/geerlingguy/beowulf-ai-cluster/issues/17).
M3_ULTRA = Machine(bandwidth=1.87 * 2**30 * 171, compute=2 * 3.21e9 * 3500)


@dataclass(frozen=True)
class Work:
    """What is asked: sequences at once, tokens of context before, bytes a weight."""

    name: str
    batch: int
    context: int
    weight_bytes: float


WORKS = (
    Work("one answer, 1k context, bfloat16", 1, 1024, 2),
    Work("one answer, 1k context, 4 bits", 1, 1024, 4.5 / 8),
    Work("one answer, 32k context, 4 bits", 1, 32768, 4.5 / 8),
    Work("16 answers, 4k context, 4 bits", 16, 4096, 4.5 / 8),
)
PROMPT = 4096
PREFILL_STEP = 2048  # tokens that mlx-lm prefills at a time
ACTIVATION_BYTES = 2


def paper_model(streams: int) -> ModelConfig:
    """The 1.6 billion parameter model of arXiv 2505.10475 (36 layers, 16 heads over 2)."""
    return ModelConfig.from_dict(
        dict(
            model_type="qwen2_parscale",
            hidden_size=1536,
            num_hidden_layers=36,
            intermediate_size=8320,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
            parscale_n=streams,
        )
    )


def layer_parameters(args: ModelConfig) -> int:
    """Parameters of all layers' matrices: what tensor parallelism shares out."""
    heads = args.num_attention_heads + args.num_key_value_heads
    attention = 2 * args.hidden_size * heads * args.head_dim
    return args.num_hidden_layers * (attention + 3 * args.hidden_size * args.intermediate_size)


def whole_parameters(args: ModelConfig) -> int:
    """Parameters of the head and the aggregator, which every rank has whole."""
    return args.vocab_size * args.hidden_size + args.streams * args.hidden_size**2


def cache_bytes(args: ModelConfig, work: Work) -> float:
    tokens = work.batch * args.streams * (work.context + args.prefix_length)
    per_token = 2 * args.num_hidden_layers * args.num_key_value_heads * args.head_dim
    return tokens * per_token * ACTIVATION_BYTES


def decode_seconds(
    args: ModelConfig, work: Work, machine: Machine, network: Network, streams: int, tensor: int
) -> float:
    """Seconds of one step of ``work``, every sequence advancing by one token."""
    layers, whole = layer_parameters(args), whole_parameters(args)
    read = (layers / tensor + whole) * work.weight_bytes
    rows = work.batch * args.streams / streams
    operations = 2 * (rows * layers / tensor + work.batch * whole)
    seconds = max(read / machine.bandwidth, operations / machine.compute)
    seconds += cache_bytes(args, work) / (streams * tensor) / machine.bandwidth
    traffic = traffic_of_a_token(
        args, streams, tensor, itemsize=ACTIVATION_BYTES, share_tokens=tensor > 1
    )
    wire = traffic.bytes * work.batch / network.bandwidth
    return seconds + traffic.steps * network.latency + wire


def prefill_seconds(
    args: ModelConfig, prompt: int, machine: Machine, network: Network, streams: int, tensor: int
) -> float:
    """Seconds of a prompt; streams exchange nothing in it, as its logits are not asked for."""
    attention = 2 * prompt * args.num_hidden_layers * args.num_attention_heads * args.head_dim
    per_token = 2 * layer_parameters(args) + attention
    seconds = args.streams * prompt * per_token / (streams * tensor) / machine.compute
    sums = traffic_of_the_sums(args, streams, tensor, itemsize=ACTIVATION_BYTES)
    chunks = ceil(prompt / PREFILL_STEP)
    wire = sums.bytes * prompt / network.bandwidth
    return seconds + chunks * sums.steps * network.latency + wire


def ways(args: ModelConfig, machines: int) -> dict[str, tuple[int, int]]:
    """The ways to share the model between so many machines, as (streams, tensor)."""
    found = {}
    for tensor in range(1, args.num_key_value_heads + 1):
        streams, rest = divmod(machines, tensor)
        if rest or args.streams % streams or args.num_key_value_heads % tensor:
            continue
        name = "streams" if tensor == 1 else "tensor" if streams == 1 else f"{streams}x{tensor}"
        found[name] = (streams, tensor)
    return found


def speedups(args: ModelConfig, network: Network, seconds) -> list[tuple[int, str, float]]:
    """(machines, way, speed-up over one machine) for every way there is."""
    alone = seconds(network, 1, 1)
    return [
        (machines, name, alone / seconds(network, *shares))
        for machines in MACHINES[1:]
        for name, shares in ways(args, machines).items()
    ]


def break_even_latency(args: ModelConfig, seconds) -> float:
    """The latency below which two machines do better with tensor than with stream parallelism."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        network = replace(NETWORKS[0], latency=middle)
        if seconds(network, 1, 2) < seconds(network, 2, 1):
            low = middle
        else:
            high = middle
    return low


def tasks(args: ModelConfig) -> dict:
    """What is asked, each as a function from a network and a way of sharing to seconds."""
    found = {
        work.name: lambda network, streams, tensor, work=work: decode_seconds(
            args, work, M3_ULTRA, network, streams, tensor
        )
        for work in WORKS
    }
    found[f"prompt of {PROMPT} tokens"] = lambda network, streams, tensor: prefill_seconds(
        args, PROMPT, M3_ULTRA, network, streams, tensor
    )
    return found


def print_task(args: ModelConfig, name: str, seconds, networks) -> None:
    columns = [f"{machines} {way}" for machines in MACHINES[1:] for way in ways(args, machines)]
    print(f"\n{name}: {seconds(networks[0], 1, 1) * 1e3:.1f} ms on one machine")
    print(f"{'':20}" + "".join(f"{column:>11}" for column in columns))
    for network in networks:
        row = "".join(f"{speedup:>10.2f}x" for _, _, speedup in speedups(args, network, seconds))
        print(f"{network.name:20}{row}")
    below = break_even_latency(args, seconds)
    print(f"2 machines: tensor wins below {below / US:.0f} us a message")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=8, help="P (default 8)")
    parser.add_argument("--latency", type=float, help="one network of this latency in us instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    networks = NETWORKS
    if options.latency is not None:
        networks = (replace(NETWORKS[1], name="network", latency=options.latency * US),)
    args = paper_model(options.streams)
    if options.json:
        rows = [
            {"task": name, "network": network.name, "machines": n, "way": way, "speedup": speedup}
            for name, seconds in tasks(args).items()
            for network in networks
            for n, way, speedup in speedups(args, network, seconds)
        ]
        print(json.dumps(rows))
        return
    print(
        f"P={args.streams}, {layer_parameters(args) / 1e9:.2f} billion parameters in "
        f"{args.num_hidden_layers} layers, machines that read {M3_ULTRA.bandwidth / 1e9:.0f} GB/s "
        f"and compute {M3_ULTRA.compute / 1e12:.1f} TFLOP/s"
    )
    for name, seconds in tasks(args).items():
        print_task(args, name, seconds, networks)


if __name__ == "__main__":
    main()
