"""Whether an export's data files are those that were written."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from parscale_core.file_hash import sha256

PREFIX = "sha256."  # in a graph's metadata, before the name of a data file


def check_hashes(graph: Path, about: Mapping[str, str]) -> None:
    """Compare the data files beside a graph with what it says of them.

    Args:
        about: the graph's metadata.

    Raises:
        ValueError: one is another, or damaged.
    """
    for key, expected in about.items():
        if not key.startswith(PREFIX):
            continue
        file = graph.parent / key.removeprefix(PREFIX)
        status = file.stat()
        if _hash(file.resolve(), status.st_size, status.st_mtime_ns) != expected:
            raise ValueError(
                f"{file}: not the data that {graph.name} was written with; export it again "
                "(check=False reads it all the same)"
            )


@lru_cache(maxsize=64)
def _hash(file: Path, size: int, changed: int) -> str:
    # Once for all graphs over the same data; another size or time is another file.
    return sha256(file)
