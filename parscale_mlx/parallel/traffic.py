"""What the ranks of a parallel model send each other: by formula, and as the system counted it."""

import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from parscale_core.checkpoint.config import ModelConfig

TOKEN = 4  # bytes of a token id
BYTES_SENT = 200  # offset of tcpi_bytes_sent and tcpi_bytes_retrans in Linux's struct tcp_info


@dataclass(frozen=True)
class Traffic:
    """What one rank sends round MLX's ring.

    Attributes:
        bytes: sent by each rank.
        steps: messages that wait for one another, each of which costs a network's latency.
    """

    bytes: int
    steps: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes + other.bytes, self.steps + other.steps)


def traffic_of_a_token(
    args: ModelConfig, streams: int, tensor: int, *, itemsize: int, share_tokens: bool
) -> Traffic:
    """What each rank sends while one sequence advances by one token.

    Args:
        streams, tensor: as in ``parscale_mlx.parallel.shard.Parallel``.
        itemsize: bytes of one number of a hidden state.
        share_tokens: whether rank 0's token is sent round, too.
    """
    traffic = traffic_of_the_gather(args, streams, tensor, itemsize=itemsize)
    traffic += traffic_of_the_sums(args, streams, tensor, itemsize=itemsize)
    others = streams * tensor - 1
    return traffic + Traffic(others * TOKEN, others) if share_tokens else traffic


def traffic_of_the_gather(
    args: ModelConfig, streams: int, tensor: int, *, itemsize: int
) -> Traffic:
    """What each rank sends for the final hidden states of one token.

    A ring of N ranks gathers in N - 1 steps, in each of which a rank passes on what one rank gave.
    """
    if streams == 1:
        return Traffic(0, 0)
    others = streams * tensor - 1
    own = args.streams // streams * args.hidden_size // tensor
    return Traffic(others * own * itemsize, others)


def traffic_of_the_sums(args: ModelConfig, streams: int, tensor: int, *, itemsize: int) -> Traffic:
    """What each rank sends for the two sums in every layer of one token.

    A ring of N ranks sums in 2 (N - 1) steps, in each of which a rank passes on an N-th of the
    array: all streams, whoever runs them.
    """
    if tensor == 1:
        return Traffic(0, 0)
    ranks = streams * tensor
    steps = 2 * args.num_hidden_layers * 2 * (ranks - 1)
    return Traffic(steps * args.streams * args.hidden_size * itemsize // ranks, steps)


def sent_bytes() -> int | None:
    """Bytes that this process's open TCP connections have sent so far, or None where Linux is not.

    Headers do not count, nor what had to be sent again.
    """
    if sys.platform != "linux":
        return None
    return sum(map(_sent, Path("/proc/self/fd").iterdir()))


def _sent(descriptor: Path) -> int:
    try:
        if not stat.S_ISSOCK(descriptor.stat().st_mode):
            return 0
    except OSError:  # closed meanwhile
        return 0
    with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
        if connection.family != socket.AF_INET or connection.type != socket.SOCK_STREAM:
            return 0
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
    return sent - again
