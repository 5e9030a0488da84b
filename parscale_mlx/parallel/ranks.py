"""The processes that run one model together, as ``mlx.launch`` starts them: what they must share.

Each is a *rank* of a group. They run the same program; if they computed with other weights, or were
asked other things, they would wait for each other forever, so that is found out at the start.
"""

import hashlib
import json
import secrets
from functools import cache
from importlib.metadata import version
from typing import Any

import mlx.core as mx

PACKAGES = ("parscale", "mlx", "mlx-lm")
_CPU_STREAM = mx.new_thread_local_stream(mx.cpu)


@cache
def join() -> mx.distributed.Group:
    """The group of all ranks, whose random numbers are from then on the same.

    Raises:
        ValueError: this process is the only one.
        RuntimeError: the other ranks cannot be reached.
    """
    group = mx.distributed.init()
    if group.size() == 1:
        raise ValueError(
            "this is the only process; start several with mlx.launch: "
            "mlx.launch -n 2 -- parscale generate --parallel streams ..."
        )
    seed = secrets.token_bytes(4)
    mx.random.seed(int.from_bytes(gather_bytes(group, seed)[0], "little"))
    return group


def check_same(group: mx.distributed.Group, facts: dict[str, str]) -> None:
    """Compare this rank's facts, and its versions of our packages, with those of the others.

    Raises:
        ValueError: one differs, which every rank is told alike; the message names rank and fact.
    """
    facts = {f"version of {package}": version(package) for package in PACKAGES} | facts
    first, *others = (json.loads(text) for text in gather_bytes(group, json.dumps(facts).encode()))
    for rank, theirs in enumerate(others, 1):
        for name, value in first.items():
            if (other := theirs.get(name)) != value:
                raise ValueError(
                    f"rank {rank} differs from rank 0: its {name} is {other}, not {value}"
                )


def check_same_input(group: mx.distributed.Group, name: str, *values: Any) -> None:
    """As ``check_same``, for what the ranks are asked: anything that makes JSON, of any length."""
    check_same(group, {name: hashlib.sha256(json.dumps(values).encode()).hexdigest()})


def all_gather(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """What every rank gave as ``x``, [n, ...], one after the other: [ranks * n, ...]."""
    return mx.distributed.all_gather(x, group=group, stream=_stream())


def all_sum(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """The sum over the ranks."""
    return mx.distributed.all_sum(x, group=group, stream=_stream())


def _stream() -> Any:
    # Two streams would run their exchanges at the same time, and each rank could pair them
    # otherwise. On a GPU the backends take one of their own, whatever stream computes.
    return _CPU_STREAM if mx.default_device() == mx.cpu else None


def broadcast(group: mx.distributed.Group, data: bytes) -> bytes:
    """What rank 0 gave, on every rank; nothing costs one exchange, anything else two."""
    sizes: Any = all_gather(mx.array([len(data)]), group).tolist()
    if not sizes[0]:
        return b""
    given = data if group.rank() == 0 else bytes(sizes[0])
    summed: Any = all_sum(mx.array(list(given), mx.uint8), group).tolist()
    return bytes(summed)


def gather_bytes(group: mx.distributed.Group, data: bytes) -> list[bytes]:
    """What each rank gave, in the order of the ranks."""
    sizes: Any = all_gather(mx.array([len(data)]), group).tolist()
    padded = mx.array(list(data.ljust(max(sizes), b"\0")), mx.uint8)
    rows: Any = all_gather(padded[None], group).tolist()
    return [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]
