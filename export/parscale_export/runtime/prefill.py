"""Prompts, computed by themselves before they join the sequences that are decoded."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parscale_export.runtime.blocks import ROOM, Block, Stored
from parscale_export.runtime.kv_cache import Cache

if TYPE_CHECKING:
    from parscale_export.runtime.model import OnnxModel


def room_for(model: "OnnxModel", tokens: int) -> int:
    """Tokens that a buffer for so many has room for: whole steps, within the context."""
    steps = -(-tokens // ROOM) * ROOM
    return max(tokens, min(steps, model.context_length or steps))


class Growing:
    """The KV cache of one sequence, to which any numbers of tokens are added.

    Where ``model.takes_chunks`` is false, only the first addition may be of several tokens.

    Args:
        tokens: how many it will be at most.
        start: what is there already, with room for them.
    """

    def __init__(self, model: "OnnxModel", tokens: int, start: Stored | None = None):
        self.model, self.length = model, start.length if start else 0
        self.block = start.block if start else empty_block(model, 1, tokens)
        self.cache = Cache(model, self.block.buffers)

    def extend(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """Add tokens; the logits [1, L or 1, vocab], and the streams' weights if any."""
        self.length += len(tokens)
        ids, mask = np.array([tokens], np.int64), np.ones((1, self.length), np.int64)
        return self.cache.step(ids, mask)

    @property
    def stored(self) -> Stored:
        return Stored(Block(self.model, self.cache.pasts), 0, self.length)


def compute_together(
    model: "OnnxModel", prompts: Sequence[Sequence[int]]
) -> tuple[list[Stored], list[np.ndarray]]:
    """Compute several prompts, from their beginnings, in one run.

    Returns:
        where their entries lie, and the last tokens' results, [B, 1, width] each.
    """
    longest = max(map(len, prompts))
    ids, mask = (np.zeros((len(prompts), longest), np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    cache = Cache(model, empty_block(model, len(prompts), longest).buffers)
    results = [values[:, -1:] for values in cache.step(ids, mask)]
    block = Block(model, cache.pasts)
    return [Stored(block, place, len(p)) for place, p in enumerate(prompts)], results


def empty_block(model: "OnnxModel", sequences: int, tokens: int) -> Block:
    """A block for a first call: with room where operators share it, else of nothing at all."""
    if model.shares_buffer:
        return Block.allocate(model, sequences, room_for(model, tokens))
    return Block(model, model.allocate(sequences * model.cache_rows, 0))


def chunks(model: "OnnxModel", tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """A prompt in parts that can be computed one after the other."""
    size = size if model.takes_chunks else len(tokens)
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]
