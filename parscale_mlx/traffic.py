"""What the ranks of a parallel model send each other: by formula, and as the system counted it."""

import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from parscale_mlx.model import ModelArgs

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


def traffic_of_a_token(
    args: ModelArgs, streams: int, tensor: int, *, itemsize: int, share_tokens: bool
) -> Traffic:
    """What each rank sends while one sequence advances by one token.

    A ring of N ranks gathers in N - 1 steps, in each of which a rank passes on what one rank gave.
    It sums in 2 (N - 1) steps, in each of which a rank passes on a N-th of the array.

    Args:
        streams, tensor: as in ``parscale_mlx.parallel.Parallel``.
        itemsize: bytes of one number of a hidden state.
        share_tokens: whether rank 0's token is sent round, too.
    """
    ranks, hidden = streams * tensor, args.hidden_size * itemsize
    others = ranks - 1
    sent, steps = 0, 0
    if streams > 1:
        sent += others * (args.parscale_n // streams) * hidden // tensor
        steps += others
    if tensor > 1:
        sums = 2 * args.num_hidden_layers
        sent += sums * 2 * others * args.parscale_n * hidden // ranks
        steps += sums * 2 * others
    if share_tokens:
        sent += others * TOKEN
        steps += others
    return Traffic(sent, steps)


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
