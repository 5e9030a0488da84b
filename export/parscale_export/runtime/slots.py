"""The sequences that are decoded together, each in a slot of shared KV buffers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from parscale_export.runtime.blocks import Block, Stored, gather
from parscale_export.runtime.kv_cache import Cache, FixedSteps
from parscale_export.runtime.prefill import room_for

if TYPE_CHECKING:
    from parscale_export.runtime.model import OnnxModel


class Slots:
    """Sequences of any lengths that all get their next token in one run.

    Sequences are numbered from 0. Entries are copied at the next step, all changes at once: in
    place where operators share a buffer and it has room, else into a new block, as wide as needed.

    Attributes:
        sequences: where each one's entries lie now.
    """

    def __init__(self, model: "OnnxModel", most: int):
        self.model, self.most = model, most
        self.sequences: list[Stored] = []
        self.block: Block | None = None
        self._steps: Cache | FixedSteps | None = None
        self._bound = 0  # sequences that the steps compute
        # Rows of a sequence side by side: then any number of them from the first can be computed.
        self._any_number = model.cache_rows == 1 and not model.cuda_graph

    def add(self, stored: Stored) -> None:
        """Take a sequence in, as the last one."""
        self.sequences.append(stored)

    def remove(self, n: int) -> None:
        """Let a sequence go. The last one gets its number."""
        last = self.sequences.pop()
        if n < len(self.sequences):
            self.sequences[n] = last
        if not self.sequences and not self.model.cuda_graph:
            self.block = self._steps = None  # what was long may have been the longest for long

    def step(self, tokens: Sequence[int], *, greedy: bool = False) -> list[np.ndarray]:
        """Feed each sequence one token: results [B, 1, width], as ``Cache.step``.

        Args:
            greedy: where steps are of fixed shapes, give tokens instead of logits, as they do.
        """
        self._settle()
        block, steps = self.block, self._steps
        assert block is not None and steps is not None
        lengths = np.ones(self._bound, np.int64)  # slots without a sequence compute one token
        lengths[: len(tokens)] = [stored.length + 1 for stored in self.sequences]
        ids = np.zeros((self._bound, 1), np.int64)
        ids[: len(tokens), 0] = tokens
        if self.model.shares_buffer:
            mask = np.arange(lengths.max()) < lengths[:, None]
        else:
            mask = np.arange(block.room, -1, -1) < lengths[:, None]
        mask = mask.astype(np.int64)
        if isinstance(steps, FixedSteps):
            results = steps.step(ids, mask, greedy=greedy)
        else:
            results = steps.step(ids, mask)
        if isinstance(steps, Cache) and not self.model.shares_buffer:
            self.block = block = Block(self.model, steps.pasts)
        self.sequences = [
            Stored(block, n, stored.length + 1) for n, stored in enumerate(self.sequences)
        ]
        return [values[: len(tokens)] for values in results]

    def _settle(self) -> None:
        """Bring every sequence to its place in a block that fits them all."""
        if self.block is None or not self._fits(self.block):
            new = self._new_block()
            gather(new, list(enumerate(self.sequences)))
            self.block, self._steps = new, None
        else:
            places = enumerate(self.sequences)
            gather(self.block, [(n, s) for n, s in places if not self._is_at(s, n)])
        self.sequences = [Stored(self.block, n, s.length) for n, s in enumerate(self.sequences)]
        bound = len(self.sequences) if self._any_number else self.block.sequences
        if self._steps is None or bound != self._bound:
            self._bound, self._steps = bound, self._bind(self.block, bound)

    def _fits(self, block: Block) -> bool:
        count, width = len(self.sequences), block.sequences
        if not self.model.shares_buffer:
            return count == width and all(self._is_at(s, n) for n, s in enumerate(self.sequences))
        if block.room <= max(stored.length for stored in self.sequences) or count > width:
            return False
        # Idle slots cost time where they cannot be left out.
        fixed = self._any_number or self.model.cuda_graph
        return fixed or width - count <= width // 4

    def _is_at(self, stored: Stored, n: int) -> bool:
        return stored.block is self.block and stored.place == n

    def _new_block(self) -> Block:
        count = len(self.sequences)
        longest = max(stored.length for stored in self.sequences)
        if not self.model.shares_buffer:
            return Block.allocate(self.model, count, longest)
        width = count
        if self._any_number or self.model.cuda_graph:  # copies, and recordings, are then few
            width = min(1 << (count - 1).bit_length(), max(self.most, count))
        return Block.allocate(self.model, width, room_for(self.model, longest + 1))

    def _bind(self, block: Block, bound: int) -> Cache | FixedSteps:
        if self.model.cuda_graph:
            return self.model.fixed_steps(block)
        return Cache(self.model, block.buffers, bound * self.model.cache_rows, steps=True)
