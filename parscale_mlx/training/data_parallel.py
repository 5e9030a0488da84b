"""Data parallelism: what the processes of one run, started by ``mlx.launch``, agree on."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def rank() -> int:
    """Which process this is; 0 keeps the run's folder."""
    return mx.distributed.init().rank()


def size() -> int:
    """How many processes there are; 1 where nothing launched several."""
    return mx.distributed.init().size()


def total(x: mx.array) -> mx.array:
    """The sum over all processes."""
    return mx.distributed.all_sum(x, stream=mx.cpu)


def from_first(tree: Any) -> Any:
    """The first process's arrays, in every process."""
    if size() == 1:
        return tree
    return tree_map(lambda x: total(x if rank() == 0 else mx.zeros_like(x)), tree)


def check_batch_size(batch_size: int) -> None:
    """
    Raises:
        ValueError: the processes cannot share a batch evenly.
    """
    if batch_size % size():
        raise ValueError(f"batch_size={batch_size}: not a multiple of the {size()} processes")


def check_same_data(fingerprint: str) -> None:
    """
    Raises:
        ValueError: the processes read other data.
    """
    own = mx.array(int(fingerprint[:6], 16))
    if size() > 1 and mx.any(from_first(own) != own).item():
        raise ValueError(f"process {rank()} read other training data than process 0")
