"""From documents to sequences of bounded length, and which of them make which batch."""

import hashlib
from functools import lru_cache
from typing import TypeVar

from parscale_mlx.training.documents import Document

import numpy as np

T = TypeVar("T")

ROUND_TO = 32  # lengths that batches are padded to, so that few shapes occur


def pack(documents: list[Document], seq_length: int) -> list[Document]:
    """Join documents, each of which ends with its end-of-text token, and cut windows.

    A window has ``seq_length`` + 1 tokens and begins with the last one of the window before, so
    every token but the first is predicted once; what is left at the end is dropped.
    """
    stream = np.concatenate([d.tokens for d in documents])
    windows = range(0, len(stream) - seq_length, seq_length)
    return [Document(stream[n : n + seq_length + 1], 0, f"token {n}") for n in windows]


def bound(documents: list[Document], seq_length: int, *, truncate: bool) -> list[Document]:
    """Documents of at most ``seq_length`` + 1 tokens that have something to learn.

    Raises:
        ValueError: one is longer and ``truncate`` is not given.
    """
    bounded = []
    for document in documents:
        if len(document.tokens) > seq_length + 1 and not truncate:
            raise ValueError(
                f"{document.source}: {len(document.tokens)} tokens are more than "
                f"seq_length={seq_length} allows (truncate=True cuts such)"
            )
        tokens = document.tokens[: seq_length + 1]
        if len(tokens) > max(1, document.prompt):
            bounded.append(Document(tokens, document.prompt, document.source))
    return bounded


def split(items: list[T], share: float) -> tuple[list[T], list[T]]:
    """Evenly spaced items held out from the rest: training, held out."""
    step = round(1 / share)
    return [x for n, x in enumerate(items) if n % step != step - 1], items[step - 1 :: step]


def batch_indices(step: int, size: int, count: int, seed: int) -> np.ndarray:
    """Which of ``count`` sequences make batch ``step``: a function of its arguments alone.

    Every epoch goes through all of them in another order; a batch may span two epochs.
    """
    places = range(step * size, (step + 1) * size)
    return np.array([_order(seed, place // count, count)[place % count] for place in places])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def make_batch(documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, int32 [B, L + 1], and which predictions count, bool [B, L].

    Shorter sequences are padded at their end.
    """
    longest = max(len(d.tokens) for d in documents)
    if any(len(d.tokens) != longest for d in documents):
        longest = 1 + -(-(longest - 1) // ROUND_TO) * ROUND_TO
    tokens = np.zeros((len(documents), longest), np.int32)
    counts = np.zeros((len(documents), longest - 1), bool)
    for row, document in enumerate(documents):
        n = len(document.tokens)
        tokens[row, :n] = document.tokens
        counts[row, max(document.prompt - 1, 0) : n - 1] = True
    return tokens, counts


def fingerprint(documents: list[Document]) -> str:
    """A hash of what is trained on, to notice that it is another than before."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.tokens.tobytes())
        digest.update(document.prompt.to_bytes(4, "little"))
    return digest.hexdigest()
